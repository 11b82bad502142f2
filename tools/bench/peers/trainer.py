"""Run open_clip_train as a clipdist configuration says, for a fair comparison.

open_clip_train runs as its own main(): its model, data pipeline, transforms, optimiser, schedule, loss and loop. What
is done around it, and why:

- pandas: its data module imports it for CSV files alone, and installing open_clip_torch does not bring it. An empty
  stand-in lets the import pass.
- tar_file_expander: from webdataset 0.2.96 on, it marks the end of a shard by an empty dict unless told otherwise, and
  open_clip_train's grouping fails on that mark with KeyError 'fname'. It is told otherwise.
- DistributedDataParallel: its main names the device, which torch refuses for a CPU; there the name is left out.
- a vocabulary below CLIP's: its model JSON names clipdist's merges as the tokenizer's, so that ids stay in range.
- a log handler notes when its own progress lines come: they round the time of a step to a millisecond, and give the
  rate of one step alone.
- for losses only: get_data is answered with clipdist's batches, and create_loss keeps each value that the loss returns,
  because the log rounds to five digits and tells rank 0's share only.

And around clipdist, for losses only: positions decay as they do in open_clip; clipdist leaves them out.

    python -m tools.bench.peers.trainer theirs REPORT MODEL_JSON|- BATCHES|- [open_clip_train's arguments ...]
    python -m tools.bench.peers.trainer ours [clipdist/train.py's arguments ...]
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from clipdist.config import Config, load_config
from clipdist.errors import UserError, run_main

PRECISIONS = {"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp"}  # ours -> theirs
_PROGRESS = re.compile(r"Train Epoch: \d+ \[\s*(\d+)/")  # samples so far


@dataclass(frozen=True)
class StartWeights:
    """Weights from which both sides begin, in open_clip's form.

    Attributes:
        name: open_clip's name of the model; model_json is to be registered first unless it is None.
        mean, std: of the channels.
    """

    weights: Path
    name: str
    model_json: Path | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class TrainingJob:
    """What is common to all runs of one benchmark."""

    config: Config
    words: list[str]  # --config and the overrides, for clipdist's training command
    shards: list[Path]
    images: int  # in the shards
    start: StartWeights
    folder: Path
    ranks: int
    steps: int  # timed
    warmup: int  # steps before
    device: str  # cpu or cuda
    precision: str  # fp32, bf16 or fp16
    compiled: bool = False  # open_clip_train's model goes through torch.compile

    @property
    def batch(self) -> int:
        return self.config.train.global_batch


def check_comparable(config: Config) -> None:
    """Raise a UserError for a recipe that open_clip_train cannot follow, or where it cannot be imported at all."""
    model, clip = config.model, config.clip
    if clip.loss != "infonce" or clip.label_smoothing:
        raise UserError("objectives.clip: the comparison is of objectives.clip.loss=infonce without label_smoothing")
    if model.lock_image or model.lock_text:
        raise UserError("model.lock_image, model.lock_text: the comparison trains both towers; leave the locks out")
    if config.optim.min_lr:
        raise UserError(f"optim.min_lr={config.optim.min_lr}: open_clip_train's cosine ends at 0; set optim.min_lr=0")
    import_peer()


def make_start(config: Config, folder: Path) -> StartWeights:
    """Draw (or load) the weights of config.model and write them to `folder` for both sides.

    Raises:
        UserError: a model that open_clip does not have (CBOW, LSTM), or that cannot be built.
    """
    import torch

    from clipdist.models.build import build_model
    from clipdist.models.export import export_model

    torch.manual_seed(config.train.seed)
    model = build_model(config.model, config.clip).eval()
    export = export_model(model, folder / "bench_start.safetensors")
    if export.config and export.merges:
        described = json.loads(export.config.read_text(encoding="utf-8"))
        described["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": str(export.merges)}
        export.config.write_text(json.dumps(described), encoding="utf-8")
    return StartWeights(export.file, export.name, export.config, model.spec.image_mean, model.spec.image_std)


def flags(
    job: TrainingJob, config: Config, *, steps: int, workers: int, precision: str, log_every: int, logs: Path
) -> list[str]:
    """Return open_clip_train's arguments for the run that `config` describes, in its exact mode.

    Args:
        workers: data loading processes per rank.
        logs: folder for its log and its checkpoint.
    """
    optim, train = config.optim, config.train
    share = train.global_batch // job.ranks
    micro = train.micro_batch or share
    settings: dict[str, Any] = {
        "model": job.start.name,
        "pretrained": job.start.weights,
        "dataset-type": "webdataset",
        "train-data": "::".join(map(str, job.shards)),
        "train-num-samples": steps * train.global_batch,
        "batch-size": micro,
        "accum-freq": share // micro,
        "workers": workers,
        "epochs": 1,
        "lr": optim.lr,
        "beta1": optim.beta1,
        "beta2": optim.beta2,
        "eps": optim.eps,
        "wd": optim.weight_decay,
        "warmup": optim.warmup_steps,
        "aug-cfg": f"scale=({config.data.crop_scale_min},1.0)",
        "precision": PRECISIONS[precision],
        "device": job.device,
        "seed": train.seed,
        "log-every-n-steps": log_every,
        "save-frequency": 0,  # the last step saves nevertheless, as clipdist does
        "logs": logs.parent,
        "name": logs.name,
    }
    if optim.grad_clip:
        settings["grad-clip-norm"] = optim.grad_clip
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    words += ["--image-mean", *map(str, job.start.mean), "--image-std", *map(str, job.start.std)]
    words += ["--local-loss", "--gather-with-grad"]
    if config.engine.activation_checkpointing:
        words.append("--grad-checkpointing")
    if job.compiled:
        words.append("--torchcompile")
    return words


def import_peer() -> ModuleType:
    """Import open_clip_train.main, made to run with the webdataset that is installed.

    Raises:
        UserError: it cannot be imported.
    """
    if importlib.util.find_spec("open_clip_train") is None:
        raise UserError("open_clip_train is not installed; pip install open_clip_torch==3.3.0")
    try:
        import open_clip  # noqa: F401  before the stand-in: nothing else may take it for pandas
        import webdataset  # noqa: F401

        with _pandas_stand_in():
            data = importlib.import_module("open_clip_train.data")
        main = importlib.import_module("open_clip_train.main")
    except ImportError as error:
        raise UserError(f"open_clip_train cannot be imported ({error}); pip install open_clip_torch==3.3.0") from None
    expander = data.tar_file_expander
    if "eof_value" in inspect.signature(expander).parameters and not isinstance(expander, partial):
        vars(data)["tar_file_expander"] = partial(expander, eof_value=None)
    return main


@contextmanager
def _pandas_stand_in() -> Iterator[None]:
    try:
        importlib.import_module("pandas")
    except ImportError:
        sys.modules["pandas"] = ModuleType("pandas")
        try:
            yield
        finally:
            del sys.modules["pandas"]
    else:
        yield


def run_theirs(report: Path, model_json: Path | None, batches: Path | None, words: list[str]) -> int:
    """Run one rank of open_clip_train. Write {"times", "losses", "peak_bytes"} to REPORT with the rank in its name.

    Args:
        model_json: to register first.
        batches: a recipe of clipdist whose batches to train on, with all values of the loss kept; None: its own data.
    """
    import open_clip
    import torch
    import torch.distributed as dist

    peer = import_peer()
    if model_json:
        open_clip.add_model_config(model_json)
    if not torch.cuda.is_available():
        parallel = torch.nn.parallel.DistributedDataParallel
        vars(torch.nn.parallel)["DistributedDataParallel"] = lambda model, device_ids, **kw: parallel(model, **kw)
    losses: list[torch.Tensor] = []
    if batches:
        fed = load_config(batches)
        vars(peer)["get_data"] = lambda *_, **__: {"train": _FedBatches(fed)}
        vars(peer)["create_loss"] = _keeping(peer.create_loss, losses)
    watch = _ProgressTimes()
    logging.root.addHandler(watch)
    if peer.main(words):
        raise UserError(f"open_clip_train refused its arguments; see {report.parent}")
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    content = {"times": watch.times, "losses": [float(loss) for loss in losses], "peak_bytes": peak}
    rank_report(report, int(os.environ["RANK"])).write_text(json.dumps(content), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def rank_report(report: Path, rank: int) -> Path:
    return report.with_name(f"{report.stem}-{rank}{report.suffix}")


class _ProgressTimes(logging.Handler):
    """Keep (samples so far, seconds) of each progress line."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[tuple[int, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = _PROGRESS.match(record.getMessage())
        if found:
            self.times.append((int(found[1]), record.created))


