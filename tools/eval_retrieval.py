"""Measure retrieval in both directions, of a model on captioned shards or of embeddings saved earlier."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdist.errors import UserError, run_main
from clipdist.evals import front

if TYPE_CHECKING:
    from clipdist.distributed.rank import DistEnv
    from clipdist.evals.embed import Embeddings
    from clipdist.evals.retrieval import Ranks

EXAMPLES = """examples:
  python tools/eval_retrieval.py runs/demo runs/demo-data/shards/test
  python tools/eval_retrieval.py RN50 --weights openai 'data/flickr8k/test/{00000..00003}.tar' --json
  python tools/eval_retrieval.py runs/coco data/coco/test --protocol coco-5k --split-file dataset_coco.json \\
      --save-embeddings coco_test.safetensors
  python tools/eval_retrieval.py --embeddings coco_test.safetensors --protocol coco-1k-folds
  torchrun --nproc-per-node 4 tools/eval_retrieval.py runs/web data/web/test     ranks share all of the work"""
LEVEL = 95  # of the intervals, percent
NAMES = ("r1", "r5", "r10", "map10")


def main() -> None:
    args = parse_args()
    front.require_writable(args.save_embeddings, "--save-embeddings")

    catalog = None if args.embeddings else front.open_catalog(args, args.shards)  # before torch is imported

    with front.joined_ranks(args) as dist_env:
        if catalog is None:
            embeddings, facts = reuse(args)
        else:
            embeddings, facts = embed(args, catalog, dist_env)
        if dist_env.rank == 0 and args.save_embeddings:
            from clipdist.evals.store import save_embeddings

            kept = {name: value for name, value in facts.items() if name != "run_dir"}  # others may use the file
            save_embeddings(args.save_embeddings, embeddings, kept)
        full = embeddings.image.shape[1]
        narrower = widths_of(args, facts, full)
        folds = {width: rank_folds(embeddings, facts, dist_env, width) for width in (full, *narrower)}
        if dist_env.rank == 0:
            report(args, folds, embeddings, facts)


def reuse(args: argparse.Namespace) -> tuple[Embeddings, dict[str, str]]:
    """Load what was saved; its protocol may change to another one over the same images (COCO 5K to its folds)."""
    from clipdist.evals.protocols import PROTOCOLS
    from clipdist.evals.store import load_embeddings

    embeddings, facts = load_embeddings(args.embeddings)
    saved = facts.get("protocol", "")
    if saved not in ("", *PROTOCOLS):
        raise UserError(f"{args.embeddings}: saved under an unknown protocol, {saved}")
    if args.protocol:
        if not saved or PROTOCOLS[saved].dataset != PROTOCOLS[args.protocol].dataset:
            raise UserError(
                f"{args.embeddings}: saved {f'under --protocol {saved}' if saved else 'without --protocol'}, which does"
                f" not tell the pictures of {args.protocol}; save them with it"
            )
        facts["protocol"] = args.protocol
    if not embeddings.captions:
        raise UserError(f"{args.embeddings}: no captions in it; save it with captions")
    return embeddings, facts


def embed(args: argparse.Namespace, catalog, dist_env: DistEnv) -> tuple[Embeddings, dict[str, str]]:
    """Return all embeddings on every rank, of the whole catalog or of what the protocol names."""
    from clipdist.evals.embed import embed_catalog, gather_embeddings, model_encoder
    from clipdist.evals.locked import kept_features
    from clipdist.evals.protocols import CAPTIONS, PROTOCOLS, read_test_names, require_whole, select_samples

    protocol = PROTOCOLS.get(args.protocol)
    where = " ".join(args.shards)
    names: list[str] = []
    place_of: dict[int, int] = {}  # of a sample in the split file
    if protocol:
        names = read_test_names(args.split_file, protocol)
        place_of = select_samples(catalog, names)
        if not args.allow_missing:
            require_whole(protocol, names, set(place_of.values()), where)
        if not place_of:
            raise UserError(f"{where}: none of the {protocol.images} pictures of {protocol.name} is there")
    loaded = front.load(args, args.run, needs_text="retrieval by captions")
    own = embed_catalog(
        model_encoder(loaded.model, dist_env.device),
        catalog,
        loaded.tokenizer,
        loaded.model.spec.transform,
        front.share_of_work(args, dist_env),
        samples=list(place_of) if protocol else None,
        most_captions=CAPTIONS if protocol else None,
        locked=kept_features(loaded, catalog, dist_env),
    )
    embeddings = gather_embeddings(own)
    if dist_env.rank == 0:
        front.tell_left_out(embeddings.bad)
    if not embeddings.captions:
        raise UserError(f"{where}: no picture with a caption in {len(catalog)} samples")
    facts = {
        "model": loaded.label,
        "step": "" if loaded.step is None else str(loaded.step),
        "run_dir": str(loaded.run_dir or ""),
        "fingerprint": loaded.fingerprint,
        "shards": where,
        "catalog": catalog.fingerprint(),
        "protocol": args.protocol,
        "positions": "[]",
        "widths": json.dumps(loaded.widths),
    }
    if protocol:
        positions = [place_of[sample_id] for sample_id in embeddings.sample_ids.tolist()]
        facts["positions"] = json.dumps(positions)
        if not args.allow_missing:
            require_whole(protocol, names, set(positions), where)
    return embeddings, facts


def widths_of(args: argparse.Namespace, facts: dict[str, str], full: int) -> list[int]:
    """Return the widths below `full` at which retrieval is measured too: those named, or those that were trained."""
    widths = args.widths or json.loads(facts.get("widths", "[]"))
    if wrong := [width for width in widths if not 0 < width <= full]:
        raise UserError(f"--widths {wrong[0]}: the features have {full} numbers")
    return sorted({width for width in widths if width < full})


def rank_folds(embeddings: Embeddings, facts: dict[str, str], dist_env: DistEnv, width: int) -> list[Ranks]:
    """Rank every fold by the first `width` features. Collective with several ranks: each scores its share."""
    from clipdist.evals.protocols import PROTOCOLS, folds_of
    from clipdist.evals.retrieval import retrieval_ranks

    protocol = PROTOCOLS.get(facts.get("protocol", ""))
    folds = [(embeddings.image, embeddings.text, embeddings.text_image)]
    if protocol:
        folds = folds_of(embeddings, json.loads(facts.get("positions", "[]")), protocol)
    device = dist_env.device
    return [
        retrieval_ranks(image[:, :width].to(device), text[:, :width].to(device), rows.to(device), True)
        for image, text, rows in folds
    ]


def report(
    args: argparse.Namespace, folds_by_width: dict[int, list[Ranks]], embeddings: Embeddings, facts: dict[str, str]
) -> None:
    """Print the tables and write the record; `folds_by_width` has all features first."""
    from clipdist.data.members import tell_sources
    from clipdist.evals.protocols import CAPTIONS, PROTOCOLS
    from clipdist.evals.retrieval import bootstrap_intervals, mean_metrics

    full, *narrower = folds_by_width
    folds = folds_by_width[full]
    name = facts.get("protocol", "")
    missing = PROTOCOLS[name].images - len(embeddings.keys) if name else 0
    title = facts.get("model", str(args.embeddings))
    if name:
        title += f"; {name}" + (f", NOT the published set: {missing} pictures missing" if missing else "")
    if len(folds) > 1:
        title += f"; mean over {len(folds)} folds"
    record: dict[str, Any] = {}
    for width, ranked in folds_by_width.items():
        metrics = mean_metrics(ranked)
        intervals = bootstrap_intervals(ranked, args.resamples, args.seed, LEVEL) if args.resamples else {}
        first = "" if width == full else f"; the first {width} of {full} features"
        print_table(title + first, metrics, intervals, args.resamples)
        ends = {f"{key}_low": low for key, (low, _) in intervals.items()}
        ends |= {f"{key}_high": high for key, (_, high) in intervals.items()}
        prefix = "" if width == full else f"width_{width}/"
        record |= {prefix + key: value for key, value in (metrics | ends).items()}
    if embeddings.caption_sources:
        first = f", the first {CAPTIONS} of a picture" if name else ""
        print(f"captions are {tell_sources(embeddings.caption_sources)}{first}")
    source = {"model": facts.get("model"), "step": int(facts["step"]) if facts.get("step") else None}
    left_out = {reason: len(keys) for reason, keys in embeddings.bad.items()}
    test_set = {"protocol": name or None, "folds": len(folds), "missing": missing, "left_out": left_out}
    test_set["caption_sources"] = embeddings.caption_sources
    drawn = {"resamples": args.resamples, "seed": args.seed}
    record |= {**source, **test_set, **drawn, "widths": narrower}
    run_dir = Path(facts["run_dir"]) if facts.get("run_dir") else None
    front.finish(args, record, run_dir=run_dir, tool="eval_retrieval")


def print_table(
    title: str, metrics: dict[str, float], intervals: dict[str, tuple[float, float]], resamples: int
) -> None:
    n, m = metrics["candidates"], metrics["captions"]
    print(f"{title}: {n:g} pictures, {m:g} captions; R@K and mAP in percent, ranks from 1, ties count against")
    print("R@K of image to text: a picture counts where any of its captions is among the first K")
    print(f"{'':18}{'R@1':>14}{'R@5':>14}{'R@10':>14}{'mAP@10':>14}{'median rank':>13}{'mean rank':>18}")
    for name, direction in (("text to image", "t2i"), ("image to text", "i2t")):
        scores = "".join(f"{metrics[f'{direction}_{name}']:14.2f}" for name in NAMES)
        median, mean = metrics[f"{direction}_median_rank"], metrics[f"{direction}_mean_rank"]
        print(f"{name:18}{scores}{median:13g}{mean:18.1f}")
        if intervals:
            ends = "".join(f"{_interval(*intervals[f'{direction}_{name}'], 2):>14}" for name in NAMES)
            print(f"{f'  {LEVEL} % interval':18}{ends}{'':13}{_interval(*intervals[f'{direction}_mean_rank'], 1):>18}")
    chance = "".join(f"{min(100.0, metrics['chance'] * k):14.2f}" for k in (1, 5, 10))
    print(f"{'chance, to image':18}{chance}{'':14}{(n + 1) / 2:13g}{(n + 1) / 2:18.1f}")
    rsum = f"rsum {metrics['rsum']:.2f}"
    print(rsum + (f" ({_interval(*intervals['rsum'], 2)}; {resamples} resamples of pictures)" if intervals else ""))


def _interval(low: float, high: float, digits: int) -> str:
    return f"{low:.{digits}f}-{high:.{digits}f}"


def parse_args() -> argparse.Namespace:
    parser = front.make_parser(
        "Retrieval between pictures and captions, both directions: R@1, R@5, R@10, mAP@10, median and\n"
        "mean rank, rsum, with bootstrap intervals over pictures. A tie counts against the model; image to text takes\n"
        "the best placed of a picture's captions.",
        EXAMPLES,
    )
    front.add_model(parser, optional=True)
    add = parser.add_argument
    add("shards", metavar="SHARDS", nargs="*", help="shard folders, brace patterns, or tars")
    protocols = ("flickr8k-1k", "flickr30k-1k", "coco-5k", "coco-1k-folds")
    add("--protocol", choices=protocols, default="", help="a published test set, five captions each")
    add("--split-file", type=Path, metavar="FILE", help="Karpathy's dataset_*.json, or a list of names")
    add("--allow-missing", action="store_true", help="evaluate a protocol without some of its pictures")
    add("--embeddings", type=Path, metavar="FILE", help="saved earlier, in place of RUN and SHARDS")
    add("--save-embeddings", type=Path, metavar="FILE", help="keep them: a .safetensors file")
    add("--widths", type=int, nargs="+", metavar="D", help="the first D features too (objectives.clip.widths of RUN)")
    front.add_number(parser, "--resamples", 1000, "for the intervals (1000); 0: none", "N", 0)
    front.add_number(parser, "--seed", 0, "of the resamples (0)", least=0)
    front.add_members(parser)
    front.add_work(parser)
    args = parser.parse_args()
    if args.embeddings:
        if args.run or args.save_embeddings or args.split_file or args.allow_missing or args.weights:
            parser.error("--embeddings takes the place of RUN, SHARDS and all that belongs to them")
    elif not args.run or not args.shards:
        parser.error("name RUN and SHARDS, or --embeddings FILE")
    elif bool(args.protocol) != bool(args.split_file):
        parser.error("--protocol and --split-file go together")
    elif args.allow_missing and not args.protocol:
        parser.error("--allow-missing belongs to --protocol")
    return args


if __name__ == "__main__":
    run_main(main)
