"""A run or model and labelled pictures in, the accuracy and calibration of a classifier made of sentences out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipdist.errors import UserError, run_main

if TYPE_CHECKING:
    from torch import Tensor

    from clipdist.datasets.labelled import LabelledSet
    from clipdist.evals.features import SplitFeatures
    from clipdist.models.load import LoadedModel

EXAMPLES = """examples:
  python tools/zero_shot.py runs/demo --data data/demo/cifar-10-batches-py --templates cifar10 --confusion demo.png
  python tools/zero_shot.py RN50 --weights openai --data imagenet --classes imagenet --templates imagenet --json
  torchrun --nproc-per-node 8 tools/zero_shot.py ViT-B-32 --weights openai --data imagenet --classes names.txt"""
LISTED = 50  # classes that the table has room for; of more, it shows the WORST that are recognised least
WORST = 10


def main() -> None:
    args = parse_args()

    from clipdist.evals.prompts import find_classes, find_templates

    templates = find_templates(args.templates)  # what is misspelt is heard of before torch is imported
    from clipdist.datasets.labelled import open_labelled

    data = open_labelled(args.data)
    names = find_classes(args.classes, data.classes)
    check_picture(args.confusion, len(names))

    from clipdist.data.loader import default_threads
    from clipdist.distributed.rank import joined_ranks, resolve_device
    from clipdist.evals.embed import model_encoder
    from clipdist.evals.features import embed_split
    from clipdist.evals.zero_shot import zero_shot_classifier
    from clipdist.models.load import load_model

    with joined_ranks(resolve_device(args.device)) as dist_env:
        rank, world = dist_env.rank, dist_env.world_size
        loaded = load_model(args.model, weights=args.weights, trust_weights=args.trust_weights)
        encode, size = model_encoder(loaded.model, dist_env.device), loaded.model.spec.image_size
        classifier = zero_shot_classifier(encode, loaded.tokenizer, names, templates, args.batch, rank, world)
        test = embed_split(encode, data.test, size, args.batch, default_threads(), rank, world)
    if rank == 0:
        if test.left_out:
            print(f"left out, cannot be decoded: {test.left_out} of {len(data.test)} pictures", file=sys.stderr)
        report(args, data, loaded, test, classifier, len(templates))


def report(
    args: argparse.Namespace,
    data: LabelledSet,
    loaded: LoadedModel,
    test: SplitFeatures,
    classifier: Tensor,
    templates: int,
) -> None:
    """The table, the picture and the JSON object; `templates` is their number."""
    from clipdist.evals.results import keep_result
    from clipdist.evals.zero_shot import class_accuracy, classify, zero_shot_metrics
    from clipdist.report.confusion import confusion_image, confusion_matrix

    labels, scale = test.labels, loaded.model.logit_scale
    metrics = zero_shot_metrics(test.image, labels, classifier, scale)
    predictions = classify(test.image, classifier, scale).predictions
    accuracies = class_accuracy(predictions, labels, len(data.classes))
    per_class = {name: value for name, value in zip(data.classes, accuracies) if value is not None}
    print(f"{loaded.label}, zero-shot on {data.name}: {len(labels)} pictures, {len(data.classes)} classes,", end=" ")
    print(f"{templates} template{'s' if templates > 1 else ''}; percent")
    print_table(metrics, per_class)
    if args.confusion:
        confusion_image(confusion_matrix(labels, predictions, len(data.classes)), data.classes).save(args.confusion)
        print(f"confusion matrix: {args.confusion}")
    facts = {"templates": templates, "data": data.name, "model": loaded.label, "step": loaded.step}
    record = {**metrics, "per_class": per_class, "left_out": test.left_out, **facts}
    keep_result(loaded.run_dir, "zero_shot", record)
    if args.json:
        print(json.dumps(record))


def print_table(metrics: dict[str, float], per_class: dict[str, float]) -> None:
    shown: Sequence[tuple[str, float]] = list(per_class.items())
    if len(shown) > LISTED:
        print(f"the {WORST} classes that are recognised least:")
        shown = sorted(shown, key=lambda item: item[1])[:WORST]
    width = max(len("calibration error"), *(len(name) for name, _ in shown))
    for name, accuracy in shown:
        print(f"{name:{width}}{accuracy:9.2f}")
    for title, key in (
        ("top-1", "top1"),
        ("top-5", "top5"),
        ("mean of classes", "mean_per_class"),
        ("calibration error", "ece"),
        ("chance", "chance"),
    ):
        print(f"{title:{width}}{metrics[key]:9.2f}")


def check_picture(path: Path | None, classes: int) -> None:
    """Raises UserError where the picture could not be written once the work is done."""
    if path is None:
        return
    from clipdist.report.confusion import MOST_CLASSES

    if classes > MOST_CLASSES:
        raise UserError(
            f"--confusion {path}: {classes} classes, but a picture has room for {MOST_CLASSES}; leave it out"
        )
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise UserError(f"--confusion {path}: must be a .png in a folder that is there")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Classifies pictures by the class whose prompts lie nearest (CLIP, section 3.1).\n"
        "A class is the mean of its prompts' unit-length features; the confidence is the softmax at the model's own\n"
        "temperature; the calibration error has 15 bins of equal width.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="run or checkpoint folder, or an open_clip name with --weights")
    parser.add_argument(
        "--data", required=True, metavar="PATH", help="CIFAR's python version, an image folder, or shards with labels"
    )
    parser.add_argument(
        "--classes", default="", metavar="FILE", help="a class name per line, by label; or imagenet (the data's own)"
    )
    parser.add_argument(
        "--templates",
        default="a photo of a {}.",
        metavar="NAME|FILE|TEXT",
        help="cifar10, imagenet, simple, a file with one per line, or one template (%(default)r)",
    )
    parser.add_argument("--confusion", type=Path, metavar="FILE.png", help="write a picture of the confusion matrix")
    parser.add_argument("--weights", default="", help="of an open_clip name: a tag or a file")
    parser.add_argument("--trust-weights", action="store_true", help="run a TorchScript file that is not OpenAI's")
    parser.add_argument("--batch", type=int, default=64, help="pictures or prompts per forward pass (64)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if args.batch < 1:
        parser.error(f"--batch {args.batch}: must be at least 1")
    return args


if __name__ == "__main__":
    run_main(main)
