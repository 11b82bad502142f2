"""A run or model and labelled pictures in, one perturbation that fools its classifier on most pictures out."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdist.errors import UserError, run_main

if TYPE_CHECKING:
    from torch import Tensor

    from clipdist.datasets.labelled import LabelledSet, Split
    from clipdist.evals.perturb import Classify, Universal
    from clipdist.models.dual_encoder import DualEncoder

EXAMPLES = """examples:
  python tools/universal_perturbation.py runs/demo --data data/demo/cifar-10-batches-py --out v.png
  python tools/universal_perturbation.py RN50 --weights openai --data imagenet --classes imagenet --norm 2 --json
  python tools/universal_perturbation.py runs/demo --data cifar-10-python.tar.gz --classifier probe --method gradient"""
NOISE_SEEDS = 5
SHOWN = 6  # held-out pictures on the sheet


@dataclass(frozen=True)
class Pictures:
    """Pictures as the model takes them, uint8 [n, 3, S, S], and their labels, int64 [n]."""

    images: Tensor
    labels: Tensor


def main() -> None:
    args = parse_args()

    from clipdist.evals.prompts import find_classes, find_templates

    templates = find_templates(args.templates)  # what is misspelt is heard of before torch is imported
    from clipdist.datasets.labelled import open_labelled

    data = open_labelled(args.data)
    names = find_classes(args.classes, data.classes)

    from clipdist.distributed.rank import resolve_device
    from clipdist.evals.perturb import default_xi
    from clipdist.evals.results import keep_result
    from clipdist.models.load import load_model

    device = resolve_device(args.device)
    loaded = load_model(args.model, weights=args.weights, trust_weights=args.trust_weights, device=device)
    size = loaded.model.spec.image_size
    xi = default_xi(args.norm, size) if args.xi is None else args.xi
    train, held_out = choose_pictures(data, size, args)
    if args.classifier == "probe":
        classify = probe_of_training_pictures(loaded.model, data, device, args.batch)
    else:
        classify = zero_shot_of_prompts(loaded, names, templates, device, args.batch)
    found = search(classify, train, xi, device, args)
    record = measure(classify, found, held_out, xi, data.classes, device, args)
    print_table(record, f"{loaded.label}, {args.classifier} classifier on {data.name}", len(train.labels))
    if args.out:
        draw(args.out, classify, found.v.to(device), held_out, data.classes, args).save(args.out)
        print(f"{args.out}: the perturbation, and pictures with it; the numbers: {save(args.out, found.v, record)}")
    record |= {"data": data.name, "model": loaded.label, "step": loaded.step, "pictures": len(train.labels)}
    keep_result(loaded.run_dir, "universal_perturbation", record)
    if args.json:
        print(json.dumps(record))


def choose_pictures(data: LabelledSet, size: int, args: argparse.Namespace) -> tuple[Pictures, Pictures]:
    """Random pictures to find v on, and others to try it on; a set without a training part is halved."""
    import torch

    generator = torch.Generator().manual_seed(args.seed)
    held_out = torch.randperm(len(data.test), generator=generator).tolist()
    if data.train:
        train = torch.randperm(len(data.train), generator=generator).tolist()
    else:
        train, held_out = held_out[: len(held_out) // 2], held_out[len(held_out) // 2 :]
    if not train:
        raise UserError(f"{args.data}: {len(data.test)} pictures are too few to find a perturbation and to try it")
    first = decode(data.train or data.test, train[: args.pictures], size, args)
    return first, decode(data.test, held_out[: args.held_out], size, args)


def decode(split: Split, rows: list[int], size: int, args: argparse.Namespace) -> Pictures:
    import torch
    from tqdm import tqdm

    from clipdist.data.loader import default_threads
    from clipdist.evals.features import read_pictures

    bad: set[int] = set()
    calls = -(-len(rows) // args.batch)
    batches = read_pictures(split, rows, size, args.batch, calls, default_threads(), bad)
    images = torch.cat(list(tqdm(batches, "pictures", calls, disable=None)))[: len(rows)]
    kept = [place for place, row in enumerate(rows) if row not in bad]
    if bad:
        print(f"left out, cannot be decoded: {len(bad)} of {len(rows)} pictures", file=sys.stderr)
    if not kept:
        raise UserError(f"{args.data}: not one of {len(rows)} pictures can be decoded")
    return Pictures(images[kept], torch.from_numpy(split.labels[rows])[kept])


def zero_shot_of_prompts(
    loaded: Any, names: tuple[str, ...], templates: tuple[str, ...], device: str, batch: int
) -> Classify:
    from clipdist.evals.embed import model_encoder
    from clipdist.evals.perturb import feature_classifier
    from clipdist.evals.zero_shot import zero_shot_classifier

    encode = model_encoder(loaded.model, device)
    classifier = zero_shot_classifier(encode, loaded.tokenizer, names, templates, batch).to(device)
    return feature_classifier(loaded.model, loaded.model.logit_scale.detach().exp() * classifier)


def probe_of_training_pictures(model: DualEncoder, data: LabelledSet, device: str, batch: int) -> Classify:
    from tqdm import tqdm

    from clipdist.data.loader import default_threads
    from clipdist.evals.features import embed_split, frozen_encoder
    from clipdist.evals.perturb import probe_classifier
    from clipdist.evals.probe import most_fits, require_classes

    if data.train is None:
        raise UserError(f"{data.name}: the probe needs training pictures: DIR/train beside DIR/test")
    require_classes(data.train, data.classes)
    encode = frozen_encoder(model, device, "projected")
    train = embed_split(encode, data.train, model.spec.image_size, batch, default_threads())
    with tqdm(total=most_fits("lbfgs"), desc="fit", disable=None) as bar:
        return probe_classifier(model, train.image, train.labels, data.classes, device, bar.update)


def search(classify: Classify, train: Pictures, xi: float, device: str, args: argparse.Namespace) -> Universal:
    from tqdm import tqdm

    from clipdist.evals.perturb import universal_perturbation

    with tqdm(desc=args.method, unit=" pictures", disable=None) as bar:
        return universal_perturbation(
            classify,
            train.images,
            xi,
            args.norm,
            args.method,
            args.delta,
            args.passes,
            args.batch,
            args.seed,
            device,
            on_pictures=bar.update,
        )


def measure(
    classify: Classify,
    found: Universal,
    held_out: Pictures,
    xi: float,
    classes: tuple[str, ...],
    device: str,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Everything that is told of v; rates and accuracies in percent."""
    import torch

    from clipdist.evals.perturb import commonest_answer, fooling_rate, noise_like, predict

    def answers(added: Tensor, eight_bit: bool = False) -> Tensor:
        return predict(classify, held_out.images, added, args.batch, eight_bit)

    def accuracy(predictions: Tensor) -> float:
        return 100.0 * (predictions == held_out.labels).double().mean().item()

    v = found.v.to(device)
    before, after = answers(torch.zeros_like(v)), answers(v)
    noisy = [answers(noise_like(v, args.norm, seed)) for seed in range(NOISE_SEEDS)]
    noise_rates = [fooling_rate(before, noise) for noise in noisy]
    name, share = commonest_answer(after, classes)
    return {
        "fooling_rate": fooling_rate(before, after),
        "fooling_rate_train": found.rates[-1],
        "fooling_rate_noise": sum(noise_rates) / NOISE_SEEDS,
        "fooling_rate_noise_max": max(noise_rates),
        "fooling_rate_8bit": fooling_rate(before, answers(v, eight_bit=True)),
        "fooling_rate_passes": list(found.rates),
        "accuracy": accuracy(before),
        "accuracy_perturbed": accuracy(after),
        "accuracy_noise": sum(map(accuracy, noisy)) / NOISE_SEEDS,
        "passes": len(found.rates),
        "passes_at_most": args.passes,
        "norm": args.norm,
        "xi": xi,
        "norm_2": v.norm().item(),
        "norm_inf": v.abs().max().item(),
        "commonest_answer": name,
        "commonest_answer_share": share,
        "reached": found.rates[-1] > 100.0 * (1.0 - args.delta),
        "delta": args.delta,
        "method": args.method,
        "classifier": args.classifier,
        "held_out": len(held_out.labels),
    }


