"""Send a run's numbers, settings and images to Weights & Biases, MLflow or trackio, where run.logger asks for it.

Each keeps its run under an id that lies in the run folder, so that a resumed run goes on in the same one. Addresses,
keys and projects are taken from the environment, as the packages document: WANDB_MODE, WANDB_PROJECT,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, TRACKIO_DIR, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL ...
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from clipdist.config import Config, flat
from clipdist.errors import UserError, brief
from clipdist.monitor.provenance import without_secrets
from clipdist.storage import write_text

if TYPE_CHECKING:
    from PIL import Image

IDS = "loggers.json"  # in the run folder: {logger: the id of its run}
CLOSE_S = 60.0  # at most that long a run waits at its end for what is still to be sent
MLFLOW_PARAMS, MLFLOW_LETTERS = 100, 6000  # most parameters of a call, and letters of one
PROJECT = "clipdist"  # where the environment names none


class Logger(Protocol):
    """A logger that has begun a run, or gone on with it."""

    id: str

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers by name ("train/loss") at a step."""

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Record an image."""

    def close(self, ended_well: bool) -> None:
        """Send what is left."""


class WandbLogger:
    """A run of Weights & Biases. Steps are a value of their own: wandb's own may not go back, as after a resume."""

    def __init__(self, config: Config, known: str | None) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=config.run.name,
            id=known or uuid.uuid4().hex[:8],
            resume="allow",
            dir=str(config.run.dir),
            config=_settings(config),
        )
        self.id = self._run.id
        self._run.define_metric("*", step_metric="step")

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def image(self, name: str, image: Image.Image, step: int) -> None:
        self._run.log({name: self._wandb.Image(image), "step": step})

    def close(self, ended_well: bool) -> None:
        self._run.finish(exit_code=0 if ended_well else 1)


class MlflowLogger:
    """A run of MLflow. Numbers are sent in a thread of its own: a server that is away holds up no step.

    By the client, which names the run in every call: the functions of the package know one run per thread.
    """

    def __init__(self, config: Config, known: str | None) -> None:
        import mlflow
        from mlflow import entities

        self._client, self._entities = mlflow.MlflowClient(), entities
        if known:
            self._client.update_run(known, status="RUNNING")
            self.id = known
            return
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self.id = self._client.create_run(experiment.experiment_id, run_name=config.run.name).info.run_id
        params = [entities.Param(name, str(value)[:MLFLOW_LETTERS]) for name, value in _settings(config).items()]
        for first in range(0, len(params), MLFLOW_PARAMS):  # final: a resumed run cannot change them
            self._client.log_batch(self.id, params=params[first : first + MLFLOW_PARAMS])

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics, synchronous=False)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        self._client.log_image(self.id, image, key=name, step=step, synchronous=False)

    def close(self, ended_well: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if ended_well else "KILLED")


class TrackioLogger:
    """A run of trackio: in a database of this machine, which is sent on where a space or a server is named.

    trackio goes on with a run by its name, and takes the newest of that name: so the name ends in an id. It has no
    word for how a run ended, and only warns of what cannot be sent.
    """

    def __init__(self, config: Config, known: str | None) -> None:
        import trackio

        self._trackio = trackio
        self.id = known or f"{config.run.name}-{uuid.uuid4().hex[:8]}"
        self._run = trackio.init(PROJECT, self.id, config=_settings(config), resume="allow", embed=False)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        self._run.log({name: self._trackio.Image(image)}, step=step)

    def close(self, ended_well: bool) -> None:
        self._run.finish()


LOGGERS: dict[str, Callable[[Config, str | None], Logger]] = {
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
    "trackio": TrackioLogger,
}


class Loggers:
    """The loggers of a run. One that fails while a run goes on is left out from then on, with one line on stderr.

    Raises:
        UserError: one cannot begin the run, such as for want of a key. One that has begun it before, as a resumed run
            finds, is left out instead.
    """

    def __init__(self, config: Config) -> None:
        self._open: dict[str, Logger] = {}
        self._ended_well = False
        path = config.run.dir / IDS
        known = _read_ids(path)
        for name in config.run.logger:
            try:
                self._open[name] = LOGGERS[name](config, known.get(name))
            except Exception as error:  # the packages raise many kinds
                if name not in known:
                    offline = "; without a network: WANDB_MODE=offline" if name == "wandb" else ""
                    raise UserError(f"run.logger={name}: cannot begin: {brief(error)}{offline}") from None
                self._leave_out(name, error)
        ids = known | {name: logger.id for name, logger in self._open.items()}
        if ids != known:
            with suppress(OSError):
                write_text(path, json.dumps(ids) + "\n")

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._each(lambda logger: logger.numbers(values, step))

    def image(self, name: str, image: Image.Image, step: int) -> None:
        self._each(lambda logger: logger.image(name, image, step))

    def ended_well(self) -> None:
        """Note that the run finished; `close` tells the loggers."""
        self._ended_well = True

    def close(self) -> None:
        """Send what is left, for at most CLOSE_S."""
        closing = threading.Thread(
            target=self._each, args=(lambda logger: logger.close(self._ended_well),), daemon=True
        )
        closing.start()
        closing.join(CLOSE_S)
        self._open = {}

    def _each(self, use: Callable[[Logger], None]) -> None:
        for name, logger in list(self._open.items()):
            try:
                use(logger)
            except Exception as error:
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        with suppress(OSError):
            line = f"note: run.logger={name}: {brief(error)}; training goes on without it until the next start"
            print(line, file=sys.stderr, flush=True)


def _settings(config: Config) -> dict[str, Any]:
    """Return all settings by their dotted names, addresses without their secrets: they leave this machine."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(entry) for entry in value]
        return without_secrets(value) if isinstance(value, str) else value

    return {name: plain(value) for name, value in flat(config).items()}


def _read_ids(path: Path) -> dict[str, Any]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return ids if isinstance(ids, dict) else {}
