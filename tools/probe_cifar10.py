"""A run or model and CIFAR-10 in, the accuracy of one linear layer on its frozen image features out."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from clipdist.errors import run_main

if TYPE_CHECKING:
    from clipdist.evals.probe import Probe

EXAMPLES = """examples:
  python tools/probe_cifar10.py runs/demo --data data/demo/cifar-10-batches-py
  python tools/probe_cifar10.py RN50 --weights openai --data cifar-10-python.tar.gz --json"""


def main() -> None:
    args = parse_args()

    from clipdist.data.cifar import read_cifar10

    data = read_cifar10(args.data)  # a damaged file is heard of before torch is imported

    from clipdist.engine.distributed import resolve_device
    from clipdist.evals.probe import extract_features, pixel_features
    from clipdist.model.load import load_model

    device = resolve_device(args.device)
    loaded = load_model(args.model, weights=args.weights, trust_weights=args.trust_weights)
    size = loaded.model.spec.image_size
    train, test = (
        extract_features(loaded.model, part.images, size, device, args.batch) for part in (data.train, data.test)
    )
    probe = fit(data, train, test, device, "fit on features")
    pixels = fit(data, pixel_features(data.train.images), pixel_features(data.test.images), device, "fit on pixels")
    chance = 100.0 / len(data.classes)
    print(f"{loaded.label}: {len(train)} training and {len(test)} test pictures, {train.shape[1]} features; percent")
    print_table(probe, pixels, chance)
    if args.json:
        record = {
            "accuracy": probe.accuracy,
            "baseline_pixels": pixels.accuracy,
            "chance": chance,
            "train": len(train),
            "test": len(test),
            "l2": probe.l2,
            "l2_pixels": pixels.l2,
            "per_class": probe.per_class,
            "features": train.shape[1],
            "model": loaded.label,
            "step": loaded.step,
        }
        print(json.dumps(record))


def fit(data: Any, train: Any, test: Any, device: str, title: str) -> Probe:
    import torch
    from tqdm import tqdm

    from clipdist.evals.probe import L2_GRID, fit_probe

    train_labels, test_labels = (torch.from_numpy(part.labels).to(device) for part in (data.train, data.test))
    with tqdm(total=len(L2_GRID) + 1, desc=title, disable=None) as progress:
        return fit_probe(
            train.to(device), train_labels, test.to(device), test_labels, data.classes, on_fit=progress.update
        )


def print_table(probe: Probe, pixels: Probe, chance: float) -> None:
    width = max(len("all classes"), *(len(name) for name in probe.classes))
    print(f"{'':{width}}{'features':>10}{'raw pixels':>12}{'chance':>9}")
    for name, accuracy in probe.per_class.items():
        print(f"{name:{width}}{accuracy:10.1f}{pixels.per_class[name]:12.1f}")
    print(f"{'all classes':{width}}{probe.accuracy:10.1f}{pixels.accuracy:12.1f}{chance:9.1f}")
    print(f"{'L2 penalty':{width}}{probe.l2:10.1g}{pixels.l2:12.1g}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains one linear layer (L-BFGS, penalty by hold-out) on the features of the frozen image tower.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="run or checkpoint folder, or an open_clip name with --weights")
    parser.add_argument("--data", required=True, metavar="PATH", help="cifar-10-batches-py, or cifar-10-python.tar.gz")
    parser.add_argument("--weights", default="", help="of an open_clip name: a tag or a file")
    parser.add_argument("--trust-weights", action="store_true", help="run a TorchScript file that is not OpenAI's")
    parser.add_argument("--batch", type=int, default=64, help="pictures per forward pass (64)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if args.batch < 1:
        parser.error(f"--batch {args.batch}: must be at least 1")
    return args


if __name__ == "__main__":
    run_main(main)
