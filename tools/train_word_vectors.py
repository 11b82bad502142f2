"""Train word vectors on the captions of shards, for model.word_vectors of a CBOW or LSTM text tower."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from clipdist.config import Model
from clipdist.errors import require_extra, run_main
from clipdist.evals import front

EXAMPLES = """examples:
  python tools/train_word_vectors.py data/flickr8k/train --out flickr8k.vectors.txt --nearest dog red running
  python tools/train_word_vectors.py data/flickr8k/train --model configs/models/rn10_lstm.json --out lstm.vectors.txt
  python clipdist/train.py --config configs/flickr8k_rn10.yaml model.word_vectors=flickr8k.vectors.txt"""
MODEL = "configs/models/rn10_cbow.json"
NEIGHBOURS = 5


def parse_args() -> argparse.Namespace:
    parser = front.make_parser(__doc__, EXAMPLES)
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="shards with captions to train on")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="in word2vec's text format")
    what = f"whose text tower gives width and vocabulary ({MODEL})"
    parser.add_argument("--model", default=MODEL, metavar="FILE.json", help=what)
    front.add_number(parser, "--epochs", 20, "over all captions (20)", "N")
    front.add_number(parser, "--seed", 0, "(0)", "N", 0, 2**32 - 1)
    parser.add_argument("--nearest", nargs="+", default=[], metavar="WORD", help="show the words nearest to these")
    front.add_members(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    front.require_writable(args.out, "--out")
    require_extra("tools/train_word_vectors.py", ["gensim"], "words")
    from clipdist.models.spec import resolve_spec

    spec = resolve_spec(Model(name=args.model, word_vectors=str(args.out)))
    catalog = front.open_catalog(args, args.shards)

    from clipdist.data.bad_sample import BadSample
    from clipdist.data.reader import open_reader
    from clipdist.data.tokens import BPETokenizer
    from clipdist.models.word_vectors import Sentences, nearest_words, train_vectors, write_vectors

    tower = spec.model["text_cfg"][spec.own_text]
    sentences = Sentences(BPETokenizer(tower["vocab_size"], tower["context_length"]))
    left_out: dict[str, list[str]] = {}
    reader = open_reader(catalog)
    try:
        for sample_id in tqdm(range(len(catalog)), desc="read the captions", unit="sample", disable=None):
            try:
                sentences.add(reader.sample(sample_id).captions())
            except BadSample as error:
                left_out.setdefault(error.reason, []).append(reader.key(sample_id))
    finally:
        reader.close()
    front.tell_left_out(left_out)
    with tqdm(total=args.epochs, desc="train", unit="epoch", disable=None) as bar:
        vectors = train_vectors(sentences, tower["width"], args.epochs, args.seed, bar.update)
    write_vectors(args.out, vectors)

    lines = [
        f"{len(vectors)} words and pieces of words from {len(sentences)} captions, {tower['width']} numbers each:"
        f" {args.out}"
    ]
    nearest = {}
    for word in args.nearest:
        if word not in vectors:
            lines.append(f"{word}: has no vector: not one token of {args.model}, or in too few captions")
            continue
        nearest[word] = nearest_words(vectors, word, NEIGHBOURS)
        lines.append(f"{word}: " + ", ".join(f"{other} {cosine:.2f}" for other, cosine in nearest[word]))
    record = {"vectors": len(vectors), "captions": len(sentences), "width": tower["width"], "nearest": nearest}
    front.finish(args, {"file": str(args.out), **record}, lines)


if __name__ == "__main__":
    run_main(main)
