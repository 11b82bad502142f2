"""Sizes in; retrieval's time beside open_clip's get_clip_metrics, its memory and exactness at scale, and what the
embedding pass costs beside the bare forward passes out."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import os
import shlex
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, TypeVar

from clipdist.errors import UserError, run_main
from clipdist.monitor.provenance import commit, hardware

if TYPE_CHECKING:
    from torch import Tensor

    from clipdist.evals.embed import Encode

EXAMPLE = """examples:
  python tools/bench/retrieval.py --out docs/benchmarks/retrieval_cpu.md
  python tools/bench/retrieval.py --pictures 2000 --large 4000 20000 --repeats 2 --json
  python tools/bench/retrieval.py --embed ViT-B-32 data/flickr8k/test --limit 256

Speed: one caption a picture, both take turns on the same embeddings after one unmeasured turn each. Large: peak
resident memory beyond that of the features, and 500 queries (half of them pictures) counted by brute force in float64.
Embedding: the whole pass over the shards, with reading and decoding, beside forward passes on its batches in memory."""
NOISE = 5.0  # at 512 dimensions and ten thousand pictures about half of all captions find their picture first
CHECKED = 500
DIRECTIONS = (("t2i", "text_to_image"), ("i2t", "image_to_text"))


T = TypeVar("T")


@dataclass(frozen=True)
class Pairs:
    image: Tensor  # fp32 [n, D]
    text: Tensor  # fp32 [m, D]
    text_image: Tensor  # int64 [m]


def main() -> int:
    args = parse_arguments()
    import torch

    record: dict[str, object] = {}
    if args.large:
        pictures, captions = args.large
        record |= measure_large(pictures, captions, args.width)
    record |= measure_speed(args.pictures, args.width, args.repeats)
    if args.embed:
        record |= measure_embedding(args)
    record |= {
        "commit": commit(),
        "hardware": hardware(args.device, torch.get_num_threads()),
        "versions": f"torch {torch.__version__}, open_clip_torch {version('open_clip_torch')}",
    }
    text = table(record)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(record))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=10_000, metavar="N", help="of the comparison (10000)")
    parser.add_argument("--width", type=int, default=512, metavar="D", help="of the embeddings (512)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of each (5)")
    parser.add_argument(
        "--large", type=int, nargs=2, default=[20_000, 100_000], metavar=("N", "M"), help="pictures, captions"
    )
    parser.add_argument("--no-large", dest="large", action="store_const", const=None, help="leave that part out")
    parser.add_argument("--embed", nargs="+", metavar="MODEL SHARDS", help="a run, or a model as it is drawn; shards")
    parser.add_argument("--limit", type=int, default=512, metavar="N", help="pictures of the embedding pass (512)")
    parser.add_argument("--batch", type=int, default=64, help="of the embedding pass (64)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="of the embedding pass (cpu)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there as well")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    sizes = [args.pictures, args.width, args.repeats, args.limit, args.batch, *(args.large or [])]
    if min(sizes) < 1:
        parser.error("every size must be at least 1")
    if args.large and args.large[1] < args.large[0]:
        parser.error(f"--large {args.large[0]} {args.large[1]}: a caption for every picture at least")
    if args.embed and len(args.embed) < 2:
        parser.error("--embed MODEL SHARDS: name shards too")
    if args.large and not os.access("/proc/self/clear_refs", os.W_OK):
        raise UserError("--large: peak memory needs /proc/self/clear_refs (Linux), which cannot be written here")
    from clipdist.distributed.rank import resolve_device

    args.device = resolve_device(args.device)
    return args


def draw_pairs(n: int, m: int, width: int) -> Pairs:
    """Captions are their pictures with noise; every picture has one, and the rest fall on pictures at random."""
    import torch

    generator = torch.Generator().manual_seed(0)
    image = torch.randn(n, width, generator=generator)
    text_image = torch.cat([torch.arange(n), torch.randint(n, (m - n,), generator=generator)])
    text = torch.randn(m, width, generator=generator).mul_(NOISE)
    for begin in range(0, m, n):  # in parts, so that no second copy adds to the peak
        text[begin : begin + n] += image[text_image[begin : begin + n]]
    return Pairs(image, text, text_image)


def measure_speed(pictures: int, width: int, repeats: int) -> dict[str, object]:
    import torch
    import torch.nn.functional as F
    from open_clip_train.train import get_clip_metrics
    from tqdm import tqdm

    from clipdist.evals.retrieval import retrieval_metrics

    pairs = draw_pairs(pictures, pictures, width)
    image, text = F.normalize(pairs.image, dim=1), F.normalize(pairs.text, dim=1)
    ours_s, theirs_s = [], []
    for _ in tqdm(range(repeats + 1), "turns", disable=None):
        seconds, ours = timed(lambda: retrieval_metrics(image, text, pairs.text_image))
        ours_s.append(seconds)
        seconds, theirs = timed(lambda: get_clip_metrics(image, text, torch.tensor(1.0)))
        theirs_s.append(seconds)
    ours_s, theirs_s = ours_s[1:], theirs_s[1:]
    differences = [
        abs(ours[f"{short}_r{k}"] - 100 * float(theirs[f"{long}_R@{k}"]))
        for short, long in DIRECTIONS
        for k in (1, 5, 10)
    ]
    return {
        "pictures": pictures,
        "width": width,
        "ours_s": [round(seconds, 4) for seconds in ours_s],
        "open_clip_s": [round(seconds, 4) for seconds in theirs_s],
        "time_ratio": round(statistics.median(ours_s) / statistics.median(theirs_s), 4),
        "recall_difference": max(differences),
        **{f"{short}_r{k}": ours[f"{short}_r{k}"] for short, _ in DIRECTIONS for k in (1, 5, 10)},
    }


def measure_large(n: int, m: int, width: int) -> dict[str, object]:
    from clipdist.evals.retrieval import TIE, retrieval_metrics, retrieval_ranks

    retrieval_metrics(*vars(draw_pairs(100, 100, width)).values())  # what the first call loads is not its memory
    pairs = draw_pairs(n, m, width)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what is resident now
    before = resident_bytes("VmRSS")
    seconds, ranks = timed(lambda: retrieval_ranks(pairs.image, pairs.text, pairs.text_image))
    extra = max(0, resident_bytes("VmHWM") - before)
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


def check_ranks(pairs: Pairs, ranks, tie: float) -> tuple[int, int]:
    """Queries whose rank is the one that float64 counts, and those that differ by rivals within two ties alone.

    Raises:
        RuntimeError: a rank is wrong.
    """
    import torch
    import torch.nn.functional as F

    image, text = F.normalize(pairs.image.double(), dim=1), F.normalize(pairs.text.double(), dim=1)
    generator = torch.Generator().manual_seed(1)
    captions = torch.randint(len(text), (CHECKED // 2,), generator=generator)
    pictures = torch.randint(len(image), (CHECKED - CHECKED // 2,), generator=generator)
    queries = []  # (name, rank, scores of all candidates, which of them are right)
    for caption, scores in zip(captions.tolist(), text[captions] @ image.T):
        right = torch.arange(len(image)) == pairs.text_image[caption]
        queries.append((f"caption {caption}", int(ranks.text[caption]), scores, right))
    for picture, scores in zip(pictures.tolist(), image[pictures] @ text.T):
        queries.append((f"picture {picture}", int(ranks.image[picture]), scores, pairs.text_image == picture))
    equal = 0
    for name, rank, scores, right in queries:
        own, rivals = scores[right].max(), scores[~right]
        least, exact, most = (1 + int((rivals >= own + step).sum()) for step in (2 * tie, 0, -2 * tie))
        if not least <= rank <= most:
            raise RuntimeError(f"{name}: rank {rank}, where float64 counts {exact} (ties: {least} to {most})")
        equal += rank == exact
    return equal, CHECKED - equal


def measure_embedding(args: argparse.Namespace) -> dict[str, object]:
    """The pass over the shards against forward passes on the batches that it made, in turns."""
    from tqdm import tqdm

    from clipdist.data.catalog import Catalog
    from clipdist.data.loader import default_threads
    from clipdist.evals.embed import embed_catalog, model_encoder
    from clipdist.models.load import load_model

    catalog = Catalog.open(args.embed[1:], what="SHARDS")
    loaded = load_model(args.embed[0], allow_random=True)
    encode = model_encoder(loaded.model, args.device)
    samples = range(min(args.limit, len(catalog)))

    def whole_pass(encode: Encode) -> None:
        size, threads = loaded.model.spec.image_size, default_threads()
        embed_catalog(encode, catalog, loaded.tokenizer, size, args.batch, threads, progress=False, samples=samples)

    batches: list[tuple[Tensor | None, Tensor | None]] = []

    def keep(image: Tensor | None, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        batches.append((image, tokens))
        return encode(image, tokens)

    whole_pass(keep)  # warms the file cache and the model as well
    passes_s, bare_s = [], []
    for _ in tqdm(range(args.repeats), "turns", disable=None):
        passes_s.append(timed(lambda: whole_pass(encode))[0])
        bare_s.append(timed(lambda: forward(encode, batches))[0])
    return {
        "embed_model": loaded.label,
        "embed_device": args.device,
        "embed_pictures": len(samples),
        "embed_batches": len(batches),
        "pass_s": [round(seconds, 4) for seconds in passes_s],
        "bare_s": [round(seconds, 4) for seconds in bare_s],
        "pass_rate_percent": round(100 * statistics.median(bare_s) / statistics.median(passes_s), 1),
    }


def forward(encode: Encode, batches: list[tuple[Tensor | None, Tensor | None]]) -> None:
    import torch

    with torch.no_grad():
        features = [part for image, tokens in batches for part in encode(image, tokens) if part is not None]
        for part in features:
            part.cpu()  # all of them are done


def resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise UserError(f"/proc/self/status: no {field} in it; --no-large leaves the memory out")


def timed(function: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def table(record: dict) -> str:
    return "\n".join([*_speed_lines(record), *_large_lines(record), *_embedding_lines(record), *_origin_lines(record)])


def _speed_lines(record: dict) -> list[str]:
    n, width = record["pictures"], record["width"]
    lines = [
        "# Retrieval on a CPU",
        "",
        f"{n:,} pictures x {n:,} captions, one to one, D = {width}, fp32; seconds of each turn",
        "",
        "|                            | median | turns |",
        "|----------------------------|--------|-------|",
    ]
    for name, times in (("clipdist", record["ours_s"]), ("open_clip get_clip_metrics", record["open_clip_s"])):
        lines.append(f"| {name:26} | {statistics.median(times):6.2f} | {' '.join(f'{s:.2f}' for s in times)} |")
    same = record["recall_difference"] < 1e-6
    recalls = ", ".join(f"{way} R@{k} {record[f'{way}_r{k}']:.2f}" for way in ("t2i", "i2t") for k in (1, 5, 10))
    told = "are the same" if same else f"DIFFER by up to {record['recall_difference']:.3f} (ties count against here)"
    return [*lines, "", f"clipdist / open_clip: {record['time_ratio']:.3f}. R@K {told}: {recalls}."]


def _large_lines(record: dict) -> list[str]:
    if "large_s" not in record:
        return []
    return [
        "",
        f"{record['large_pictures']:,} pictures x {record['large_captions']:,} captions: {record['large_s']:.1f} s,"
        f" {record['extra_bytes'] / 1e6:.0f} MB of extra memory. Of {record['checked']} queries counted by brute force"
        f" in float64, {record['checked_equal']} have the very rank; {record['checked_near_tie']} differ by rivals that"
        " score alike in fp32.",
    ]


def _embedding_lines(record: dict) -> list[str]:
    if "pass_s" not in record:
        return []
    return [
        "",
        f"Embedding {record['embed_pictures']} pictures and their captions with {record['embed_model']} on"
        f" {record['embed_device']}: {statistics.median(record['pass_s']):.2f} s, of which the bare forward passes take"
        f" {statistics.median(record['bare_s']):.2f} s: {record['pass_rate_percent']:.1f} % of the bare rate.",
    ]


def _origin_lines(record: dict) -> list[str]:
    return [
        "",
        f"- command: `{shlex.join(['python', 'tools/bench/retrieval.py', *sys.argv[1:]])}`",
        f"- commit: {record['commit']}",
        f"- hardware: {record['hardware']}",
        f"- versions: {record['versions']}",
    ]


if __name__ == "__main__":
    run_main(main)
