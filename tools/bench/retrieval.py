"""Time retrieval beside open_clip's get_clip_metrics, check it at scale, and time the embedding pass beside its forward
passes."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import statistics
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdist.data.catalog import Catalog
from clipdist.data.loader import default_threads
from clipdist.distributed.rank import resolve_device
from clipdist.errors import run_main
from clipdist.evals.embed import Encode, WorkShare, embed_catalog, model_encoder
from clipdist.evals.retrieval import TIE, Ranks, retrieval_metrics, retrieval_ranks
from clipdist.models.load import load_model
from clipdist.monitor.provenance import commit, hardware
from tools.bench import harness
from tools.bench.peak_memory import MemoryGrowth, require_resettable

EXAMPLES = """  python tools/bench/retrieval.py --out docs/benchmarks/retrieval_cpu.md
  python tools/bench/retrieval.py --pictures 2000 --large 4000 20000 --repeats 2 --json
  python tools/bench/retrieval.py --embed ViT-B-32 data/flickr8k/test --limit 256

Speed: one caption a picture, both take turns on the same embeddings after one unmeasured turn each. Large: peak
resident memory beyond that of the features, and 500 queries (half of them pictures) counted by brute force in float64.
Embedding: the whole pass over the shards, with reading and decoding, beside forward passes on its batches in memory."""
NOISE = 5.0  # at 512 dimensions and ten thousand images about half of all captions find their image first
CHECKED = 500
DIRECTIONS = (("t2i", "text_to_image"), ("i2t", "image_to_text"))
RECALLS = [f"{way}_r{k}" for way, _ in DIRECTIONS for k in (1, 5, 10)]


@dataclass(frozen=True)
class DrawnFeatures:
    image: Tensor  # fp32 [n, D]
    text: Tensor  # fp32 [m, D]
    text_image: Tensor  # int64 [m]


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.number("--pictures", 10_000, "N", "of the comparison")
    parser.number("--width", 512, "D", "of the embeddings")
    parser.number("--repeats", 5, "N", "turns of each")
    parser.add_argument(
        "--large", type=int, nargs=2, default=[20_000, 100_000], metavar=("N", "M"), help="pictures, captions"
    )
    parser.add_argument("--embed", nargs="+", metavar="MODEL SHARDS", help="a run, or a model as it is drawn; shards")
    parser.number("--limit", 512, "N", "pictures of the embedding pass")
    parser.number("--batch", 64, "B", "of the embedding pass")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="of the embedding pass (cpu)")
    args = parser.parse()
    if not 1 <= args.large[0] <= args.large[1]:
        parser.error(f"--large {args.large[0]} {args.large[1]}: at least 1, and a caption for every picture")
    if args.embed and len(args.embed) < 2:
        parser.error("--embed MODEL SHARDS: name shards too")
    require_resettable("--large")
    args.device = resolve_device(args.device)
    return args


def main() -> int:
    args = parse_args()
    images, captions = args.large
    record = measure_large(images, captions, args.width)
    record |= measure_speed(args.pictures, args.width, args.repeats)
    if args.embed:
        record |= measure_embedding(args)
    threads = torch.get_num_threads()
    origin = harness.provenance(args.device, threads, "open_clip_torch")
    record |= {
        "commit": commit(),
        "hardware": hardware(args.device, threads),
        "versions": harness.versions_line("open_clip_torch"),
    }
    return harness.finish(args, [*speed_lines(record), *large_lines(record), *embedding_lines(record), *origin], record)


def draw_features(n: int, m: int, width: int) -> DrawnFeatures:
    """Draw captions that are their images with noise; every image has one, and the rest fall on images at random."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(n, width, generator=generator)
    text_image = torch.cat([torch.arange(n), torch.randint(n, (m - n,), generator=generator)])
    text = torch.randn(m, width, generator=generator).mul_(NOISE)
    for begin in range(0, m, n):  # in parts, so that no second copy adds to the peak
        text[begin : begin + n] += image[text_image[begin : begin + n]]
    return DrawnFeatures(image, text, text_image)


def measure_speed(images: int, width: int, repeats: int) -> dict[str, object]:
    from open_clip_train.train import get_clip_metrics

    pairs = draw_features(images, images, width)
    image, text = F.normalize(pairs.image, dim=1), F.normalize(pairs.text, dim=1)
    sides = {
        "ours": lambda: harness.timed(lambda: retrieval_metrics(image, text, pairs.text_image)),
        "open_clip": lambda: harness.timed(lambda: get_clip_metrics(image, text, torch.tensor(1.0))),
    }
    turns = harness.take_turns(sides, repeats, warmup=1)
    times = {name: [seconds for seconds, _ in results] for name, results in turns.items()}
    ours, theirs = (turns[name][-1][1] for name in sides)
    differences = [
        abs(ours[f"{short}_r{k}"] - 100 * float(theirs[f"{long}_R@{k}"]))
        for short, long in DIRECTIONS
        for k in (1, 5, 10)
    ]
    return {
        "pictures": images,
        "width": width,
        **{f"{name}_s": rounded(seconds) for name, seconds in times.items()},
        "time_ratio": round(statistics.median(times["ours"]) / statistics.median(times["open_clip"]), 4),
        "recall_difference": max(differences),
        **{name: ours[name] for name in RECALLS},
    }


def rounded(seconds: list[float]) -> list[float]:
    return [round(s, 4) for s in seconds]


