"""Measure what is saved by running texts as long as they are, instead of padded to the model's context.

Forward and backward pass of the text tower alone, and whole training steps, on pairs of a recipe's training data; the
two ways in turn, in one process. Reading and decoding images is left out. Times are of the processor, all threads
together: other programs on the machine change them less than they change what a clock shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clipdist.config import Config, load_config
from clipdist.errors import UserError, run_main
from tools.bench import harness

DEFAULT_RECIPE = "configs/flickr8k_vit_tiny.yaml"
PADDED, SHORT = "padded", "as long as they are"
EXAMPLES = """  python tools/bench/text.py data.train=data/flickr8k/train train.global_batch=128
  python tools/bench/text.py model.name=ViT-B-32 data.train=data/flickr8k/train train.global_batch=32 --rounds 3
  python tools/bench/text.py --config configs/demo.yaml --out text.md --json

A step trains train.micro_batch pairs, or train.global_batch without micro-batches, in fp32 on a CPU."""


@dataclass(frozen=True)
class TextTimes:
    """Processor seconds of each way by round, by what was measured; the texts' tokens, and what the tower gets."""

    seconds: dict[str, dict[str, list[float]]]
    mean: float
    longest: int
    shape: tuple[int, ...]

    def ratios(self, part: str) -> list[float]:
        return harness.ratios(self.seconds[part][SHORT], self.seconds[part][PADDED])


def main() -> int:
    args = parse_args()
    config = load_config(args.config, args.overrides)
    if not config.data.train:
        raise UserError("data.train: name shards with captions")
    times = measure(config, args)
    ratio = {part: statistics.median(times.ratios(part)) for part in times.seconds}
    return harness.finish(args, report(config, times), {"ratio": ratio, "mean_tokens": times.mean})


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe")
    parser.add_argument("--config", default=DEFAULT_RECIPE, help=f"recipe ({DEFAULT_RECIPE})")
    parser.number("--rounds", 5, "R", "timed runs of each way")
    return parser.parse()


def measure(config: Config, args: argparse.Namespace) -> TextTimes:
    import torch

    from clipdist.data.catalog import Catalog, fetcher_of
    from clipdist.data.members import members_of
    from clipdist.distributed.rank import joined_ranks
    from clipdist.engine.step import Engine
    from clipdist.evals.audit import ShardBatches
    from clipdist.models.build import build_model
    from clipdist.models.text_length import encode, text_lengths
    from clipdist.objectives.make import make_objectives

    catalog = Catalog.open(config.data.train, "data.train", fetcher_of(config.data), members_of(config.data))
    if len(catalog) < config.train.global_batch:
        raise UserError(f"train.global_batch={config.train.global_batch}: data.train holds {len(catalog)} samples")
    with joined_ranks("cpu") as dist_env:
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, config.clip)
        if model.text is None or model.text_kind == "whole":
            raise UserError(f"model.name={config.model.name}: its text tower reads the padding")
        source = ShardBatches(config, model.spec, dist_env, catalog)
        batch = source.batch(0).rows(0, config.train.micro_batch or config.train.global_batch)
        source.close()
        tokens = batch.tokens.flatten(0, -2)  # of several captions of an image, too
        lengths = text_lengths(model.text, tokens)
        shapes: list[tuple[int, ...]] = []
        hook = model.text.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
        with torch.no_grad():
            features = encode(model.text, model.text_kind, tokens, dist_env.device)
        hook.remove()
        gradient = torch.randn_like(features)

        def tower() -> None:
            model.encode_text(tokens).backward(gradient)

        seconds = {"text tower": in_turn(model, tower, args.rounds)}
        model.zero_grad()
        engine = Engine(model, make_objectives(config.objectives, model.spec.image_size), config, dist_env)
        seconds["training step"] = in_turn(
            model, lambda: engine.train_step(batch, step=0, lr=config.optim.lr), args.rounds
        )
        engine.close()
    return TextTimes(seconds, float(lengths.float().mean()), int(lengths.max()), shapes[0])


def in_turn(model: Any, run: Callable[[], object], rounds: int) -> dict[str, list[float]]:
    """Return the processor seconds of `run` by round, with padded texts and without the padding."""
    kind = model.text_kind

    def timed_as(kind: str) -> float:
        model.text_kind = kind
        began = time.process_time()
        run()
        return time.process_time() - began

    try:
        return harness.take_turns({PADDED: lambda: timed_as("whole"), SHORT: lambda: timed_as(kind)}, rounds, warmup=1)
    finally:
        model.text_kind = kind


def report(config: Config, times: TextTimes) -> list[str]:
    """Return Markdown: a table, then what it was measured with."""
    rows = []
    for part, seconds in times.seconds.items():
        medians = [f"{1000 * statistics.median(seconds[way]):.0f} ms" for way in (PADDED, SHORT)]
        rows.append([part, *medians, *harness.spread(times.ratios(part), ".3f")])
    from clipdist.models.spec import resolve_spec

    pairs = config.train.micro_batch or config.train.global_batch
    context = resolve_spec(config.model).context_length
    return [
        f"# {config.model.name}: texts as long as they are, beside padded ones",
        "",
        *harness.markdown_table(["", PADDED, SHORT, "ratio, least", "median", "largest"], rows),
        "",
        f"{pairs} pairs, {context} tokens of context; texts have {times.mean:.1f} tokens on average and at most"
        f" {times.longest}; the tower gets {' x '.join(map(str, times.shape))} tokens instead of {pairs} x {context}.",
        "",
        *harness.provenance("cpu", 1, "open_clip_torch"),
    ]


if __name__ == "__main__":
    run_main(main)