def print_table(record: dict[str, Any], title: str, pictures: int) -> None:
    goal = (
        f"{'more' if record['reached'] else 'not more'} than {100 * (1 - record['delta']):.0f} % of {pictures} pictures"
    )
    print(
        f"{title}: {record['method']}, {record['passes']} of at most {record['passes_at_most']} passes, {goal} fooled"
    )
    bound = f"bound {record['xi']:g} on {'the largest' if record['norm'] == 'inf' else 'L2'}"
    print(f"v: L2 {record['norm_2']:.1f}, largest {record['norm_inf']:.2f}, on the scale 0 to 255; {bound}")
    print(f"{record['held_out']} held-out pictures, percent".ljust(40) + f"{'fooled':>10}{'accuracy':>10}")
    for row, rate, accuracy in (
        ("as they are", None, "accuracy"),
        ("with v", "fooling_rate", "accuracy_perturbed"),
        ("with v, rounded and clipped to 8 bits", "fooling_rate_8bit", None),
        (f"with noise of that norm ({NOISE_SEEDS} seeds)", "fooling_rate_noise", "accuracy_noise"),
        ("training pictures with v", "fooling_rate_train", None),
    ):
        print(f"{row:40}" + "".join(f"{record[key]:10.2f}" if key else " " * 10 for key in (rate, accuracy)))
    print(f"commonest answer with v: {record['commonest_answer']}, {record['commonest_answer_share']:.1f} %")