def measure_large(n: int, m: int, width: int) -> dict[str, object]:
    retrieval_metrics(*vars(draw_features(100, 100, width)).values())  # what the first call loads is not its memory
    pairs = draw_features(n, m, width)
    memory = MemoryGrowth("cpu")
    seconds, ranks = harness.timed(lambda: retrieval_ranks(pairs.image, pairs.text, pairs.text_image))
    extra = memory.peak()
    equal, near = check_ranks(pairs, ranks, TIE)
    return {
        "large_pictures": n,
        "large_captions": m,
        "large_s": round(seconds, 3),
        "extra_bytes": extra,
        "checked": equal + near,
        "checked_equal": equal,
        "checked_near_tie": near,
    }


def check_ranks(pairs: DrawnFeatures, ranks: Ranks, tie: float) -> tuple[int, int]:
    """Count the queries whose rank is the one of float64, and those that differ by rivals within two ties alone.

    Raises:
        RuntimeError: a rank is wrong.
    """
    image, text = F.normalize(pairs.image.double(), dim=1), F.normalize(pairs.text.double(), dim=1)
    generator = torch.Generator().manual_seed(1)
    captions = torch.randint(len(text), (CHECKED // 2,), generator=generator)
    images = torch.randint(len(image), (CHECKED - CHECKED // 2,), generator=generator)
    queries = []  # (name, rank, scores of all candidates, which of them are right)
    for caption, scores in zip(captions.tolist(), text[captions] @ image.T):
        right = torch.arange(len(image)) == pairs.text_image[caption]
        queries.append((f"caption {caption}", int(ranks.text[caption]), scores, right))
    for number, scores in zip(images.tolist(), image[images] @ text.T):
        queries.append((f"picture {number}", int(ranks.image[number]), scores, pairs.text_image == number))
    equal = 0
    for name, rank, scores, right in queries:
        own, rivals = scores[right].max(), scores[~right]
        least, exact, most = (1 + int((rivals >= own + step).sum()) for step in (2 * tie, 0, -2 * tie))
        if not least <= rank <= most:
            raise RuntimeError(f"{name}: rank {rank}, where float64 counts {exact} (ties: {least} to {most})")
        equal += rank == exact
    return equal, CHECKED - equal


def measure_embedding(args: argparse.Namespace) -> dict[str, object]:
    """Time the pass over the shards and forward passes on the batches that it made, in turns."""
    catalog = Catalog.open(args.embed[1:], what="SHARDS")
    loaded = load_model(args.embed[0], allow_random=True)
    encode = model_encoder(loaded.model, args.device)
    samples = range(min(args.limit, len(catalog)))

    def whole_pass(encode: Encode) -> None:
        share = WorkShare(batch=args.batch, threads=default_threads(), progress=False)
        embed_catalog(encode, catalog, loaded.tokenizer, loaded.model.spec.transform, share, samples=samples)

    batches: list[tuple[Tensor | None, Tensor | None]] = []

    def keep(image: Tensor | None, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        batches.append((image, tokens))
        return encode(image, tokens)

    whole_pass(keep)  # warms the file cache and the model as well
    passes = {"pass_s": partial(whole_pass, encode), "bare_s": partial(forward, encode, batches)}
    times = harness.take_turns({name: harness.seconds_of(run) for name, run in passes.items()}, args.repeats)
    return {
        "embed_model": loaded.label,
        "embed_device": args.device,
        "embed_pictures": len(samples),
        "embed_batches": len(batches),
        **{name: rounded(seconds) for name, seconds in times.items()},
        "pass_rate_percent": round(100 * statistics.median(times["bare_s"]) / statistics.median(times["pass_s"]), 1),
    }


def forward(encode: Encode, batches: list[tuple[Tensor | None, Tensor | None]]) -> None:
    with torch.no_grad():
        features = [part for image, tokens in batches for part in encode(image, tokens) if part is not None]
        for part in features:
            part.cpu()  # all of them are done


def speed_lines(record: dict) -> list[str]:
    n, width = record["pictures"], record["width"]
    rows = [
        [name, f"{statistics.median(record[key]):.2f}", harness.by_round(record[key], ".2f")]
        for name, key in (("clipdist", "ours_s"), ("open_clip get_clip_metrics", "open_clip_s"))
    ]
    same = record["recall_difference"] < 1e-6
    told = "are the same" if same else f"DIFFER by up to {record['recall_difference']:.3f} (ties count against here)"
    recalls = ", ".join(f"{name.replace('_r', ' R@')} {record[name]:.2f}" for name in RECALLS)
    return [
        "# Retrieval on a CPU",
        "",
        f"{n:,} pictures x {n:,} captions, one to one, D = {width}, fp32; seconds of each turn",
        "",
        *harness.markdown_table(["", "median", "turns"], rows),
        "",
        f"clipdist / open_clip: {record['time_ratio']:.3f}. R@K {told}: {recalls}.",
        "",
    ]


def large_lines(record: dict) -> list[str]:
    return [
        f"{record['large_pictures']:,} pictures x {record['large_captions']:,} captions: {record['large_s']:.1f} s,"
        f" {record['extra_bytes'] / 1e6:.0f} MB of extra memory. Of {record['checked']} queries counted by brute force"
        f" in float64, {record['checked_equal']} have the very rank; {record['checked_near_tie']} differ by rivals that"
        " score alike in fp32.",
        "",
    ]


def embedding_lines(record: dict) -> list[str]:
    if "pass_s" not in record:
        return []
    return [
        f"Embedding {record['embed_pictures']} pictures and their captions with {record['embed_model']} on"
        f" {record['embed_device']}: {statistics.median(record['pass_s']):.2f} s, of which the bare forward passes take"
        f" {statistics.median(record['bare_s']):.2f} s: {record['pass_rate_percent']:.1f} % of the bare rate.",
        "",
    ]


if __name__ == "__main__":
    run_main(main)
