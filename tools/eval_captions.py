"""Score captions of images against the captions in shards: BLEU-1 to 4, ROUGE-L, CIDEr-D, METEOR."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from clipdist.errors import UserError, require_extra, run_main
from clipdist.evals import front

if TYPE_CHECKING:
    from clipdist.data.catalog import Catalog
    from clipdist.evals.captions import References

EXAMPLES = """examples:
  python tools/eval_captions.py captions.json data/flickr8k/test
  python tools/eval_captions.py beam1.json beam5.json data/coco/test --protocol coco --split-file dataset_coco.json
  python tools/eval_captions.py captions.jsonl data/flickr8k/test --train data/flickr8k/train --nearest runs/flickr8k
                                two baselines beside it

captions.json: {"IMAGE": "CAPTION", ...}, or COCO's results. captions.jsonl: {"key": "IMAGE", "caption": "TEXT"} a line.
IMAGE is a sample's key or file name. METEOR and the PTB tokenizer need Java; without it the others are measured."""


def parse_args() -> argparse.Namespace:
    parser = front.make_parser(__doc__, EXAMPLES)
    what = "files of captions (.json, .jsonl), and shards whose captions are the references"
    parser.add_argument("sources", nargs="+", metavar="PREDICTIONS|SHARDS", help=what)
    parser.add_argument("--protocol", default="", choices=("coco", "flickr8k", "flickr30k"), help="Karpathy's test set")
    parser.add_argument("--split-file", type=Path, metavar="FILE", help="names the images of --protocol")
    parser.add_argument("--allow-missing", action="store_true", help="score a part of the images of --protocol")
    what = "training shards: score their most frequent caption for every image, too"
    parser.add_argument("--train", nargs="+", default=[], metavar="SHARDS", help=what)
    what = "a dual encoder: score for every image the caption of --train nearest to it, too"
    parser.add_argument("--nearest", default="", metavar="RUN", help=what)
    parser.add_argument("--weights", default="", help="of --nearest, where it is an open_clip name: a tag or a file")
    parser.add_argument("--trust-weights", action="store_true", help="run a TorchScript file that is not OpenAI's")
    parser.add_argument("--ema", action="store_true", help="of a run with train.ema: the moving average of its weights")
    front.add_members(parser)
    front.add_work(parser)
    args = parser.parse_args()
    args.predictions = [Path(name) for name in args.sources if name.endswith((".json", ".jsonl"))]
    args.shards = [name for name in args.sources if not name.endswith((".json", ".jsonl"))]
    if not args.shards:
        parser.error("SHARDS: name the shards whose captions are the references")
    if not args.predictions and not args.train:
        parser.error("PREDICTIONS: name a file of captions, .json or .jsonl, or training shards by --train")
    if args.nearest and not args.train:
        parser.error("--nearest: takes captions of --train SHARDS; name them")
    if bool(args.protocol) != bool(args.split_file):
        parser.error("--protocol and --split-file go together")
    return args


def main() -> None:
    args = parse_args()
    require_extra("tools/eval_captions.py", ["pycocoevalcap"], "captions")
    from clipdist.evals.captions import match, read_predictions, read_references

    predicted = {str(path): read_predictions(path) for path in args.predictions}
    catalog, where = front.open_catalog(args, args.shards), " ".join(args.shards)
    references = read_references(catalog, protocol_samples(args, catalog, where))
    rows = {name: match(captions, references, name, where) for name, captions in predicted.items()}
    scored = images_of(args, rows, references)
    rows |= baselines(args, catalog, scored)
    report(args, rows, references, scored)


def protocol_samples(args: argparse.Namespace, catalog: Catalog, where: str) -> list[int] | None:
    """Return the samples of the protocol in its order; None without one."""
    if not args.protocol:
        return None
    from clipdist.evals.protocols import CAPTION_PROTOCOLS, read_test_names, require_whole, select_samples

    protocol = CAPTION_PROTOCOLS[args.protocol]
    names = read_test_names(args.split_file, protocol)
    place_of = select_samples(catalog, names)
    if not args.allow_missing:
        require_whole(protocol, names, set(place_of.values()), where)
    return list(place_of)


