"""Classify labelled images by sentences: accuracy and calibration of a model's zero-shot classifier."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from clipdist.errors import UserError, run_main
from clipdist.evals import front

EXAMPLES = """examples:
  python tools/zero_shot.py runs/demo --data runs/demo-data/labelled --templates cifar10 --confusion demo.png
  python tools/zero_shot.py RN50 --weights openai --data imagenet --classes imagenet --templates imagenet --json
  torchrun --nproc-per-node 8 tools/zero_shot.py ViT-B-32 --weights openai --data imagenet --classes names.txt"""
LISTED = 50  # classes that the table has room for; of more, it shows the WORST that are recognised least
WORST = 10


def main() -> None:
    args = parse_args()
    templates, data, names = front.open_classes(args)
    check_confusion(args.confusion, len(names))

    from clipdist.evals.embed import model_encoder
    from clipdist.evals.features import embed_split
    from clipdist.evals.zero_shot import class_accuracy, classify, zero_shot_classifier, zero_shot_metrics
    from clipdist.report.confusion import confusion_image, confusion_matrix

    with front.joined_ranks(args) as dist_env:
        loaded = front.load(args, args.model, needs_text="zero-shot classification")
        encode, share = model_encoder(loaded.model, dist_env.device), front.share_of_work(args, dist_env)
        classifier = zero_shot_classifier(encode, loaded.tokenizer, names, templates, share)
        test = embed_split(encode, data.test, loaded.model.spec.transform, share)
    if dist_env.rank:
        return
    if test.left_out:
        front.tell(f"left out, cannot be decoded: {test.left_out} of {len(data.test)} pictures")
    labels, scale = test.labels, loaded.model.logit_scale
    assert scale is not None  # as there is a text tower
    metrics = zero_shot_metrics(test.image, labels, classifier, scale)
    predictions = classify(test.image, classifier, scale).predictions
    accuracies = class_accuracy(predictions, labels, len(data.classes))
    per_class = {data.classes[label]: accuracy for label, accuracy in accuracies.items()}
    print(f"{loaded.label}, zero-shot on {data.name}: {len(labels)} pictures, {len(data.classes)} classes,", end=" ")
    print(f"{len(templates)} template{'s' if len(templates) > 1 else ''}; percent")
    print_table(metrics, per_class)
    if args.confusion:
        confusion_image(confusion_matrix(labels, predictions, len(data.classes)), data.classes).save(args.confusion)
        print(f"confusion matrix: {args.confusion}")
    facts = {"templates": len(templates), "data": data.name, "model": loaded.label, "step": loaded.step}
    record = {**metrics, "per_class": per_class, "left_out": test.left_out, **facts}
    front.finish(args, record, run_dir=loaded.run_dir, tool="zero_shot")


def print_table(metrics: dict[str, float], per_class: dict[str, float]) -> None:
    shown: Sequence[tuple[str, float]] = list(per_class.items())
    if len(shown) > LISTED:
        print(f"the {WORST} classes that are recognised least:")
        shown = sorted(shown, key=lambda item: item[1])[:WORST]
    keys = {"top-1": "top1", "top-5": "top5", "mean of classes": "mean_per_class", "calibration error": "ece"}
    rows = [*shown, *((title, metrics[key]) for title, key in keys.items()), ("chance", metrics["chance"])]
    width = max(len(name) for name, _ in rows)
    for name, accuracy in rows:
        print(f"{name:{width}}{accuracy:9.2f}")


def check_confusion(path: Path | None, classes: int) -> None:
    """Raise UserError where the confusion matrix could not be written once the work is done."""
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
    parser = front.make_parser(
        "Classifies pictures by the class whose prompts lie nearest (CLIP, section 3.1).\n"
        "A class is the mean of its prompts' unit-length features; the confidence is the softmax at the model's own\n"
        "temperature; the calibration error has 15 bins of equal width.",
        EXAMPLES,
    )
    front.add_model(parser, "model")
    front.add_data(parser)
    front.add_prompts(parser)
    parser.add_argument("--confusion", type=Path, metavar="FILE.png", help="write a picture of the confusion matrix")
    front.add_work(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
