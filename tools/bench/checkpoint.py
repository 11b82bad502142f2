"""Models in; out: what saving takes of the training loop, and what a start from a checkpoint costs.

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
import json
import platform
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from clipdist.config import Config, load_config
from clipdist.errors import UserError, run_main
from clipdist.monitor.provenance import commit, hardware

if TYPE_CHECKING:
    import torch

RECIPE = "configs/tiny.yaml"
MODELS = ("configs/models/vit_tiny_flickr8k.json", "ViT-B-32")
LIMIT_SHARE, LIMIT_S = 0.1, 0.05  # of a step; the larger one counts
EXAMPLES = """examples:
  python tools/bench/checkpoint.py
  python tools/bench/checkpoint.py --models ViT-B-32 --batch 16 --saves 5 --out bench.md
  python tools/bench/checkpoint.py --models RN50 engine.zero_stage=1 --json
"""


@dataclass
class Saves:
    """Seconds; `gone_s` is the time until the checkpoint was complete."""

    plain_s: list[float] = field(default_factory=list)  # steps without a writer
    beside_s: list[float] = field(default_factory=list)  # steps while one was at work, time in the saver left out
    in_loop_s: list[float] = field(default_factory=list)  # by save: save() and wait_copied()
    gone_s: list[float] = field(default_factory=list)


@dataclass
class Start:
    """Seconds of the parts of a start."""

    verify: float = 0.0
    model: float = 0.0
    weights: float = 0.0
    engine: float = 0.0
    restore: float = 0.0
    step: float = 0.0

    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass
class Result:
    model: str
    parameters: int
    checkpoint_bytes: int
    saves: Saves
    fresh: Start
    resumed: Start


def main() -> int:
    args = parse_args()
    config = load_config(args.config, [f"train.global_batch={args.batch}", *args.overrides])
    if args.batch < 1 or args.saves < 1 or args.steps < 1:
        raise UserError("--batch, --saves and --steps must be at least 1")
    with workspace(args.work):  # that it can be written is known before the long imports
        pass

    import_s = import_all()
    from clipdist.distributed.rank import joined_ranks, resolve_device

    with joined_ranks(resolve_device(config.device)) as dist_env:
        results = [measure(model, args, dist_env) for model in args.models]
    text = report(results, import_s, args, str(dist_env.device.type))
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps({"import_s": import_s, "models": [asdict(result) for result in results]}))
    return 0


def import_all() -> float:
    """Seconds of the imports, which every start has."""
    began = time.perf_counter()
    import deepspeed  # noqa: F401
    import open_clip  # noqa: F401

    return time.perf_counter() - began


def measure(model: str, args: argparse.Namespace, dist_env: Any) -> Result:
    """Steps and saves, then starts from the last checkpoint and fresh ones by turns: the quickest of either kind."""
    words = [f"train.global_batch={args.batch}", *args.overrides, f"model.name={model}"]
    config = load_config(args.config, words)
    with workspace(args.work) as run_dir:
        engine, spec, _ = start(config, dist_env, None)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.engine.module.parameters())
        say(f"{model}: {parameters / 1e6:.1f} M parameters")
        saves, folder = save_by_turns(engine, spec, config, args, run_dir)
        size = sum(path.stat().st_size for path in folder.iterdir())
        del engine  # two at one time need not fit
        starts: dict[Path | None, list[Start]] = {folder: [], None: []}
        for _ in range(args.starts):
            for source, times in starts.items():
                gc.collect()
                times.append(start(config, dist_env, source)[2])
    fresh, resumed = (min(starts[source], key=Start.total) for source in (None, folder))
    return Result(model, parameters, size, saves, fresh, resumed)


def start(config: Config, dist_env: Any, folder: Path | None) -> tuple[Any, Any, Start]:
    """Builds model and engine and takes one step: with new weights, or from a checkpoint. (engine, ModelSpec, times)"""
    import torch

    from clipdist.checkpoint.reader import CheckpointReader, load_full_weights
    from clipdist.checkpoint.saver import restore
    from clipdist.engine.step import Engine
    from clipdist.losses.make import make_loss
    from clipdist.models.dual_encoder import build_model
    from clipdist.models.spec import ModelSpec

    times = Start()
    torch.manual_seed(config.train.seed)
    reader = CheckpointReader(folder) if folder else None
    if reader:
        with timed(times, "verify"):
            reader.verify()
    with timed(times, "model"):
        restored = ModelSpec.from_dict(reader.manifest.state["model"]) if reader else None
        model = build_model(config.model, config.loss, restored=restored)
    if reader:
        with timed(times, "weights"):
            model.load_state_dict(load_full_weights(reader.folder))
    with timed(times, "engine"):
        engine = Engine(model.to(dist_env.device), make_loss(config.loss), config, dist_env)
    if reader:
        with timed(times, "restore"):
            restore(engine.engine, reader)
            engine.refresh_scalars()
    with timed(times, "step"):
        take_step(engine, model.spec, config, 0)
    return engine, model.spec, times


@contextmanager
def timed(times: Start, part: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    setattr(times, part, time.perf_counter() - began)


def take_step(engine: Any, spec: Any, config: Config, step: int) -> float:
    """One training step on drawn numbers. Returns its seconds."""
    import torch

    batch, device = config.train.global_batch, engine.dist_env.device
    image = torch.randint(0, 256, (batch, 3, spec.image_size, spec.image_size), dtype=torch.uint8, device=device)
    tokens = torch.randint(1, 1000, (batch, spec.context_length), device=device)
    valid = torch.ones(batch, dtype=torch.bool, device=device)
    synchronise(device)
    began = time.perf_counter()
    engine.train_step(image, tokens, valid, None, step=step, lr=1e-5)
    synchronise(device)
    return time.perf_counter() - began


def synchronise(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def save_by_turns(
    engine: Any, spec: Any, config: Config, args: argparse.Namespace, run_dir: Path
) -> tuple[Saves, Path]:
    """Steps without a writer, a save, steps until it is done, and again. Returns times and the last checkpoint."""
    from clipdist.checkpoint.format import Manifest, newest_checkpoint
    from clipdist.checkpoint.retention import RetentionPolicy
    from clipdist.checkpoint.saver import Saver, buffer_pieces, live_pieces, live_size

    saver = Saver(run_dir, RetentionPolicy(last=1), rank=0, attempt="bench", retry_s=0.0)
    engine.before_update = saver.wait_copied
    saver.prepare(*live_size(engine.engine))
    saves, step = Saves(), 0
    for _ in range(args.saves):
        for _ in range(args.steps):
            saves.plain_s.append(take_step(engine, spec, config, step))
            step += 1
        began = time.perf_counter()
        state = {"model": spec.to_dict()}
        live, copied = list(live_pieces(engine.engine)), list(buffer_pieces(engine.engine))
        saver.save(live, copied, Manifest(step, step, step * args.batch, 1, {}, {}, state))
        in_save_s = time.perf_counter() - began
        waited_before = saver.seconds_in_loop
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
        say(f"  saved: {saves.in_loop_s[-1] * 1e3:.1f} ms of the loop; a step {median(saves.plain_s) * 1e3:.0f} ms")
    folder = newest_checkpoint(run_dir)
    assert folder is not None
    return saves, folder


@contextmanager
def workspace(work: Path | None) -> Iterator[Path]:
    """A new folder for checkpoints, gone afterwards.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="bench-", dir=work))
    except OSError as error:
        raise UserError(f"--work {work}: cannot be written ({error.strerror}); choose another folder") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The report


