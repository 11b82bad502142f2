"""Measure what engine.compile saves: training steps with compiled blocks beside the same steps without, in turn.

One process, one engine. Images are noise and texts have 8 to 20 tokens; reading data is left out. Times are of the
processor, all threads together: other programs on the machine change them less than they change what a clock shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import statistics
import time
from dataclasses import dataclass, replace

from clipdist.config import Config, load_config
from clipdist.errors import Fault, run_main
from tools.bench import harness

DEFAULT_RECIPE = "configs/flickr8k_vit_tiny.yaml"
PLAIN, COMPILED = "uncompiled", "compiled"
EXAMPLES = """  python tools/bench/compile.py train.global_batch=64
  python tools/bench/compile.py model.name=ViT-B-32 train.global_batch=16 --rounds 3 --out compile.md --json

A step trains train.micro_batch pairs, or train.global_batch without micro-batches, in fp32 on a CPU."""


@dataclass(frozen=True)
class CompileTimes:
    """Processor seconds of a step by side and round; seconds of the first compiled step, and its compilations."""

    seconds: dict[str, list[float]]
    first_s: float
    compilations: int

    def ratios(self) -> list[float]:
        return harness.ratios(self.seconds[COMPILED], self.seconds[PLAIN])


def main() -> int:
    args = parse_args()
    config = load_config(args.config, [*args.overrides, "engine.compile=true"])
    times = measure(config, args)
    record = {"ratio": statistics.median(times.ratios()), "first_s": times.first_s, "compilations": times.compilations}
    return harness.finish(args, report(config, times), record)


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe")
    parser.add_argument("--config", default=DEFAULT_RECIPE, help=f"recipe ({DEFAULT_RECIPE})")
    parser.number("--rounds", 5, "R", "timed steps of each side")
    return parser.parse()


def measure(config: Config, args: argparse.Namespace) -> CompileTimes:
    import torch

    from clipdist.data.batch import pair_batch
    from clipdist.distributed.rank import joined_ranks
    from clipdist.engine.step import Engine
    from clipdist.models.compiled import CompileClock, uncompiled, why_not
    from clipdist.models.dual_encoder import build_model
    from clipdist.objectives.make import make_objectives

    pairs = config.train.micro_batch or config.train.global_batch
    config = replace(config, train=replace(config.train, global_batch=pairs, micro_batch=0))
    with joined_ranks("cpu") as dist_env:
        if reason := why_not(dist_env.device):
            raise Fault(f"nothing can be compiled here: {reason}")
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, config.clip)
        model.prepare(config.engine)
        spec = model.spec
        images = torch.randint(0, 256, (pairs, 3, spec.image_size, spec.image_size), dtype=torch.uint8)
        place, length = torch.arange(spec.context_length), torch.randint(8, 21, (pairs, 1))
        tokens = torch.randint(1, 400, (pairs, spec.context_length)).where(place < length, 0)
        tokens = tokens.where(place != length - 1, spec.tokenizer["vocab_size"] - 1)
        batch = pair_batch(images, tokens, torch.ones(pairs, dtype=torch.bool), torch.arange(pairs))
        engine = Engine(model, make_objectives(config.objectives), config, dist_env)
        clock = CompileClock(lambda: None)

        def step() -> float:
            began = time.process_time()
            engine.train_step(batch, step=0, lr=config.optim.lr)
            return time.process_time() - began

        def plain() -> float:
            with uncompiled():
                return step()

        first_s, _ = harness.timed(step)
        compilations, _ = clock.lap()
        seconds = harness.take_turns({PLAIN: plain, COMPILED: step}, args.rounds, warmup=1)
        clock.close()
        engine.close()
    return CompileTimes(seconds, first_s, compilations)


def report(config: Config, times: CompileTimes) -> list[str]:
    """Return Markdown: a table, then what it was measured with."""
    medians = [f"{1000 * statistics.median(times.seconds[side]):.0f} ms" for side in (PLAIN, COMPILED)]
    pairs = config.train.micro_batch or config.train.global_batch
    header = ["a training step", PLAIN, COMPILED, "ratio, least", "median", "largest"]
    rows = [[f"{pairs} pairs", *medians, *harness.spread(times.ratios(), ".3f")]]
    return [
        f"# {config.model.name}: compiled blocks beside uncompiled ones",
        "",
        *harness.markdown_table(header, rows),
        "",
        f"The first compiled step took {times.first_s:.0f} s by the clock, with {times.compilations} compilations.",
        "",
        *harness.provenance("cpu", 1, "open_clip_torch"),
    ]


if __name__ == "__main__":
    run_main(main)
