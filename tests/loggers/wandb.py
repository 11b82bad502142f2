"""Stands in for wandb: writes down what the package is called with, in the file that $LOGGER_CALLS names."""

from __future__ import annotations

import json
import os


def _note(call: str, **values: object) -> None:
    with open(os.environ["LOGGER_CALLS"], "a") as file:
        file.write(json.dumps({"call": call, **values}, default=str) + "\n")


class Image:
    def __init__(self, image):
        self.size = image.size

    def __str__(self):
        return "image of {} x {}".format(*self.size)


class Run:
    def __init__(self, id):
        self.id = id

    def define_metric(self, name, step_metric):
        _note("wandb.define_metric", name=name, step_metric=step_metric)

    def log(self, values):
        if values.get("train/loss") == -1:
            raise ConnectionError("the server is away")
        _note("wandb.log", values=values)

    def finish(self, exit_code):
        _note("wandb.finish", exit_code=exit_code)


def init(**settings):
    _note("wandb.init", **settings)
    if "no key" in settings["name"]:
        raise RuntimeError("No API key configured.\nUse `wandb login`")
    return Run(settings["id"])
