"""A run or model and captioned shards in, the retrieval table of both directions out."""

from __future__ import annotations

import argparse
import json
import sys

from clipdist.errors import UserError, run_main

EXAMPLES = """examples:
  python tools/eval_retrieval.py runs/demo data/demo/test
  python tools/eval_retrieval.py RN50 --weights openai 'data/flickr8k/test/{00000..00003}.tar' --json"""


def main() -> None:
    args = parse_args()

    from clipdist.data.catalog import Catalog

    catalog = Catalog.open(args.shards, what="SHARDS")  # a misspelt folder is heard of before torch is imported

    from clipdist.data.loader import default_threads
    from clipdist.engine.distributed import resolve_device
    from clipdist.evals.embed import embed_catalog, model_encoder
    from clipdist.evals.retrieval import retrieval_metrics
    from clipdist.model.load import load_model

    device = resolve_device(args.device)
    loaded = load_model(args.run, weights=args.weights, trust_weights=args.trust_weights)
    embeddings = embed_catalog(
        model_encoder(loaded.model, device),
        catalog,
        loaded.tokenizer,
        loaded.model.spec.image_size,
        batch=args.batch,
        threads=default_threads(),
    )
    for reason, keys in embeddings.bad.items():
        print(f"left out, {reason}: {len(keys)} ({', '.join(keys[:3])}{', ...' if keys[3:] else ''})", file=sys.stderr)
    if not embeddings.captions:
        raise UserError(f"{' '.join(args.shards)}: no picture with a caption in {len(catalog)} samples")
    metrics = retrieval_metrics(embeddings.image, embeddings.text, embeddings.text_image)
    print_table(loaded.label, metrics)
    if args.json:
        left_out = {reason: len(keys) for reason, keys in embeddings.bad.items()}
        print(json.dumps({**metrics, "model": loaded.label, "step": loaded.step, "left_out": left_out}))


def print_table(label: str, metrics: dict[str, float]) -> None:
    n, m = int(metrics["candidates"]), int(metrics["captions"])
    print(f"{label}: {n} pictures, {m} captions; R@K in percent, ranks from 1")
    print(f"{'':18}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'median rank':>14}{'mean rank':>12}")
    for name, direction in (("text to image", "t2i"), ("image to text", "i2t")):
        recalls = "".join(f"{metrics[f'{direction}_r{k}']:8.2f}" for k in (1, 5, 10))
        median, mean = metrics[f"{direction}_median_rank"], metrics[f"{direction}_mean_rank"]
        print(f"{name:18}{recalls}{median:14.0f}{mean:12.1f}")
    chance = "".join(f"{min(100.0, metrics['chance'] * k):8.2f}" for k in (1, 5, 10))
    print(f"{'chance, to image':18}{chance}{(n + 1) / 2:14.0f}{(n + 1) / 2:12.1f}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Retrieval between pictures and captions: R@1, R@5, R@10, median and mean rank, both directions.\n"
        "A tie counts against the model; image to text takes the best placed of a picture's captions.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="run or checkpoint folder, or an open_clip name with --weights")
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="shard folders, brace patterns, or tars")
    parser.add_argument("--weights", default="", help="of an open_clip name: a tag or a file")
    parser.add_argument("--trust-weights", action="store_true", help="run a TorchScript file that is not OpenAI's")
    parser.add_argument("--batch", type=int, default=64, help="pictures or captions per forward pass (64)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if args.batch < 1:
        parser.error(f"--batch {args.batch}: must be at least 1")
    return args


if __name__ == "__main__":
    run_main(main)
