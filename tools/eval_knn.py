"""Classify labelled images by their nearest neighbours among a model's features, with nothing trained."""

from __future__ import annotations

import argparse
from pathlib import Path

from clipdist.errors import UserError, run_main
from clipdist.evals import front

EXAMPLES = """examples:
  python tools/eval_knn.py runs/demo --data runs/demo-data/labelled
  python tools/eval_knn.py ViT-B-32 --weights openai --data cifar-10-python.tar.gz --json
  torchrun --nproc-per-node 8 tools/eval_knn.py runs/dino --data imagenet_folder --batch 256"""


def main() -> None:
    args = parse_args()

    from clipdist.datasets.labelled import open_labelled

    data = open_labelled(args.data)  # a damaged file is heard of before the model is loaded
    if data.train is None:
        raise UserError(f"{args.data}: no training pictures: their labels are what neighbours vote for (DIR/train)")
    from clipdist.evals.features import embed_set, features_path, frozen_encoder
    from clipdist.evals.knn import NEIGHBOURS, TEMPERATURES, knn_classify

    with front.joined_ranks(args) as dist_env:
        loaded = front.load(args, args.model)
        folder = (loaded.run_dir or Path.home() / ".cache" / "clipdist") / "features"
        cache = None if args.no_cache else features_path(folder, loaded.model, data, "tower")
        encode, share = frozen_encoder(loaded.model, dist_env.device, "tower"), front.share_of_work(args, dist_env)
        features = embed_set(encode, data, loaded.model.spec.transform, share, cache)
        if dist_env.rank:
            return
        settings = [(k, temperature) for k in NEIGHBOURS for temperature in TEMPERATURES]
        train, test, classes = features.train, features.test, data.classes
        found = knn_classify(train.image, train.labels, test.image, len(classes), settings, dist_env.device)
    for name, part in (("training", train), ("test", test)):
        if part.left_out:
            front.tell(f"left out, cannot be decoded: {part.left_out} {name} pictures")
    if len(train.labels) < max(NEIGHBOURS):
        front.tell(f"{len(train.labels)} training pictures: where more neighbours are asked for, all of them vote")
    accuracy = {
        setting: 100.0 * (predicted == test.labels).double().mean().item() for setting, predicted in found.items()
    }
    table = [
        f"{loaded.label} on {data.name}: {len(train.labels)} training and {len(test.labels)} test pictures,"
        f" {train.image.shape[1]} features before the projection; percent, chance {100 / len(classes):.1f}",
        "neighbours" + "".join(f"{f't = {temperature:g}':>10}" for temperature in TEMPERATURES),
        *(f"{k:10}" + "".join(f"{accuracy[k, temperature]:10.2f}" for temperature in TEMPERATURES) for k in NEIGHBOURS),
    ]
    record = {f"knn_{k}": accuracy[k, temperature] for k, temperature in zip(NEIGHBOURS, TEMPERATURES)}
    record |= {f"knn_{k}_t{temperature:g}": value for (k, temperature), value in accuracy.items()}
    facts = {"data": data.name, "train": len(train.labels), "test": len(test.labels), "chance": 100.0 / len(classes)}
    facts |= {"features": train.image.shape[1], "model": loaded.label, "step": loaded.step}
    front.finish(args, record | facts, table, loaded.run_dir, "eval_knn")


def parse_args() -> argparse.Namespace:
    parser = front.make_parser(
        "Classifies each test picture by the votes exp(cosine / t) of its 20 and 200 nearest training pictures, on\n"
        "the features before the projection. knn_20 is the figure at t = 0.07 (DINO), knn_200 at t = 0.1 (lightly).\n"
        "Features are kept where probe_cifar10.py keeps them.",
        EXAMPLES,
    )
    front.add_model(parser, "model")
    front.add_data(parser)
    parser.add_argument("--no-cache", action="store_true", help="neither read nor keep features")
    front.add_work(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