def images_of(args: argparse.Namespace, rows: dict[str, dict[int, str]], references: References) -> list[int]:
    """Return the samples that are scored: those of which every row has a caption.

    Raises:
        UserError: under a protocol an image has none; or there is no image.
    """
    scored = [sample_id for sample_id in references.captions if all(sample_id in row for row in rows.values())]
    lacking = {name: len(references.captions) - len(row) for name, row in rows.items()}
    for name, count in lacking.items():
        if count and args.protocol and not args.allow_missing:
            raise UserError(
                f"{name}: {count} of the {len(references.captions)} images of --protocol {args.protocol} have no"
                " caption; --allow-missing scores the others"
            )
        if count:
            front.tell(f"{name}: {count} of {len(references.captions)} images with references have no caption")
    if not scored:
        raise UserError(f"{' '.join(args.shards)}: no image with both a reference and a caption from every file")
    return scored


def baselines(args: argparse.Namespace, catalog: Catalog, scored: list[int]) -> dict[str, dict[int, str]]:
    """Return the captions of the baselines by row."""
    if not args.train:
        return {}
    from clipdist.evals.captions import constant_caption, read_references

    trained = [text for own in read_references(front.open_catalog(args, args.train)).captions.values() for text in own]
    if not trained:
        raise UserError(f"--train {' '.join(args.train)}: holds no captions")
    constant = constant_caption(trained)
    rows = {f"{constant!r} for all": dict.fromkeys(scored, constant)}
    if args.nearest:
        rows |= {f"nearest of --train by {args.nearest}": nearest_captions(args, catalog, scored, trained)}
    return rows


def nearest_captions(
    args: argparse.Namespace, catalog: Catalog, scored: list[int], trained: list[str]
) -> dict[int, str]:
    """Return the training caption whose text features are nearest to each image's."""
    import torch

    from clipdist.evals.embed import embed_catalog, encode_texts, model_encoder
    from clipdist.evals.search import nearest, unit

    loaded = front.load(args, args.nearest)
    with front.joined_ranks(args) as dist_env:
        encode, share = model_encoder(loaded.model, dist_env.device), front.share_of_work(args)
        transform = loaded.model.spec.transform
        images = embed_catalog(encode, catalog, loaded.tokenizer, transform, share, texts=False, samples=scored)
        captions = list(dict.fromkeys(trained))
        calls = -(-len(captions) // args.batch)
        texts = torch.cat(list(encode_texts(encode, loaded.tokenizer, captions, args.batch, calls)))
    if images.bad:
        front.tell_left_out(images.bad)
        raise UserError("--nearest: images above cannot be decoded; leave them out of the shards, or --nearest")
    rows, _ = nearest(unit(texts), unit(images.image), 1)
    return {sample_id: captions[row] for sample_id, row in zip(images.sample_ids.tolist(), rows[:, 0].tolist())}


def report(
    args: argparse.Namespace, rows: dict[str, dict[int, str]], references: References, scored: list[int]
) -> None:
    from clipdist.evals.captions import METRICS, PLAIN, PTB, caption_scores, has_java, tokenised
    from clipdist.evals.protocols import CAPTION_PROTOCOLS

    java = has_java()
    tokenizer = PTB if java else PLAIN
    counts = [len(references.captions[sample_id]) for sample_id in scored]
    texts = [text for one in scored for text in references.captions[one]]
    texts += [row[one] for row in rows.values() for one in scored]
    tokens = iter(tokenised(texts, tokenizer))
    wanted = [[next(tokens) for _ in range(count)] for count in counts]
    found = {name: caption_scores(wanted, [next(tokens) for _ in scored], meteor=java) for name in rows}
    protocol = f"; {args.protocol}, Karpathy's test split" if args.protocol else ""
    if args.protocol and (missing := CAPTION_PROTOCOLS[args.protocol].images - len(scored)):
        protocol = f"; {args.protocol}, NOT the published set: {missing} images missing"
    lines = [f"{len(scored)} images, {sum(counts)} references, {tokenizer} tokenizer, percent{protocol}"]
    lines.append("  ".join(f"{title:>7}" for title in METRICS.values()))
    for name, scores in found.items():
        figures = (f"{scores[metric]:7.1f}" if metric in scores else "      -" for metric in METRICS)
        lines.append("  ".join(figures) + f"  {name}")
    if not java:
        lines.append("without Java: METEOR is left out, and a plain tokenizer stands in for the PTB tokenizer")
    record = {
        "protocol": args.protocol or None,
        "images": len(scored),
        "references": sum(counts),
        "tokenizer": tokenizer,
        "rows": [{"captions": name, **dict.fromkeys(METRICS), **scores} for name, scores in found.items()],
    }
    front.finish(args, record, lines)


if __name__ == "__main__":
    run_main(main)
