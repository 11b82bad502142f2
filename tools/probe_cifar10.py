"""A run or model and labelled pictures in, the accuracy of one linear layer on its frozen image features out."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdist.errors import UserError, run_main

if TYPE_CHECKING:
    from clipdist.datasets.labelled import LabelledSet
    from clipdist.evals.features import Features
    from clipdist.evals.probe import Probe

EXAMPLES = """examples:
  python tools/probe_cifar10.py runs/demo --data data/demo/cifar-10-batches-py
  python tools/probe_cifar10.py RN50 --weights openai --data cifar-10-python.tar.gz --features tower --json
  python tools/probe_cifar10.py runs/mine --data cifar-100-python.tar.gz --fractions 1,10,100 --finetune
  torchrun --nproc-per-node 8 tools/probe_cifar10.py runs/mine --data imagenet_folder --batch 256 --solver sgd"""
# Radford et al. 2021, table 10, linear probe on all of CIFAR-10: percent, by the SHA-256 of OpenAI's file.
PUBLISHED = {"afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762": ("RN50", 88.7)}
PUBLISHED_ON = ("CIFAR-10", 50_000, 10_000)


@dataclass(frozen=True)
class Context:
    """What every part of the work asks for."""

    args: argparse.Namespace
    data: LabelledSet
    device: str
    rank: int
    world: int
    threads: int

    def say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)


def main() -> None:
    args = parse_args()

    from clipdist.datasets.labelled import open_labelled

    data = open_labelled(args.data)  # a damaged file is heard of before the model is loaded
    check_data(data, args)

    from clipdist.data.loader import default_threads
    from clipdist.distributed.rank import joined_ranks, resolve_device

    with joined_ranks(resolve_device(args.device)) as dist_env:
        where = str(dist_env.device)
        probe_model(Context(args, data, where, dist_env.rank, dist_env.world_size, default_threads()))


def check_data(data: LabelledSet, args: argparse.Namespace) -> None:
    """Raises UserError where a set cannot be probed as asked; costs no time."""
    from clipdist.evals.probe import label_fraction, require_classes

    if data.train is None:
        raise UserError(f"{args.data}: no training pictures: the probe needs DIR/train beside DIR/test")
    require_classes(data.train, data.classes)
    for percent in args.fractions:
        label_fraction(data.train.labels, percent, 0, data.classes)


def probe_model(context: Context) -> None:
    """All ranks compute features; rank 0 does the rest."""
    from clipdist.evals.features import random_twin
    from clipdist.evals.probe import require_unchanged
    from clipdist.evals.results import keep_result
    from clipdist.models.load import load_model
    from clipdist.models.weights import weights_checksum

    args, data = context.args, context.data
    loaded = load_model(args.model, weights=args.weights, trust_weights=args.trust_weights)
    before = weights_checksum(loaded.model)
    folder = (loaded.run_dir or Path.home() / ".cache" / "clipdist") / "features"
    own = features_of(context, loaded.model, folder)
    drawn = features_of(context, random_twin(loaded.model), folder)
    pixels = pixels_of(context)
    if context.rank:
        return
    tell_left_out(own)
    probes = {
        "features": fit(context, own, "fit on features"),
        "raw pixels": fit(context, pixels, "fit on pixels"),
        "random weights": fit(context, drawn, "fit on random weights"),
    }
    fractions = frozen_fractions(context, own, probes["features"])
    tuned = finetuned_fractions(context, loaded.model, own) if args.finetune else []
    require_unchanged(loaded.model, before)
    width = own.train.image.shape[1]
    what = "before the projection" if args.features == "tower" else "projected"
    print(
        f"{loaded.label} on {data.name}: {len(own.train.image)} training and {len(own.test.image)} test pictures,"
        f" {width} features {what}; percent"
    )
    print_table(probes)
    for title, rows in (("frozen tower, one linear layer", fractions), ("tower trained too", tuned)):
        print_fractions(title, rows)
    published = published_accuracy(context)
    if published:
        print(f"published for OpenAI's {published[0]}: {published[1]} (Radford et al. 2021, table 10)")
    print(f"nothing but the last layer moved: SHA-256 of all weights {before[:16]}... before and after")
    picture = write_picture(context, probes["features"], loaded.run_dir)
    record = record_of(probes, data, fractions, tuned)
    record |= {"train": len(own.train.image), "test": len(own.test.image), "features": width}
    record |= {"model": loaded.label, "step": loaded.step, "checksum": before, "data": data.name}
    record |= {"kind": args.features, "solver": args.solver, "picture": str(picture) if picture else None}
    record |= {"published": published[1] if published else None}
    keep_result(loaded.run_dir, "probe_cifar10", record)
    if args.json:
        print(json.dumps(record))


def features_of(context: Context, model: Any, folder: Path) -> Features:
    from clipdist.evals.features import embed_set, features_path, frozen_encoder

    args, data = context.args, context.data
    encode = frozen_encoder(model, context.device, args.features)
    cache = None if args.no_cache else features_path(folder, model, data, args.features)
    size = model.spec.image_size
    return embed_set(encode, data, size, args.batch, context.rank, context.world, context.threads, cache=cache)


def pixels_of(context: Context) -> Features:
    from clipdist.evals.features import PIXEL_SIDE, embed_set, pixel_encoder

    rank, world, threads = context.rank, context.world, context.threads
    return embed_set(pixel_encoder, context.data, PIXEL_SIDE, context.args.batch, rank, world, threads, progress=False)


def tell_left_out(features: Features) -> None:
    for name, part in (("training", features.train), ("test", features.test)):
        if part.left_out:
            print(f"left out, cannot be decoded: {part.left_out} {name} pictures", file=sys.stderr)


def fit(context: Context, features: Features, title: str, rows: Any = None, seed: int = 0) -> Probe:
    """The layer on all training pictures, or on some rows of them."""
    from tqdm import tqdm

    from clipdist.evals.probe import EPOCHS, fit_probe, most_fits

    args, device = context.args, context.device
    train, labels = features.train.image, features.train.labels
    if rows is not None:
        train, labels = train[rows], labels[rows]
    with tqdm(total=most_fits(args.solver), desc=title, disable=None) as progress:
        return fit_probe(
            train.to(device),
            labels.to(device),
            features.test.image.to(device),
            features.test.labels,
            context.data.classes,
            progress.update,
            args.solver,
            seed,
            args.epochs or EPOCHS,
        )


def frozen_fractions(context: Context, features: Features, whole: Probe) -> list[dict[str, Any]]:
    """The frozen probe on shares of the labels; `whole` is the result of seed 0 on all of them."""
    from clipdist.evals.probe import label_fraction

    rows = []
    for percent in context.args.fractions:
        probes = []
        for seed in range(context.args.seeds):
            chosen = label_fraction(features.train.labels, percent, seed, context.data.classes)
            title = f"{percent:g} %, seed {seed}"
            known = percent == 100 and seed == 0
            probes.append(whole if known else fit(context, features, title, chosen, seed))
        rows.append(fraction_row(percent, len(chosen), probes))
    return rows


def finetuned_fractions(context: Context, model: Any, features: Features) -> list[dict[str, Any]]:
    from clipdist.evals.finetune import finetune, simclr_schedule
    from clipdist.evals.probe import label_fraction

    args, data = context.args, context.data
    assert data.train is not None  # check_data has looked
    rows = []
    for percent in args.fractions or [100.0]:
        schedule = simclr_schedule(percent, args.batch, args.epochs)
        probes = []
        for seed in range(args.seeds):
            chosen = label_fraction(data.train.labels, percent, seed, data.classes)
            probes.append(
                finetune(
                    model, data, chosen, features.train.image, schedule, args.features, seed, context.device,
                    context.threads,
                )
            )  # fmt: skip
        rows.append(fraction_row(percent, len(chosen), probes))
    return rows


def fraction_row(percent: float, pictures: int, probes: list[Probe]) -> dict[str, Any]:
    from clipdist.evals.probe import interval

    top5 = interval([probe.top5 for probe in probes]).mean
    return {"percent": percent, "pictures": pictures, **asdict(interval([p.accuracy for p in probes])), "top5": top5}


def record_of(
    probes: dict[str, Probe], data: LabelledSet, fractions: list[dict[str, Any]], tuned: list[dict[str, Any]]
) -> dict[str, Any]:
    probe, pixels, drawn = probes["features"], probes["raw pixels"], probes["random weights"]
    return {
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
        "fractions": fractions,
        "finetune": tuned,
    }


def published_accuracy(context: Context) -> tuple[str, float] | None:
    """(OpenAI's model, percent) where these are its weights, and the data are what the paper measured on."""
    args, data = context.args, context.data
    assert data.train is not None  # check_data has looked
    if (data.name, len(data.train), len(data.test)) != PUBLISHED_ON:
        return None
    if args.weights == "openai":
        return next((found for found in PUBLISHED.values() if args.model in (found[0], f"{found[0]}-quickgelu")), None)
    file = Path(args.weights)
    if not (args.weights and file.is_file()):
        return None
    import hashlib

    return PUBLISHED.get(hashlib.sha256(file.read_bytes()).hexdigest())


def write_picture(context: Context, probe: Probe, run_dir: Path | None) -> Path | None:
    """The confusion matrix, where it is asked for or there is a run to lay it in."""
    from clipdist.report.confusion import MOST_CLASSES, confusion_image, confusion_matrix

    wanted = Path(context.args.picture) if context.args.picture else run_dir and run_dir / "probe_confusion.png"
    if not wanted or len(probe.classes) > MOST_CLASSES:
        return None
    picture = confusion_image(confusion_matrix(probe.labels, probe.predictions, len(probe.classes)), probe.classes)
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        picture.save(wanted, "PNG")
    except OSError as error:
        if context.args.picture:
            raise UserError(f"--picture {wanted}: cannot be written ({error.strerror})") from None
        return None  # nobody asked for one in a run that may not be written to
    print(f"confusion matrix: {wanted}")
    return wanted


def print_table(probes: dict[str, Probe]) -> None:
    first = probes["features"]
    width = max(len("all classes"), *(len(name) for name in first.classes))
    print(f"{'':{width}}" + "".join(f"{title:>16}" for title in probes) + f"{'chance':>9}")
    classes = [probe.per_class for probe in probes.values()]
    for name in classes[0]:
        print(f"{name:{width}}" + "".join(f"{per_class[name]:16.1f}" for per_class in classes))
    chance = 100.0 / len(first.classes)
    print(
        f"{'all classes':{width}}" + "".join(f"{probe.accuracy:16.1f}" for probe in probes.values()) + f"{chance:9.1f}"
    )
    five = min(100.0, 5 * chance)
    print(f"{'top 5':{width}}" + "".join(f"{probe.top5:16.1f}" for probe in probes.values()) + f"{five:9.1f}")
    title, found = ("L2 penalty", "l2") if first.lr is None else ("rate", "lr")
    print(f"{title:{width}}" + "".join(f"{getattr(probe, found):16.1g}" for probe in probes.values()))


def print_fractions(title: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    print(f"{title}: {rows[0]['seeds']} seeds")
    print(f"{'labels':>8}{'pictures':>10}{'top 1':>8}{'95 % interval':>18}{'top 5':>8}")
    for row in rows:
        between = "-" if row["low"] is None else f"{row['low']:.1f} to {row['high']:.1f}"
        print(f"{row['percent']:6g} %{row['pictures']:10}{row['mean']:8.1f}{between:>18}{row['top5']:8.1f}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains one linear layer on the features of the frozen image tower: L-BFGS with a penalty found on"
        "\na held-out part (with --features tower: the protocol of the CLIP paper), or SGD. Features are kept in"
        "\nRUN/features, or in ~/.cache/clipdist/features for a model that is not from a run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="run or checkpoint folder, or an open_clip name with --weights")
    add("--data", required=True, metavar="PATH", help="CIFAR-10 or -100 (folder or tar), an image folder, or shards")
    add("--weights", default="", help="of an open_clip name: a tag or a file")
    add("--trust-weights", action="store_true", help="run a TorchScript file that is not OpenAI's")
    add("--features", choices=("projected", "tower"), default="projected", help="after or before the projection")
    add("--solver", choices=("lbfgs", "sgd"), default="lbfgs", help="full-batch L-BFGS with a penalty, or SGD without")
    add("--fractions", default="", metavar="P,P", help="also on these shares of the labels, percent: 1,10,100")
    add("--seeds", type=int, default=3, help="of every fraction (3)")
    add("--finetune", action="store_true", help="also train the tower, on --fractions or on all labels")
    add("--epochs", type=int, help="of --solver sgd (50) and of --finetune (60 on 1 %% of the labels, 30 on more)")
    add("--picture", metavar="FILE.png", help="confusion matrix (beside a run: probe_confusion.png)")
    add("--no-cache", action="store_true", help="neither read nor keep features")
    add("--batch", type=int, default=64, help="pictures per pass (64)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    args.fractions = parse_fractions(parser, args.fractions)
    for name, value, most in (("batch", args.batch, None), ("epochs", args.epochs, None), ("seeds", args.seeds, 10)):
        if value is not None and (value < 1 or (most and value > most)):
            parser.error(f"--{name} {value}: must be at least 1" + (f", at most {most}" if most else ""))
    return args


def parse_fractions(parser: argparse.ArgumentParser, text: str) -> list[float]:
    try:
        fractions = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        parser.error(f"--fractions {text}: give percent with commas between them, such as 1,10,100")
    for percent in fractions:
        if not 0 < percent <= 100:
            parser.error(f"--fractions {percent:g}: give percent above 0, at most 100")
    return fractions


if __name__ == "__main__":
    run_main(main)
