"""Train one linear layer on the frozen image features of a model, and compare it with pixels and random weights."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdist.errors import UserError, run_main
from clipdist.evals import front

if TYPE_CHECKING:
    import numpy as np

    from clipdist.datasets.labelled import LabelledSet
    from clipdist.distributed.rank import DistEnv
    from clipdist.evals.features import Features
    from clipdist.evals.probe import Probe

EXAMPLES = """examples:
  python tools/probe_cifar10.py runs/demo --data runs/demo-data/labelled
  python tools/probe_cifar10.py RN50 --weights openai --data cifar-10-python.tar.gz --json
  python tools/probe_cifar10.py runs/mine --data cifar-100-python.tar.gz --fractions 1,10,100 --finetune
  torchrun --nproc-per-node 8 tools/probe_cifar10.py runs/mine --data imagenet_folder --batch 256 --solver sgd"""
# Radford et al. 2021, table 10, linear probe on all of CIFAR-10: percent, by the SHA-256 of OpenAI's file.
PUBLISHED = {"afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762": ("RN50", 88.7)}
PUBLISHED_ON = ("CIFAR-10", 50_000, 10_000)


def main() -> None:
    args = parse_args()

    from clipdist.datasets.labelled import open_labelled

    data = open_labelled(args.data)  # a damaged file is heard of before the model is loaded
    check_data(data, args)
    with front.joined_ranks(args) as dist_env:
        probe_model(args, data, dist_env)


def check_data(data: LabelledSet, args: argparse.Namespace) -> None:
    """Raise UserError where a set cannot be probed as asked; costs no time."""
    from clipdist.evals.fractions import label_fraction, require_classes

    if data.train is None:
        raise UserError(f"{args.data}: no training pictures: the probe needs DIR/train beside DIR/test")
    require_classes(data.train, data.classes)
    for percent in args.fractions:
        label_fraction(data.train.labels, percent, 0, data.classes)


def probe_model(args: argparse.Namespace, data: LabelledSet, dist_env: DistEnv) -> None:
    """Compute features on all ranks and do the rest on rank 0."""
    from clipdist.data.transform import EvalTransform
    from clipdist.evals.features import PIXEL_SIDE, embed_set, features_path, frozen_encoder, pixel_encoder, random_twin
    from clipdist.evals.finetune import finetune, simclr_schedule
    from clipdist.evals.fractions import over_fractions
    from clipdist.evals.probe import EPOCHS, fit_features, require_unchanged
    from clipdist.models.weights import weights_checksum

    loaded = front.load(args, args.model)
    before = weights_checksum(loaded.model)
    folder = (loaded.run_dir or Path.home() / ".cache" / "clipdist") / "features"
    share, device = front.share_of_work(args, dist_env), str(dist_env.device)
    features: dict[str, Features] = {}
    for title, model in (("features", loaded.model), ("random weights", random_twin(loaded.model))):
        cache = None if args.no_cache else features_path(folder, model, data, args.features)
        encode = frozen_encoder(model, device, args.features)
        features[title] = embed_set(encode, data, model.spec.transform, share, cache)
    small = EvalTransform(PIXEL_SIDE)
    features["raw pixels"] = embed_set(pixel_encoder, data, small, dataclasses.replace(share, progress=False))
    if dist_env.rank:
        return
    own = features["features"]
    for name, part in (("training", own.train), ("test", own.test)):
        if part.left_out:
            front.tell(f"left out, cannot be decoded: {part.left_out} {name} pictures")
    probes: dict[str, Probe] = {}
    settings = {"device": device, "solver": args.solver, "epochs": args.epochs or EPOCHS}
    for title in ("features", "raw pixels", "random weights"):
        probes[title] = fit_features(features[title], data.classes, f"fit on {title}", **settings)

    def probe_share(percent: float, seed: int, rows: np.ndarray) -> Probe:
        if percent == 100 and seed == 0:
            return probes["features"]
        return fit_features(own, data.classes, f"{percent:g} %, seed {seed}", seed=seed, rows=rows, **settings)

    def tune_on_share(percent: float, seed: int, rows: np.ndarray) -> Probe:
        schedule = simclr_schedule(percent, args.batch, args.epochs)
        frozen, kind = own.train.image, args.features
        return finetune(loaded.model, data, rows, frozen, schedule, kind, seed, device, share.threads)

    assert data.train is not None  # as check_data has seen
    fractions = over_fractions(probe_share, own.train.labels, data.classes, args.fractions, args.seeds)
    shares = (args.fractions or [100.0]) if args.finetune else []
    tuned = over_fractions(tune_on_share, data.train.labels, data.classes, shares, args.seeds)
    require_unchanged(loaded.model, before)
    published = published_accuracy(args, data)
    record = (
        {"protocol": protocol(args)}
        | record_of(probes, own, data)
        | {"fractions": fractions, "finetune": tuned, "checksum": before}
    )
    record |= {"model": loaded.label, "step": loaded.step, "kind": args.features, "solver": args.solver}
    record |= {"protocol": protocol(args), "published": published[1] if published else None}
    print_tables(record, probes, published)
    confusion = write_confusion(args.picture, probes["features"], loaded.run_dir)
    record |= {"picture": str(confusion) if confusion else None}
    front.finish(args, record, run_dir=loaded.run_dir, tool="probe_cifar10")


def protocol(args: argparse.Namespace) -> str:
    """Return in words how the figures were made."""
    features = {"tower": "features before the projection", "projected": "unit-length features after the projection"}
    solvers = {
        "lbfgs": "L-BFGS, L2 penalty by accuracy on a held-out fifth",
        "sgd": "SGD on standardised features, learning rate by the loss on a held-out fifth",
    }
    paper = " (Radford et al. 2021, A.3)" if (args.features, args.solver) == ("tower", "lbfgs") else ""
    return f"{features[args.features]}, {solvers[args.solver]}{paper}"


def record_of(probes: dict[str, Probe], features: Features, data: LabelledSet) -> dict[str, Any]:
    probe, pixels, drawn = probes["features"], probes["raw pixels"], probes["random weights"]
    return {
        "data": data.name,
        "train": len(features.train.image),
        "test": len(features.test.image),
        "features": features.train.image.shape[1],
        "accuracy": probe.accuracy,
        "top5": probe.top5,
        "baseline_pixels": pixels.accuracy,
        "baseline_random": drawn.accuracy,
        "chance": 100.0 / len(data.classes),
        "l2": probe.l2,
        "l2_pixels": pixels.l2,
        "l2_random": drawn.l2,
        "lr": probe.lr,
        "per_class": probe.per_class,
    }


def published_accuracy(args: argparse.Namespace, data: LabelledSet) -> tuple[str, float] | None:
    """Return (OpenAI's model, percent) where weights, data and protocol are those of the paper."""
    if (args.features, args.solver) != ("tower", "lbfgs"):
        return None
    if data.train is None or (data.name, len(data.train), len(data.test)) != PUBLISHED_ON:
        return None
    if args.weights == "openai":
        return next((found for found in PUBLISHED.values() if args.model in (found[0], f"{found[0]}-quickgelu")), None)
    file = Path(args.weights)
    if not (args.weights and file.is_file()):
        return None
    return PUBLISHED.get(hashlib.sha256(file.read_bytes()).hexdigest())


def write_confusion(asked: Path | None, probe: Probe, run_dir: Path | None) -> Path | None:
    """Draw the confusion matrix, where it is asked for or there is a run to lay it in."""
    from clipdist.report.confusion import MOST_CLASSES, confusion_image, confusion_matrix

    path = asked or (run_dir and run_dir / "probe_confusion.png")
    if not path or len(probe.classes) > MOST_CLASSES:
        return None
    drawn = confusion_image(confusion_matrix(probe.labels, probe.predictions, len(probe.classes)), probe.classes)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(path, "PNG")
    except OSError as error:
        if asked:
            raise UserError(f"--picture {path}: cannot be written ({error.strerror})") from None
        return None  # nobody asked for one in a run that may not be written to
    print(f"confusion matrix: {path}")
    return path


def print_tables(record: dict[str, Any], probes: dict[str, Probe], published: tuple[str, float] | None) -> None:
    print(
        f"{record['model']} on {record['data']}: {record['train']} training and {record['test']} test pictures,"
        f" {record['features']} features; percent\nprotocol: {record['protocol']}"
    )
    per_class = [probe.per_class for probe in probes.values()]
    rows = [(name, [found[name] for found in per_class], "") for name in per_class[0]]
    chance = record["chance"]
    rows.append(("all classes", [probe.accuracy for probe in probes.values()], f"{chance:9.1f}"))
    rows.append(("top 5", [probe.top5 for probe in probes.values()], f"{min(100.0, 5 * chance):9.1f}"))
    width = max(len("all classes"), *map(len, probes["features"].classes))
    print(f"{'':{width}}" + "".join(f"{title:>16}" for title in probes) + f"{'chance':>9}")
    for name, values, last in rows:
        print(f"{name:{width}}" + "".join(f"{value:16.1f}" for value in values) + last)
    title, found = ("L2 penalty", "l2") if record["lr"] is None else ("rate", "lr")
    print(f"{title:{width}}" + "".join(f"{getattr(probe, found):16.1g}" for probe in probes.values()))
    print_fractions("frozen tower, one linear layer", record["fractions"])
    print_fractions("tower trained too", record["finetune"])
    if published:
        print(f"published for OpenAI's {published[0]}: {published[1]} (Radford et al. 2021, table 10)")
    print(f"nothing but the last layer moved: SHA-256 of all weights {record['checksum'][:16]}... before and after")


def print_fractions(title: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    print(f"{title}: {rows[0]['seeds']} seeds")
    print(f"{'labels':>8}{'pictures':>10}{'top 1':>8}{'95 % interval':>18}{'top 5':>8}")
    for row in rows:
        between = "-" if row["low"] is None else f"{row['low']:.1f} to {row['high']:.1f}"
        print(f"{row['percent']:6g} %{row['pictures']:10}{row['mean']:8.1f}{between:>18}{row['top5']:8.1f}")


def parse_args() -> argparse.Namespace:
    parser = front.make_parser(
        "Trains one linear layer on the features of the frozen image tower, by the protocol of the CLIP paper:"
        "\nfeatures before the projection, L-BFGS, the L2 penalty swept on a held-out part. Features are kept in"
        "\nRUN/features, or in ~/.cache/clipdist/features for a model that is not from a run.",
        EXAMPLES,
    )
    front.add_model(parser, "model")
    front.add_data(parser)
    add = parser.add_argument
    add("--features", choices=("projected", "tower"), default="tower", help="before (tower) or after the projection")
    add("--solver", choices=("lbfgs", "sgd"), default="lbfgs", help="full-batch L-BFGS with a penalty, or SGD without")
    what = "also on these shares of the labels, percent: 1,10,100"
    add("--fractions", type=percents, default=[], metavar="P,P", help=what)
    front.add_number(parser, "--seeds", 3, "of every fraction, at most 10 (3)", most=10)
    add("--finetune", action="store_true", help="also train the tower, on --fractions or on all labels")
    what = "of --solver sgd (50) and of --finetune (60 on 1 %% of the labels, 30 on more)"
    front.add_number(parser, "--epochs", None, what)
    add("--picture", type=Path, metavar="FILE.png", help="confusion matrix (beside a run: probe_confusion.png)")
    add("--no-cache", action="store_true", help="neither read nor keep features")
    front.add_work(parser)
    return parser.parse_args()


def percents(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give percent with commas between them, such as 1,10,100") from None


if __name__ == "__main__":
    run_main(main)
