"""Run open_clip_train's data pipeline, as it is: for its batches, or for the time of each of its stages.

Its get_wds_dataset runs with open_clip's own transform and tokenizer. What is done around it, and why:

- webdataset: open_clip_train is older than the newest ones; it can be given one of its own time, from a cache folder.
  Without that, tools.bench.peers.trainer makes it run with the installed one.
- the list of shards is repeated: at the end of each pass a worker throws away its last, partial batch, which in a
  small data set would be a good part of its work.
- the buffer in which samples are shuffled does not grow beyond the 1000 to which it is filled before the first batch:
  while it grows, two samples are read for every one that is given.

The last two favour open_clip_train.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from clipdist.errors import UserError
from tools.bench.peers.trainer import import_peer

CONTEXT_LENGTH_OF = "ViT-B-32"  # CLIP's own tokenizer, 77 ids
PASSES_PER_BATCH = 500  # batches at least between two that are thrown away
CROP_SCALE = 0.9  # share of an image's area that is kept at least
ENDLESS = 1 << 40  # samples of an "epoch"
STAGE_SAMPLES = 128
STAGES = ("read", "decode", "resize", "tokens", "other")
_REPEATS = 3
_INSTALL_S = 120


@dataclass(frozen=True)
class InstalledWebdataset:
    """Which webdataset open_clip_train shall use.

    Attributes:
        folder: to be put first on sys.path; None: the installed one.
        said: the version, and why it is not the one asked for, where it is not.
    """

    folder: Path | None
    said: str


@dataclass(frozen=True)
class LoadingJob:
    """What both data pipelines are made from.

    Attributes:
        shards: tars, all of them local.
        samples: in the shards.
        output: side of the square images, pixels.
        dct: clipdist decodes JPEGs at reduced scale.
        threads: clipdist's for decoding.
        seconds: length of a window.
        webdataset: open_clip_train's, a folder; None: the installed one.
        workers: open_clip_train's processes.
    """

    shards: tuple[str, ...]
    samples: int
    output: int
    dct: bool
    threads: int
    batch: int
    seconds: float
    webdataset: Path | None
    workers: int = 1


def get_webdataset(wanted: str) -> InstalledWebdataset:
    """Install webdataset `wanted` into ~/.cache/clipdist/peers, once; where pip cannot, the installed one is to do.

    Raises:
        UserError: `wanted` is no version.
    """
    if not re.fullmatch(r"\d+(\.\d+)*", wanted):
        raise UserError(f"--peer-webdataset {wanted}: must be a version, such as 0.2.86")
    if wanted == version("webdataset"):
        return InstalledWebdataset(None, f"{wanted}, as installed")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipdist/peers"
    folder = cache / f"webdataset-{wanted}"
    if not folder.is_dir():
        reason = _install(f"webdataset=={wanted}", folder)
        if reason:
            said = f"{version('webdataset')} with eof_value=None ({wanted} could not be installed: {reason})"
            return InstalledWebdataset(None, said)
    return InstalledWebdataset(folder, wanted)


def _install(requirement: str, folder: Path) -> str:
    """Install it. Return "", or why it did not work."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    words = ["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(partial), requirement]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, timeout=_INSTALL_S)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        os.replace(partial, folder)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ""


def batches(job: LoadingJob) -> Iterator[tuple[Any, Any]]:
    """Yield open_clip_train's training batches, for ever: float32 [b, 3, size, size], normalised, and int64 [b, 77].

    To be called once in a process, which has not imported webdataset before.
    """
    multiprocessing.set_start_method("fork", force=True)  # its pipeline cannot be pickled for other ways to start
    # More workers than cores may be faster here: a worker waits while it hands over a batch.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    data = _import(job.webdataset)
    vars(data)["_SAMPLE_SHUFFLE_SIZE"] = data._SAMPLE_SHUFFLE_INITIAL
    per_pass = PASSES_PER_BATCH * job.batch * job.workers
    arguments = Namespace(
        train_data="::".join(job.shards * -(-per_pass // job.samples)),
        train_num_samples=ENDLESS,
        train_data_upsampling_factors=None,
        batch_size=job.batch,
        workers=job.workers,
        world_size=1,
        seed=0,
    )
    transform, tokenizer = _transform(job), _tokenizer()
    return iter(data.get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer).dataloader)


class OpenClipStages:
    """What each stage of open_clip_train computes for, on one thread."""

    def __init__(self, job: LoadingJob) -> None:
        self.job = job

    def seconds(self) -> dict[str, float]:
        """Return seconds per sample, by stage, as medians.

        "resize" is all of the transform (crop, resize, to float, normalise), "other" is stacking a batch's samples.
        """
        import torch

        torch.set_num_threads(1)
        data, transform, tokenizer = _import(self.job.webdataset), _transform(self.job), _tokenizer()
        wds = data.wds
        urls = [{"url": url} for url in self.job.shards]
        stages: dict[str, Callable[[Iterable[Any]], Iterable[Any]]] = {
            "read": lambda _: islice(data.tarfile_to_samples_nothrow(iter(urls)), STAGE_SAMPLES),
            "decode": lambda read: wds.decode("pilrgb")(iter(read)),
            "resize": lambda decoded: [(transform(sample["jpg"]), sample["txt"]) for sample in decoded],
            "tokens": lambda pairs: [(image, tokenizer(text)[0]) for image, text in pairs],
            "other": lambda pairs: wds.batched(STAGE_SAMPLES, partial=True)(iter(pairs)),
        }
        assert tuple(stages) == STAGES
        seconds = {}
        taken: list[Any] = []
        for name, stage in stages.items():
            given, times = taken, []
            for _ in range(_REPEATS):
                fresh = [dict(sample) for sample in given] if name == "decode" else given  # it writes into the sample
                began = time.thread_time()
                taken = list(stage(fresh))
                times.append(time.thread_time() - began)
            seconds[name] = sorted(times)[_REPEATS // 2] / STAGE_SAMPLES
        return seconds


def _import(webdataset: Path | None) -> ModuleType:
    """Import open_clip_train.data."""
    if webdataset and str(webdataset) not in sys.path:
        assert "webdataset" not in sys.modules
        sys.path.insert(0, str(webdataset))
    import_peer()
    return importlib.import_module("open_clip_train.data")


def _transform(job: LoadingJob) -> Callable[[Any], Any]:
    from open_clip.transform import AugmentationCfg, image_transform

    augmentation = AugmentationCfg(scale=(CROP_SCALE, 1.0))
    return image_transform(job.output, is_train=True, aug_cfg=augmentation)


def _tokenizer() -> Callable[[str], Any]:
    import open_clip

    return open_clip.get_tokenizer(CONTEXT_LENGTH_OF)
