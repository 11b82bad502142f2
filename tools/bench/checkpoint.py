"""Measure what saving takes of the training loop, and what a start from a checkpoint costs.

One process trains on drawn numbers. Steps without saving and saves, with the steps that run beside the writer, take
turns, so that all are slowed alike by what else the machine does.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

from clipdist.config import Config, load_config
from clipdist.errors import run_main
from tools.bench import harness
from tools.bench.peak_memory import synchronize

RECIPE = "configs/tiny.yaml"
MODELS = ("configs/models/vit_tiny_flickr8k.json", "ViT-B-32")
PARTS = {  # of a start: title in the table
    "verify": "checksums",
    "model": "model",
    "weights": "weights",
    "engine": "engine",
    "restore": "moments",
    "step": "first step",
}
StartTimes = dict[str, float]  # seconds of each part
LIMIT_SHARE, LIMIT_S = 0.1, 0.05  # of a step; the larger one counts
EXAMPLES = """  python tools/bench/checkpoint.py
  python tools/bench/checkpoint.py --models ViT-B-32 --batch 16 --saves 5 --out bench.md
  python tools/bench/checkpoint.py --models RN50 engine.zero_stage=1 --json
  TMPDIR=/mnt/storage python tools/bench/checkpoint.py      # saves there
"""


@dataclass
class SaveTimes:
    """Seconds; `gone_s` is the time until the checkpoint was complete."""

    plain_s: list[float] = field(default_factory=list)  # steps without a writer
    beside_s: list[float] = field(default_factory=list)  # steps while one was at work, time in the saver left out
    in_loop_s: list[float] = field(default_factory=list)  # by save: save() and wait_copied()
    gone_s: list[float] = field(default_factory=list)


@dataclass
class CheckpointCosts:
    """What was measured of one model."""

    model: str
    parameters: int
    checkpoint_bytes: int
    saves: SaveTimes
    fresh: StartTimes
    resumed: StartTimes

    @property
    def title(self) -> str:
        return f"{Path(self.model).stem}, {self.parameters / 1e6:.1f} M"


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe")
    parser.add_argument("--config", default=RECIPE, help=f"recipe ({RECIPE})")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help=f"({' '.join(MODELS)})")
    parser.number("--batch", 8, "B", "pairs of a step")
    parser.number("--saves", 4, "N", "checkpoints to save")
    parser.number("--steps", 3, "N", "steps without saving before each")
    parser.number("--starts", 3, "N", "of either kind, by turns")
    return parser.parse()


def main() -> int:
    args = parse_args()
    config = load_config(args.config, [f"train.global_batch={args.batch}", *args.overrides])
    import_s, _ = harness.timed(import_all)
    from clipdist.distributed.rank import joined_ranks, resolve_device

    with joined_ranks(resolve_device(config.device)) as dist_env:
        results = [measure(model, args, dist_env) for model in args.models]
    text = report(results, import_s, args, str(dist_env.device.type))
    return harness.finish(args, text, {"import_s": import_s, "models": [asdict(result) for result in results]})


def import_all() -> None:
    """Import what every start imports."""
    import deepspeed  # noqa: F401
    import open_clip  # noqa: F401


def measure(model: str, args: argparse.Namespace, dist_env: Any) -> CheckpointCosts:
    """Take steps and saves, then start from the last checkpoint and afresh by turns: the quickest of either counts."""
    words = [f"train.global_batch={args.batch}", *args.overrides, f"model.name={model}"]
    config = load_config(args.config, words)
    with harness.workspace() as run_dir:
        engine, spec, _ = start(config, dist_env, None)
        parameters = sum(engine.zero.numel().values())
        harness.say(f"{model}: {parameters / 1e6:.1f} M parameters")
        saves, folder = save_by_turns(engine, spec, config, args, run_dir)
        size = sum(path.stat().st_size for path in folder.iterdir())
        del engine  # two at one time need not fit

        def times_of_start(source: Path | None) -> StartTimes:
            gc.collect()
            return start(config, dist_env, source)[2]

        sides = {"resumed": partial(times_of_start, folder), "fresh": partial(times_of_start, None)}
        starts = harness.take_turns(sides, args.starts)
    fresh, resumed = (min(starts[name], key=lambda times: sum(times.values())) for name in ("fresh", "resumed"))
    return CheckpointCosts(model, parameters, size, saves, fresh, resumed)


def start(config: Config, dist_env: Any, folder: Path | None) -> tuple[Any, Any, StartTimes]:
    """Build model and engine and take one step, with new weights or from a checkpoint. Return (engine, spec, times)."""
    import torch

    from clipdist.checkpoint.reader import CheckpointReader, load_full_weights
    from clipdist.engine.step import Engine
    from clipdist.models.build import build_model
    from clipdist.models.spec import ModelSpec
    from clipdist.objectives.make import make_objectives

    times = dict.fromkeys(PARTS, 0.0)
    torch.manual_seed(config.train.seed)
    reader = CheckpointReader(folder) if folder else None
    if reader:
        with timed_part(times, "verify"):
            reader.verify()
    with timed_part(times, "model"):
        restored = ModelSpec.from_dict(reader.manifest.state["model"]) if reader else None
        model = build_model(config.model, config.objectives.clip, restored=restored)
    if reader:
        with timed_part(times, "weights"):
            model.load_state_dict(load_full_weights(reader.folder))
    with timed_part(times, "engine"):
        engine = Engine(
            model.to(dist_env.device), make_objectives(config.objectives, model.spec.image_size), config, dist_env
        )
    if reader:
        with timed_part(times, "restore"):
            engine.zero.restore(reader)
            engine.refresh_scalars()
    with timed_part(times, "step"):
        take_step(engine, model.spec, config, 0)
    return engine, model.spec, times


@contextmanager
def timed_part(times: StartTimes, part: str) -> Iterator[None]:
    """Set a part of `times` to the seconds of the block."""
    began = time.perf_counter()
    yield
    times[part] = time.perf_counter() - began


def take_step(engine: Any, spec: Any, config: Config, step: int) -> float:
    """Take one training step on drawn numbers. Return its seconds."""
    import torch

    from clipdist.data.batch import pair_batch

    batch, device = config.train.global_batch, engine.dist_env.device
    image = torch.randint(0, 256, (batch, 3, spec.image_size, spec.image_size), dtype=torch.uint8, device=device)
    tokens = torch.randint(1, 1000, (batch, spec.context_length))
    drawn = pair_batch(
        image, tokens, torch.ones(batch, dtype=torch.bool, device=device), torch.arange(batch, device=device)
    )

    def step_and_wait() -> None:
        engine.train_step(drawn, step=step, lr=1e-5)
        synchronize(device.type)

    synchronize(device.type)
    return harness.timed(step_and_wait)[0]


def save_by_turns(
    engine: Any, spec: Any, config: Config, args: argparse.Namespace, run_dir: Path
) -> tuple[SaveTimes, Path]:
    """Take steps, save, take steps until the writer is done, and again. Return times and the last checkpoint."""
    from clipdist.checkpoint.format import Manifest, newest_checkpoint
    from clipdist.checkpoint.retention import RetentionPolicy
    from clipdist.checkpoint.saver import Saver

    saver = Saver(run_dir, RetentionPolicy(last=1), rank=0, attempt="bench", retry_s=0.0)
    engine.before_update = saver.wait_copied
    saver.prepare(*engine.zero.save_numel())
    saves, step = SaveTimes(), 0
    for _ in range(args.saves):
        for _ in range(args.steps):
            saves.plain_s.append(take_step(engine, spec, config, step))
            step += 1
        manifest = Manifest(step, step, step * args.batch, 1, {}, {}, {"model": spec.to_dict()})
        began = time.perf_counter()
        saver.save(list(engine.zero.live_pieces()), list(engine.zero.buffer_pieces()), manifest)
        in_save_s, waited_before = time.perf_counter() - began, saver.seconds_in_loop
        taken_s = take_step(engine, spec, config, step)
        waited_s = saver.seconds_in_loop - waited_before
        saves.beside_s.append(taken_s - waited_s)
        saves.in_loop_s.append(in_save_s + waited_s)
        step += 1
        while saver.busy:
            saves.beside_s.append(take_step(engine, spec, config, step))
            step += 1
        saver.wait()
        saves.gone_s.append(time.perf_counter() - began)
        harness.say(
            f"  saved: {saves.in_loop_s[-1] * 1e3:.1f} ms of the loop; a step {median(saves.plain_s) * 1e3:.0f} ms"
        )
    folder = newest_checkpoint(run_dir)
    assert folder is not None
    return saves, folder


def report(results: list[CheckpointCosts], import_s: float, args: argparse.Namespace, device: str) -> list[str]:
    import torch

    saving = ["checkpoint, MB", "step, ms", "in the loop: median, ms", "largest, ms", "largest / limit"]
    return [
        f"# What a checkpoint costs, {device}",
        "",
        "Time that the loop spends on a save, beside a step without one; and the steps while the writer is at work.",
        "",
        *harness.markdown_table(
            ["model", *saving, "steps beside the writer / others", "complete after, s"],
            [save_row(result) for result in results],
        ),
        "",
        f"The limit is the larger one of {LIMIT_SHARE:.0%} of a step and {1e3 * LIMIT_S:.0f} ms. The first save"
        " counts like the others.",
        "",
        f"A start up to the end of the first step, seconds, the quickest of {args.starts} by turns; before it"
        f" {import_s:.1f} s of imports, alike for both.",
        "",
        *harness.markdown_table(
            ["model", "start", *PARTS.values(), "in all", "with imports, / fresh"],
            [row for result in results for row in start_rows(result, import_s)],
            left=2,
        ),
        "",
        *harness.provenance(device, torch.get_num_threads(), "deepspeed"),
        f"- batch {args.batch}, {args.saves} saves",
    ]


def save_row(result: CheckpointCosts) -> list[str]:
    saves = result.saves
    step_s, worst_s = median(saves.plain_s), max(saves.in_loop_s)
    limit_s = max(LIMIT_SHARE * step_s, LIMIT_S)
    return [
        result.title,
        f"{result.checkpoint_bytes / 1e6:.0f}",
        f"{1e3 * step_s:.0f}",
        f"{1e3 * median(saves.in_loop_s):.1f}",
        f"{1e3 * worst_s:.1f}",
        f"{worst_s / limit_s:.2f}",
        f"{median(saves.beside_s) / step_s:.2f}",
        f"{median(saves.gone_s):.2f}",
    ]


def start_rows(result: CheckpointCosts, import_s: float) -> Iterator[list[str]]:
    for name, times in (("fresh", result.fresh), ("resumed", result.resumed)):
        parts = [f"{seconds:.2f}" for seconds in times.values()]
        total = sum(times.values())
        ratio = (import_s + total) / (import_s + sum(result.fresh.values()))
        yield [result.title, name, *parts, f"{total:.2f}", f"{ratio:.2f}"]


if __name__ == "__main__":
    run_main(main)
