"""Propose the recipe of a fine-tuning: what trains, batch, learning rate, length and precision, each with its reason.

The values are the field's usual ones for the amount of data, within the memory of this machine. They are a start to be
edited, not the result of a search.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from clipdist import config
from clipdist.config import Config, load_config
from clipdist.errors import UserError
from clipdist.estimate.activations import meta_model
from clipdist.estimate.estimate import GB, make_estimate

Way = Literal["full", "lora", "projections"]
WAYS: tuple[Way, ...] = ("projections", "lora", "full")
FEW_IMAGES = 5000  # below, adapters alone
LARGE_ON_CPU = 30_000_000  # parameters whose backward pass takes a CPU core a tenth of a second an image, and more
MOST_PAIRS = {"projections": 512, "lora": 256, "full": 256}  # of a batch
LEAST_STEPS = 4  # of an epoch, as far as a batch of LEAST_PAIRS allows
LEAST_PAIRS = 8
LR = {"projections": 1e-4, "lora": 2e-4, "full": 1e-5}
EPOCHS = ((1000, 20), (10_000, 10), (100_000, 5))  # (images below, epochs)
MANY_EPOCHS = 2
MEMORY = 0.8  # of what is there
VALIDATIONS = 5


@dataclass(frozen=True)
class TuningData:
    """What is trained and measured on: consolidated indices, in numbers of samples.

    Attributes:
        labelled: the captions of an image say its class and no more.
    """

    train: Path
    held_out: Path
    images: int
    held_out_images: int
    labelled: bool


@dataclass(frozen=True)
class Setting:
    """A line of the recipe."""

    key: str
    value: Any
    reason: str

    @property
    def word(self) -> str:
        """As on a command line."""
        return f"{self.key}={json.dumps(self.value)}"


def propose(
    start: config.Model, loss: str, data: TuningData, run: Path, device: str, way: Way | None = None
) -> list[Setting]:
    """Return the settings of a recipe, in its order.

    Args:
        start: name and weights of the model that is fine-tuned.
        loss: infonce or sigmoid, as it was trained with.
        run: the run folder.
        device: cpu or cuda, as resolved.
        way: what trains; None: it is proposed.

    Raises:
        UserError: the model cannot be built, cannot be trained in this way, or fits no batch into memory.
    """
    parameters = sum(parameter.numel() for parameter in meta_model(Config(model=start))[0].parameters())
    settings = [
        *([Setting("device", "cpu", "there is no GPU, or --device says so")] if device == "cpu" else []),
        Setting("run.root", str(run.parent), "the folder of --out"),
        Setting("run.name", run.name, "--out"),
        *_data_settings(data),
        Setting("model.name", start.name, "--from"),
        Setting("model.weights", start.weights, "--from"),
        *([Setting("model.trust_weights", True, "--trust-weights")] if start.trust_weights else []),
    ]
    chosen, why = (way, "--train") if way else _choose_way(parameters, data.images, device)
    if chosen == "projections" and not way:
        try:
            _way_settings(settings, chosen, why)
        except UserError:  # CLIP's ResNets
            chosen, why = "lora", "the last layers of this model cannot be trained alone: adapters"
    if loss == "sigmoid":
        settings.append(Setting("objectives.clip", {"loss": loss}, "as the model was trained"))
    settings += _way_settings(settings, chosen, why)
    gpus = torch.cuda.device_count() if device == "cuda" else 1
    settings += _training_settings(chosen, data.images, device, gpus)
    return [*settings, *_micro_batch(settings, device)]


def recipe_text(title: str, settings: list[Setting]) -> str:
    """Return the recipe as YAML: a line for each setting, with its reason as a comment."""
    lines, section = [f"# {line}" for line in title.splitlines()], ""
    rows = []
    sections = list(dict.fromkeys(setting.key.partition(".")[0] for setting in settings))
    for setting in sorted(settings, key=lambda setting: sections.index(setting.key.partition(".")[0])):
        head, _, name = setting.key.rpartition(".")
        if head and head != section:
            rows.append((f"{head}:", ""))
            section = head
        rows.append((f"{'  ' if head else ''}{name}: {json.dumps(setting.value)}", setting.reason))
    width = min(60, max(len(text) for text, _ in rows))
    lines += [f"{text:{width}}  # {reason}" if reason else text for text, reason in rows]
    return "\n".join(lines) + "\n"


def config_of(settings: list[Setting]) -> Config:
    """Return the configuration that the recipe will be."""
    return load_config(None, [setting.word for setting in settings])


def _data_settings(data: TuningData) -> list[Setting]:
    train = Setting("data.train", [str(data.train)], f"{data.images} images, none of which is held out")
    if data.labelled:
        return [train, Setting("eval.labelled", str(data.held_out), f"{data.held_out_images} held-out images")]
    return [train, Setting("data.val", [str(data.held_out)], f"{data.held_out_images} held-out images")]


def _choose_way(parameters: int, images: int, device: str) -> tuple[Way, str]:
    size = f"{parameters / 1e6:.0f} M parameters"
    if device == "cpu" and parameters > LARGE_ON_CPU:
        return "projections", f"{size} on a CPU: what the towers give is computed once, their last layers are trained"
    if images >= FEW_IMAGES:
        return "full", f"{images} images, {FEW_IMAGES} or more: the whole model, at a low learning rate"
    if importlib.util.find_spec("peft") is None:
        return (
            "full",
            f"fewer than {FEW_IMAGES} images would suit LoRA, but peft is not installed: pip install '.[lora]'",
        )
    return "lora", f"{images} images, fewer than {FEW_IMAGES}: adapters alone, which forget less"


def _way_settings(before: list[Setting], way: Way, why: str) -> list[Setting]:
    """Return the settings of what trains.

    Raises:
        UserError: the model's projections cannot be trained alone.
    """
    if way == "full":
        return [Setting("model.lock_image", False, why)]
    if way == "lora":
        return [Setting("model.lora", {"rank": 8}, why)]
    locked = [Setting("model.lock_image", True, why), Setting("model.lock_text", True, "the same")]
    kept = [
        Setting("data.cache_features", True, "what locked layers give is computed once"),
        Setting("data.crop_scale_min", 1.0, "so images are taken whole"),
    ]
    refused = ""
    for groups in itertools.product((0, 1), repeat=2):
        names = ("model.image_unlocked_groups", "model.text_unlocked_layers")
        last = [Setting(key, 1, "its last group of layers") for key, group in zip(names, groups) if group]
        try:
            model, _ = meta_model(config_of([*before, *locked, *last, *kept]))
        except UserError as error:
            refused = refused or str(error)
            continue
        trained = {name.partition(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}
        if {"visual", "text"} <= trained:
            return [*locked, *last, *kept]
    raise UserError(f"the projections of this model cannot be trained alone ({refused}); take --train lora or full")


def _training_settings(way: Way, images: int, device: str, gpus: int) -> list[Setting]:
    most = min(MOST_PAIRS[way], images // LEAST_STEPS)
    batch = max(LEAST_PAIRS, 2 ** int(math.log2(max(1, most))))
    batch = min(images, batch) // gpus * gpus or gpus
    epochs = next((number for below, number in EPOCHS if images < below), MANY_EPOCHS)
    steps = images // batch * epochs
    every = max(1, steps // VALIDATIONS)
    limit = f"{LEAST_STEPS} steps an epoch or more, {MOST_PAIRS[way]} pairs at most"
    rates = {
        "projections": "last layers alone bear a higher one than whole towers",
        "lora": "usual for adapters",
        "full": "a fiftieth of training from scratch: a higher one loses what the model knows",
    }
    precision = "fp32: a CPU" if device == "cpu" else "bf16 where the GPU has it, else fp16"
    return [
        Setting("optim.lr", LR[way], rates[way]),
        Setting("optim.warmup_steps", max(1, steps // 10), "a tenth of the steps"),
        Setting("optim.weight_decay", 0.1, "usual for fine-tuning"),
        Setting("engine.zero_stage", 0 if gpus == 1 else 1, "one process" if gpus == 1 else "moments are divided"),
        Setting("train.global_batch", batch, limit),
        Setting("train.epochs", epochs, f"{steps} steps; fewer epochs the more images there are"),
        Setting("train.precision", "auto", precision),
        Setting("train.save_every", every, "as often as validation"),
        Setting("train.log_every", max(1, min(10, every)), "steps"),
        Setting("eval.every", every, f"{VALIDATIONS} times"),
        Setting("launch.cluster", "local", "this machine"),
        Setting("launch.gpus", gpus, "processes: its GPUs" if device == "cuda" else "one process"),
    ]


def _micro_batch(settings: list[Setting], device: str) -> list[Setting]:
    """Return the setting of the largest micro-batch that the plan fits into memory; none where the batch fits whole.

    Raises:
        UserError: none fits.
    """
    whole = make_estimate(config_of(settings))
    there = whole.limit if device == "cuda" else psutil.virtual_memory().available
    if there is None:
        return []
    batch = whole.config.train.global_batch // whole.world
    for micro in (batch // 2**halvings for halvings in range(batch.bit_length())):
        if batch % micro:
            break
        plan = make_estimate(config_of([*settings, Setting("train.micro_batch", micro, "")]), model=whole.model)
        try:
            needed = plan.total
        except UserError:  # too few pairs for BatchNorm
            break
        if needed <= MEMORY * there:
            reason = f"pairs of a forward pass: by the plan {needed / GB:.1f} GB of {there / GB:.1f}"
            return [Setting("train.micro_batch", micro, reason)] if micro < batch else []
    raise UserError(
        f"{whole.config.model.name} does not fit into memory: {there / GB:.1f} GB are there; less is needed by"
        " --train projections or lora"
    )
