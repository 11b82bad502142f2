"""A run or model, shards and a sentence in; the most similar pictures out: a list with scores and a contact sheet."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from clipdist.errors import UserError, run_main

EXAMPLES = """examples:
  python tools/search_images.py runs/demo data/demo/train data/demo/test "a red circle above a blue square"
  python tools/search_images.py RN50 --weights openai data/flickr8k/test "This is a dog" --top-k 12 --out dog.png"""


def main() -> None:
    args = parse_args()

    from clipdist.data.catalog import Catalog

    catalog = Catalog.open(args.shards, what="SHARDS")  # a misspelt folder is heard of before torch is imported

    from clipdist.data.loader import default_threads
    from clipdist.data.reader import open_reader
    from clipdist.engine.distributed import resolve_device
    from clipdist.evals.embed import embed_catalog, model_encoder
    from clipdist.evals.sheet import contact_sheet, hits_row
    from clipdist.model.load import load_model

    device = resolve_device(args.device)
    loaded = load_model(args.run, weights=args.weights, trust_weights=args.trust_weights)
    out = args.out or default_sheet(loaded.run_dir, args.sentence)
    make_folder(out)
    encode = model_encoder(loaded.model, device)
    size, threads = loaded.model.spec.image_size, default_threads()
    embeddings = embed_catalog(encode, catalog, loaded.tokenizer, size, args.batch, threads, texts=False)
    for reason, keys in embeddings.bad.items():
        print(f"left out, {reason}: {len(keys)} ({', '.join(keys[:3])}{', ...' if keys[3:] else ''})", file=sys.stderr)
    rows, scores = best_rows(encode, loaded.tokenizer([args.sentence]), embeddings.image, args.top_k)
    sample_ids = embeddings.sample_ids[rows].tolist()
    reader = open_reader(catalog)
    try:
        hits = [describe(reader, sample_id, score) for sample_id, score in zip(sample_ids, scores)]
        contact_sheet([hits_row(args.sentence, reader, sample_ids, scores)]).save(out)
    finally:
        reader.close()
    print(f'"{args.sentence}" among {len(embeddings.keys)} pictures, by {loaded.label}')
    print_table(hits)
    print(f"contact sheet: {out}")
    if args.json:
        ranked = [{"rank": rank, **hit} for rank, hit in enumerate(hits, start=1)]
        print(json.dumps({"query": args.sentence, "hits": ranked, "sheet": str(out)}))


def best_rows(encode: Any, tokens: Any, image_features: Any, top_k: int) -> tuple[Any, list[float]]:
    """Rows of the pictures with the highest cosine, int64 [k], and the cosines.

    Raises:
        UserError: no picture, or features that are not finite.
    """
    import torch
    import torch.nn.functional as F

    if not len(image_features):
        raise UserError("no picture in the shards could be decoded")
    with torch.no_grad():
        _, text_features = encode(None, tokens)
    query = F.normalize(text_features.float().cpu(), dim=1)
    scores = (F.normalize(image_features, dim=1) @ query.T).squeeze(1)
    if not torch.isfinite(scores).all():
        raise UserError("the features are not finite: the weights have diverged")
    top = scores.topk(min(top_k, len(scores)))
    return top.indices, top.values.tolist()


def describe(reader: Any, sample_id: int, score: float) -> dict[str, Any]:
    from clipdist.evals.sheet import first_caption

    return {
        "score": round(score, 6),
        "key": reader.key(sample_id),
        "shard": str(reader.catalog.shards[reader.catalog.locate(sample_id)[0]].tar),
        "filename": str(reader.metadata(sample_id).get("filename", "")),
        "caption": first_caption(reader, sample_id),
    }


def print_table(hits: list[dict[str, Any]]) -> None:
    key = max(len("key"), *(len(hit["key"]) for hit in hits))
    name = max(len("filename"), *(len(hit["filename"]) for hit in hits))
    print(f"{'rank':>4}  {'score':>6}  {'key':{key}}  {'filename':{name}}  first caption")
    for rank, hit in enumerate(hits, start=1):
        print(f"{rank:4}  {hit['score']:6.3f}  {hit['key']:{key}}  {hit['filename']:{name}}  {hit['caption']}")


def default_sheet(run_dir: Path | None, sentence: str) -> Path:
    """RUN/search/<sentence>.png; for a model without a run folder, search/ where the tool was started."""
    slug = re.sub(r"\W+", "-", sentence.lower()).strip("-")[:60] or "query"
    return (run_dir or Path()) / "search" / f"{slug}.png"


def make_folder(out: Path) -> None:
    """Before the long work, not after it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another file with --out") from None
    if not os.access(out.parent, os.W_OK) or out.is_dir():
        raise UserError(f"{out}: cannot be written; name another file with --out")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Finds the pictures that a sentence describes best, in any number of shard folders.",
        epilog=EXAMPLES,
        usage='%(prog)s RUN SHARDS [SHARDS ...] "SENTENCE" [options]',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="run or checkpoint folder, or an open_clip name with --weights")
    parser.add_argument(
        "words", metavar="SHARDS SENTENCE", nargs="+", help="shard folders, patterns or tars; the sentence comes last"
    )
    parser.add_argument("--top-k", type=int, default=8, help="how many pictures (8)")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the contact sheet (RUN/search/<sentence>.png)")
    parser.add_argument("--weights", default="", help="of an open_clip name: a tag or a file")
    parser.add_argument("--trust-weights", action="store_true", help="run a TorchScript file that is not OpenAI's")
    parser.add_argument("--batch", type=int, default=64, help="pictures per forward pass (64)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_intermixed_args()  # options may stand between the folders and the sentence
    *args.shards, args.sentence = args.words
    if not args.shards:
        parser.error("expected RUN, at least one shard folder, and a sentence at the end")
    if not args.sentence.strip():
        parser.error("the sentence is empty")
    if args.sentence.endswith(".tar") or (os.path.isdir(args.sentence) and any(Path(args.sentence).glob("*.tar"))):
        parser.error(f"the last word is the sentence, but {args.sentence} are shards; add a sentence in quotes")
    if args.out and args.out.suffix.lower() != ".png":
        parser.error(f"--out {args.out}: must end in .png")
    if args.top_k < 1 or args.batch < 1:
        parser.error("--top-k and --batch must be at least 1")
    return args


if __name__ == "__main__":
    run_main(main)
