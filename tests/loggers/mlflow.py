"""Stands in for mlflow, as wandb.py beside it for wandb."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

from wandb import _note


class entities:  # noqa: N801
    class Metric(NamedTuple):
        key: str
        value: float
        timestamp: int
        step: int

    class Param(NamedTuple):
        key: str
        value: str


def set_experiment(name):
    _note("mlflow.set_experiment", name=name)
    return SimpleNamespace(experiment_id="7")


class MlflowClient:
    def create_run(self, experiment_id, run_name):
        _note("mlflow.create_run", experiment_id=experiment_id, run_name=run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id="made-by-mlflow"))

    def update_run(self, run_id, status):
        _note("mlflow.update_run", run_id=run_id, status=status)

    def log_batch(self, run_id, metrics=(), params=(), synchronous=None):
        assert len(params) <= 100
        if metrics:
            _note("mlflow.metrics", values={metric.key: metric.value for metric in metrics}, step=metrics[0].step)
        if params:
            _note("mlflow.params", values=dict(params))

    def log_image(self, run_id, image, key, step, synchronous):
        _note("mlflow.image", key=key, step=step)

    def set_terminated(self, run_id, status):
        _note("mlflow.set_terminated", run_id=run_id, status=status)