def report(results: list[Result], import_s: float, args: argparse.Namespace, device: str) -> str:
    import torch

    lines = [
        f"# What a checkpoint costs, {device}",
        "",
        "Time that the loop spends on a save, beside a step without one; and the steps while the writer is at work.",
        "",
        "| model | checkpoint, MB | step, ms | in the loop: median, ms | largest, ms | largest / limit "
        "| steps beside the writer / others | complete after, s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *(save_row(result) for result in results),
        "",
        f"The limit is the larger one of {LIMIT_SHARE:.0%} of a step and {1e3 * LIMIT_S:.0f} ms. The first save"
        " counts like the others.",
        "",
        f"A start up to the end of the first step, seconds, the quickest of {args.starts} by turns; before it"
        f" {import_s:.1f} s of imports, alike for both.",
        "",
        "| model | start | checksums | model | weights | engine | moments | first step | in all "
        "| with imports, / fresh |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        *(row for result in results for row in start_rows(result, import_s)),
        "",
        f"- command: `{shlex.join(['python', 'tools/bench/checkpoint.py', *sys.argv[1:]])}`",
        f"- commit: {commit()}",
        f"- hardware: {hardware(device, torch.get_num_threads())}",
        f"- torch {torch.__version__}, Python {platform.python_version()}; batch {args.batch}, {args.saves} saves",
    ]
    return "\n".join(lines)


def save_row(result: Result) -> str:
    saves = result.saves
    step_s, worst_s = median(saves.plain_s), max(saves.in_loop_s)
    limit_s = max(LIMIT_SHARE * step_s, LIMIT_S)
    cells = [
        f"{result.checkpoint_bytes / 1e6:.0f}",
        f"{1e3 * step_s:.0f}",
        f"{1e3 * median(saves.in_loop_s):.1f}",
        f"{1e3 * worst_s:.1f}",
        f"{worst_s / limit_s:.2f}",
        f"{median(saves.beside_s) / step_s:.2f}",
        f"{median(saves.gone_s):.2f}",
    ]
    return f"| {named(result)} | {' | '.join(cells)} |"


def start_rows(result: Result, import_s: float) -> Iterator[str]:
    for name, times in (("fresh", result.fresh), ("resumed", result.resumed)):
        parts = " | ".join(f"{seconds:.2f}" for seconds in asdict(times).values())
        ratio = (import_s + times.total()) / (import_s + result.fresh.total())
        yield f"| {named(result)} | {name} | {parts} | {times.total():.2f} | {ratio:.2f} |"


def named(result: Result) -> str:
    return f"{Path(result.model).stem}, {result.parameters / 1e6:.1f} M"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What saving takes of the training loop, and what a start from a checkpoint costs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe")
    parser.add_argument("--config", default=RECIPE, help=f"recipe ({RECIPE})")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help=f"({' '.join(MODELS)})")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="pairs of a step (8)")
    parser.add_argument("--saves", type=int, default=4, metavar="N", help="checkpoints to save (4)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="steps without saving before each (3)")
    parser.add_argument("--starts", type=int, default=3, metavar="N", help="of either kind, by turns (3)")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="on the storage to be measured; default: temporary")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as markdown, too")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run_main(main)
