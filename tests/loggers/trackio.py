"""Stands in for trackio, as wandb.py beside it for wandb."""

from __future__ import annotations

from wandb import Image, _note

__all__ = ["Image", "init"]


class Run:
    def log(self, values, step):
        _note("trackio.log", values=values, step=step)

    def finish(self):
        _note("trackio.finish")


def init(project, name, config, resume, embed):
    _note("trackio.init", project=project, name=name, config=config, resume=resume, embed=embed)
    return Run()