def draw(
    out: Path, classify: Classify, v: Tensor, held_out: Pictures, classes: tuple[str, ...], args: argparse.Namespace
) -> Any:
    """A sheet of v, scaled so that it can be seen, and some held-out pictures without and with it."""
    from clipdist.evals.perturb import noise_like, perturbation_picture, predict
    from clipdist.evals.sheet import SheetRow, contact_sheet

    images = held_out.images[:SHOWN]
    moved = (images + v.cpu()).round().clamp(0, 255).byte()
    drawn = [perturbation_picture(v), perturbation_picture(noise_like(v, args.norm, 0))]
    rows = [SheetRow("the universal perturbation, scaled to be seen", drawn, ["v", "noise of the same norm"])]
    for title, shown in (("pictures, and what the classifier takes them for", images), ("the same, perturbed", moved)):
        answers = predict(classify, shown, v.new_zeros(v.shape), args.batch)
        rows.append(SheetRow(title, list(shown), [classes[answer] for answer in answers.tolist()]))
    return contact_sheet(rows)


def save(out: Path, v: Tensor, record: dict[str, Any]) -> Path:
    """v as it is, fp32 [3, S, S], beside the picture."""
    from safetensors.torch import save_file

    path = out.with_suffix(".safetensors")
    save_file({"v": v.contiguous()}, path, {"perturbation": json.dumps(record)})
    return path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Finds one small perturbation that changes the answer to most pictures (Moosavi-Dezfooli et al.,\n"
        "arXiv:1610.08401), and compares it with noise of the same norm on pictures that it was not made for.\n"
        "Pixels are on the scale 0 to 255.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="run or checkpoint folder, or an open_clip name with --weights")
    parser.add_argument(
        "--data", required=True, metavar="PATH", help="CIFAR's python version, an image folder, or shards with labels"
    )
    parser.add_argument("--classifier", choices=("zero-shot", "probe"), default="zero-shot")
    parser.add_argument(
        "--classes", default="", metavar="FILE", help="a class name per line, by label; or imagenet (the data's own)"
    )
    parser.add_argument(
        "--templates",
        default="a photo of a {}.",
        metavar="NAME|FILE|TEXT",
        help="cifar10, imagenet, simple, a file with one per line, or one template (%(default)r)",
    )
    parser.add_argument("--method", choices=("deepfool", "gradient"), default="deepfool", help="(deepfool)")
    parser.add_argument("--norm", choices=("2", "inf"), default="inf", help="of the perturbation's bound (inf)")
    parser.add_argument("--xi", type=float, help="the bound (10 for inf; for 2, 2000 at 224 pixels, less for smaller)")
    parser.add_argument("--delta", type=float, default=0.2, help="stop when more than 1 - delta are fooled (0.2)")
    parser.add_argument("--passes", type=int, default=10, help="over the training pictures, at most (10)")
    parser.add_argument("--pictures", type=int, default=1000, help="training pictures to find it on (1000)")
    parser.add_argument("--held-out", type=int, default=1000, help="test pictures to try it on (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice and order of pictures (0)")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="draw it, and write FILE.safetensors beside it")
    parser.add_argument("--weights", default="", help="of an open_clip name: a tag or a file")
    parser.add_argument("--trust-weights", action="store_true", help="run a TorchScript file that is not OpenAI's")
    parser.add_argument("--batch", type=int, default=64, help="pictures per forward pass (64)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    for name in ("batch", "passes", "pictures", "held_out"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if not 0 <= args.delta < 1:
        parser.error(f"--delta {args.delta}: must be at least 0 and below 1")
    if args.xi is not None and not 0 < args.xi < float("inf"):
        parser.error(f"--xi {args.xi}: must be above 0")
    if args.out and (args.out.suffix.lower() != ".png" or not args.out.parent.is_dir()):
        parser.error(f"--out {args.out}: must be a .png in a folder that is there")
    return args


if __name__ == "__main__":
    run_main(main)
