"""Find one perturbation that changes a model's answer to most images, and measure it on others."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from clipdist.errors import UserError, run_main
from clipdist.evals import front

if TYPE_CHECKING:
    from torch import Tensor

    from clipdist.data.transform import EvalTransform
    from clipdist.datasets.labelled import LabelledSet, Split
    from clipdist.evals.embed import WorkShare
    from clipdist.evals.perturb import Classify
    from clipdist.models.dual_encoder import DualEncoder

EXAMPLES = """examples:
  python tools/universal_perturbation.py runs/demo --data runs/demo-data/labelled --out v.png
  python tools/universal_perturbation.py RN50 --weights openai --data imagenet --classes imagenet --norm 2 --json
  python tools/universal_perturbation.py runs/demo --data cifar-10-python.tar.gz --classifier probe --method gradient"""
SHOWN = 6  # held-out images on the sheet


def main() -> None:
    args = parse_args()
    templates, data, names = front.open_classes(args)

    from safetensors.torch import save_file

    from clipdist.distributed.rank import resolve_device
    from clipdist.evals.embed import model_encoder
    from clipdist.evals.perturb import default_xi, feature_classifier, measure_perturbation, universal_perturbation
    from clipdist.evals.zero_shot import zero_shot_classifier

    device, share = resolve_device(args.device), front.share_of_work(args)
    needs_text = "" if args.classifier == "probe" else "--classifier zero-shot"
    loaded = front.load(args, args.model, needs_text=needs_text)
    model, transform = loaded.model.to(device), loaded.model.spec.transform
    if model.spec.patch_budget:
        raise UserError(f"{args.model}: its images keep their aspect ratio, and a perturbation is of one size")
    xi = default_xi(args.norm, transform.size) if args.xi is None else args.xi
    (train, train_labels), (images, labels) = choose_images(data, transform, args, share)
    if args.classifier == "probe":
        classify = probe_of_training_images(model, data, device, share)
    else:
        encode = model_encoder(model, device)
        prompts = zero_shot_classifier(encode, loaded.tokenizer, names, templates, share).to(device)
        assert model.logit_scale is not None
        classify = feature_classifier(model, model.logit_scale.detach().exp() * prompts)
    settings = {name: getattr(args, name) for name in ("norm", "method", "delta", "passes", "batch", "seed")}
    with tqdm(desc=args.method, unit=" pictures", disable=None) as bar:
        found = universal_perturbation(classify, train, xi, device=device, on_images=bar.update, **settings)
    v = found.v.to(device)
    measured = measure_perturbation(classify, v, images, labels, data.classes, args.norm, args.batch)
    record = measured | {
        "fooling_rate_train": found.rates[-1],
        "fooling_rate_passes": list(found.rates),
        "passes": len(found.rates),
        "passes_at_most": args.passes,
        "reached": found.rates[-1] > 100.0 * (1.0 - args.delta),
        "xi": xi,
        "held_out": len(labels),
    }
    record |= {name: getattr(args, name) for name in ("norm", "delta", "method", "classifier")}
    print_table(record, f"{loaded.label}, {args.classifier} classifier on {data.name}", len(train_labels))
    if args.out:
        draw(args, classify, v, images[:SHOWN], data.classes)
        numbers = args.out.with_suffix(".safetensors")  # v as it is, fp32 [3, S, S]
        save_file({"v": found.v.contiguous()}, numbers, {"perturbation": json.dumps(record)})
        print(f"{args.out}: the perturbation, and pictures with it; the numbers: {numbers}")
    record |= {"data": data.name, "model": loaded.label, "step": loaded.step, "pictures": len(train_labels)}
    front.finish(args, record, run_dir=loaded.run_dir, tool="universal_perturbation")


def choose_images(
    data: LabelledSet, transform: EvalTransform, args: argparse.Namespace, share: WorkShare
) -> list[tuple[Tensor, Tensor]]:
    """Choose random images to find v on, and others to try it on; a set without a training part is halved.

    Returns:
        uint8 [n, 3, S, S] and labels int64 [n] of both.
    """
    import torch

    generator = torch.Generator().manual_seed(args.seed)
    held_out = torch.randperm(len(data.test), generator=generator).tolist()
    if data.train:
        train = torch.randperm(len(data.train), generator=generator).tolist()
    else:
        train, held_out = held_out[: len(held_out) // 2], held_out[len(held_out) // 2 :]
    if not train:
        raise UserError(f"{args.data}: {len(data.test)} pictures are too few to find a perturbation and to try it")
    chosen = ((data.train or data.test, train[: args.pictures]), (data.test, held_out[: args.held_out]))
    return [decode(split, rows, transform, args, share) for split, rows in chosen]


def decode(
    split: Split, rows: list[int], transform: EvalTransform, args: argparse.Namespace, share: WorkShare
) -> tuple[Tensor, Tensor]:
    import torch

    from clipdist.evals.features import decode_split

    bad: dict[int, str] = {}
    _, calls = share.of(len(rows))
    batches = decode_split(split, rows, transform, share.batch, calls, share.threads, bad)
    images = torch.cat(list(share.bar(batches, "pictures", calls)))[: len(rows)]
    kept = [place for place, row in enumerate(rows) if row not in bad]
    if bad:
        front.tell(f"left out, cannot be decoded: {len(bad)} of {len(rows)} pictures")
    if not kept:
        raise UserError(f"{args.data}: not one of {len(rows)} pictures can be decoded")
    return images[kept], torch.from_numpy(split.labels[rows])[kept]


def probe_of_training_images(model: DualEncoder, data: LabelledSet, device: str, share: WorkShare) -> Classify:
    from clipdist.evals.features import embed_split, frozen_encoder
    from clipdist.evals.fractions import require_classes
    from clipdist.evals.perturb import probe_classifier

    if data.train is None:
        raise UserError(f"{data.name}: the probe needs training pictures: DIR/train beside DIR/test")
    require_classes(data.train, data.classes)
    encode = frozen_encoder(model, device, "projected")
    train = embed_split(encode, data.train, model.spec.transform, share)
    return probe_classifier(model, train.image, train.labels, data.classes, device, "fit")


def print_table(record: dict[str, Any], title: str, train: int) -> None:
    from clipdist.evals.perturb import NOISE_SEEDS

    goal = f"{'more' if record['reached'] else 'not more'} than {100 * (1 - record['delta']):.0f} % of {train} pictures"
    passes = f"{record['passes']} of at most {record['passes_at_most']} passes"
    print(f"{title}: {record['method']}, {passes}, {goal} fooled")
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


def draw(args: argparse.Namespace, classify: Classify, v: Tensor, images: Tensor, classes: tuple[str, ...]) -> None:
    """Draw v, scaled so that it can be seen, and some held-out images without and with it."""
    from clipdist.evals.perturb import noise_like, perturbation_image, predict
    from clipdist.evals.sheet import SheetRow, contact_sheet

    moved = (images + v.cpu()).round().clamp(0, 255).byte()
    drawn = [perturbation_image(v), perturbation_image(noise_like(v, args.norm, 0))]
    rows = [SheetRow("the universal perturbation, scaled to be seen", drawn, ["v", "noise of the same norm"])]
    for title, shown in (("pictures, and what the classifier takes them for", images), ("the same, perturbed", moved)):
        answers = predict(classify, shown, v.new_zeros(v.shape), args.batch)
        rows.append(SheetRow(title, list(shown), [classes[answer] for answer in answers.tolist()]))
    contact_sheet(rows).save(args.out)


def parse_args() -> argparse.Namespace:
    parser = front.make_parser(
        "Finds one small perturbation that changes the answer to most pictures (Moosavi-Dezfooli et al.,\n"
        "arXiv:1610.08401), and compares it with noise of the same norm on pictures that it was not made for.\n"
        "Pixels are on the scale 0 to 255.",
        EXAMPLES,
    )
    front.add_model(parser, "model")
    front.add_data(parser)
    front.add_prompts(parser)
    add = parser.add_argument
    add("--classifier", choices=("zero-shot", "probe"), default="zero-shot")
    add("--method", choices=("deepfool", "gradient"), default="deepfool", help="(deepfool)")
    add("--norm", choices=("2", "inf"), default="inf", help="of the perturbation's bound (inf)")
    add("--xi", type=float, help="the bound (10 for inf; for 2, 2000 at 224 pixels, less for smaller)")
    add("--delta", type=float, default=0.2, help="stop when more than 1 - delta are fooled (0.2)")
    front.add_number(parser, "--passes", 10, "over the training pictures, at most (10)")
    front.add_number(parser, "--pictures", 1000, "training pictures to find it on (1000)")
    front.add_number(parser, "--held-out", 1000, "test pictures to try it on (1000)")
    add("--seed", type=int, default=0, help="of the choice and order of pictures (0)")
    add("--out", type=Path, metavar="FILE.png", help="draw it, and write FILE.safetensors beside it")
    front.add_work(parser)
    args = parser.parse_args()
    if not 0 <= args.delta < 1:
        parser.error(f"--delta {args.delta}: must be at least 0 and below 1")
    if args.xi is not None and not 0 < args.xi < float("inf"):
        parser.error(f"--xi {args.xi}: must be above 0")
    if args.out and (args.out.suffix.lower() != ".png" or not args.out.parent.is_dir()):
        parser.error(f"--out {args.out}: must be a .png in a folder that is there")
    return args


if __name__ == "__main__":
    run_main(main)