class _FedBatches:
    """clipdist's batches in the form that open_clip_train's loop takes: float pixels, normalised, and token ids.

    Args:
        config: of the run that is to be followed; train.steps batches are given.
    """

    def __init__(self, config: Config) -> None:
        from clipdist.data.loader import open_loader
        from clipdist.data.tokens import make_tokenizer
        from clipdist.data.views import image_view
        from clipdist.models.spec import resolve_spec
        from clipdist.resume import plan_start

        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        plan, self._spec = plan_start(config, world), resolve_spec(config.model)
        self._loader = open_loader(
            plan.catalog,
            plan.order,
            make_tokenizer(self._spec),
            config.data,
            views=[image_view(config.data, self._spec.image_size, self._spec.transform)],
            rank=rank,
            world=world,
        )
        self.dataloader = self  # what open_clip_train calls data["train"], and data["train"].dataloader
        self.num_batches = plan.steps
        self.num_samples = plan.steps * config.train.global_batch

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        import torch

        from clipdist.data.batch import IMAGE, MODALITIES

        mean, std = (torch.tensor(s).view(1, 3, 1, 1) for s in (self._spec.image_mean, self._spec.image_std))
        for _ in range(self.num_batches):
            batch = self._loader.next()
            if not bool(batch.valid_in(MODALITIES).all()):
                raise UserError("the shards hold samples that cannot be used, which open_clip's loss has no mask for")
            yield (batch.images[IMAGE].float() / 255 - mean) / std, batch.tokens
        self._loader.close()


def _keeping(create_loss: Callable[..., Any], kept: list[Any]) -> Callable[..., Any]:
    """Wrap create_loss so that the values of the loss are kept."""

    def create(args: Any) -> Callable[..., dict[str, Any]]:
        loss = create_loss(args)

        def call(**outputs: Any) -> dict[str, Any]:
            parts = loss(**outputs)
            kept.append(sum(part.detach() for part in parts.values()))
            return parts

        return call

    return create


def run_ours(words: list[str]) -> int:
    """Run clipdist's training command with the parameters that decay in open_clip: all that are not vectors."""
    from clipdist import train
    from clipdist.engine import optim

    assert optim.NO_DECAY
    vars(optim)["NO_DECAY"] = ()
    return train.main(words)


def main() -> int:
    side, *words = sys.argv[1:]
    if side == "ours":
        return run_ours(words)
    report, model_json, batches = (None if word == "-" else Path(word) for word in words[:3])
    assert report is not None
    return run_theirs(report, model_json, batches, words[3:])


if __name__ == "__main__":
    run_main(main)
