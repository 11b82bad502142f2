"""Fine-tune a model on images of yours: look at them, hold some out, propose a recipe, train, compare with before."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder is not where the other tools are imported from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import hashlib
import json
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from clipdist.config import REPOSITORY, Config, load_config
from clipdist.errors import UserError, run_main, writing
from clipdist.evals import front
from clipdist.storage import write_text

if TYPE_CHECKING:
    from clipdist import config
    from clipdist.datasets.hold_out import Parts
    from clipdist.estimate.propose import TuningData
    from clipdist.evals.suite import EvalSet

EXAMPLES = """examples:
  python tools/finetune.py pets --from ViT-B-32:openai --dry-run            # pets/CLASS/*.jpg: the recipe alone
  python tools/finetune.py pets --from ViT-B-32:openai --keep cifar-10-python.tar.gz --templates cifar10
  python tools/finetune.py captions.csv --from runs/mine --out runs/tuned --train lora

The recipe is RUN/recipe.yaml, each line with its reason. Edit it and call again with the same --out: it is taken as it
is, and a run that was cut off goes on. docs/finetuning.md says more."""
RECIPE, CALL, PARTS, SHARDS = "recipe.yaml", "finetune.json", "parts.json", "shards"  # in the run folder
TOOL = "finetune"
HELD_OUT_SET = "held out"
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
LOST = 1.0  # points of --keep above which the hint on averaged weights is given


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.train and (args.out / RECIPE).exists():
        raise UserError(f"--train {args.train}: {args.out / RECIPE} is there; edit it, or remove it for a new one")
    keep = open_keep(args)
    require_data(args.data)
    from clipdist.models.load import starting_point

    start, loss = starting_point(args.start, args.trust_weights)
    hold_call(args)
    data = prepare(args)
    recipe = write_recipe(args, start, loss, data)
    settings = load_config(recipe)
    if settings.run.dir.resolve() != args.out.resolve():
        raise UserError(
            f"{recipe}: run.root and run.name say {settings.run.dir}, and it lies in {args.out}; set them back"
        )
    if args.dry_run:
        front.finish(
            args, {"recipe": str(recipe)}, [f"written: {recipe}; the same call without --dry-run trains by it"]
        )
        return 0
    record = results_of(args, recipe)
    if record is None:
        ended = train_and_compare(args, settings, recipe, [open_target(data), *([keep] if keep else [])])
        if isinstance(ended, int):
            return ended
        record = ended
    report(args, record, data)
    return 0


def require_data(data: str) -> None:
    """Raise UserError where nothing is there; patterns and lists of shards are left to the catalog."""
    if not Path(data).exists() and not any(mark in data for mark in "*?[{") and "://" not in data:
        raise UserError(f"{data}: no such file or folder")


def open_keep(args: argparse.Namespace) -> EvalSet | None:
    """Return the labelled set of --keep."""
    from clipdist.evals.suite import open_set

    if not args.keep and (args.templates or args.classes):
        raise UserError("--templates and --classes belong to --keep")
    if not args.keep:
        return None
    return open_set(f"kept ({Path(args.keep).name})", "zero_shot", args.keep, args.templates, args.classes, "--keep")


def hold_call(args: argparse.Namespace) -> None:
    """Note in the run folder what it is for.

    Raises:
        UserError: it holds another run, or cannot be written.
    """
    path = args.out / CALL
    call = {"data": args.data, "from": args.start}
    if path.is_file() and any((args.out / name).exists() for name in (PARTS, SHARDS)):
        there = read_note(path)
        differs = [f"{name} {there.get(name)}, not {value}" for name, value in call.items() if there.get(name) != value]
        if differs:
            raise UserError(f"--out {args.out}: holds a run with {differs[0]}; name another folder")
        return
    if not path.is_file() and args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise UserError(f"--out {args.out}: holds something else; name a new folder")
    with writing(f"--out {args.out}", "; name another folder"):
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(call) + "\n")


def read_note(path: Path) -> dict[str, Any]:
    """Return what an earlier call noted. Raise UserError where it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path}: is damaged; name another --out, or remove {path.parent}") from None


# Data


def prepare(args: argparse.Namespace) -> TuningData:
    """Make shards where there are none, and divide them once. Return where the two parts are."""
    from clipdist.data.catalog import Catalog
    from clipdist.datasets.hold_out import HELD_OUT, TRAIN, Parts, divide
    from clipdist.estimate.propose import TuningData

    noted = args.out / PARTS
    if noted.is_file():
        print(f"divided by an earlier call: {args.out / TRAIN}, {args.out / HELD_OUT}")
        try:
            parts = Parts(**read_note(noted))
        except TypeError:
            raise UserError(f"{noted}: is of another version; name another --out, or remove {args.out}") from None
    else:
        sources = shards_of(args)
        parts = divide(Catalog.open(sources, what="DATA"), args.out)
        write_text(noted, json.dumps(asdict(parts)) + "\n")
    for line in describe(parts):
        print(line)
    return TuningData(args.out / TRAIN, args.out / HELD_OUT, parts.train, parts.held_out, bool(parts.classes))


def shards_of(args: argparse.Namespace) -> list[str]:
    """Return the shards to train on, and those to hold out where the data has a part for that."""
    made = str(args.out / SHARDS)
    kind = kind_of(Path(args.data))
    if kind == "classes":
        from tools.shard_images import main as shard_images

        shard_images([args.data, "--out", made])
    elif kind == "pairs":
        from tools.shard_pairs import main as shard_pairs

        shard_pairs([args.data, "--out", made])
    folder = Path(args.data if kind == "shards" else made)
    if not (folder / "train").is_dir():
        return [str(folder)]
    given = [folder / name for name in ("val", "test") if any((folder / name).glob("*.tar"))]
    return [str(folder / "train"), *map(str, given[:1])]


def kind_of(data: Path) -> str:
    """Return shards, pairs (a list, or images with their captions beside them) or classes (labelled by folder)."""
    from clipdist.data.index import IMAGE_KINDS
    from clipdist.datasets.files import walk

    if not data.is_dir():
        return "pairs" if data.suffix.lower() in TABLES else "shards"
    if any(data.glob("*.tar")) or any(data.glob("train/*.tar")):
        return "shards"
    for here, _, names in walk(data):
        for name in sorted(names):
            if name.rpartition(".")[2].lower() in IMAGE_KINDS and not name.startswith("."):
                image = Path(here, name)
                beside = any(image.with_suffix(end).exists() for end in (".txt", ".json"))
                return "pairs" if beside or image.parent == data else "classes"
    return "pairs"


def describe(parts: Parts) -> list[str]:
    least, most = parts.captions
    each = f"{least}" if least == most else f"{least} to {most}"
    what = f"{len(parts.classes)} classes" if parts.classes else f"{each} caption{'s' * (each != '1')} each"
    lines = [
        f"data: {parts.images} images, {what}, shorter side {parts.pixels} pixels in the median",
        f"{parts.train:>10}  to train on\n{parts.held_out:>10}  held out, by image",
        *front.count_lines("left out, cannot be used:", parts.unusable),
    ]
    return [*lines, f"{parts.in_both:>10}  copies of held-out images, left out"] if parts.in_both else lines


def open_target(data: TuningData) -> EvalSet:
    """Return the held-out images: a zero-shot classifier of their classes, or retrieval by their captions."""
    from clipdist.evals.suite import open_set

    return open_set(HELD_OUT_SET, "zero_shot" if data.labelled else "retrieval", str(data.held_out))


# Recipe and training


def write_recipe(args: argparse.Namespace, start: config.Model, loss: str, data: TuningData) -> Path:
    """Propose a recipe and write it, unless there is one. Print it, and return where it is."""
    path = args.out / RECIPE
    if path.is_file():
        print(f"recipe: {path}, as it is there")
    else:
        from clipdist.distributed.rank import resolve_device
        from clipdist.estimate.propose import propose, recipe_text

        settings = propose(start, loss, data, args.out, resolve_device(args.device), args.train)
        title = f"Fine-tuning of {args.start} on {args.data}, proposed by tools/finetune.py; to be edited."
        write_text(
            path, recipe_text(f"{title}\nThe same without the tool: python clipdist/train.py --config {path}", settings)
        )
        print(f"recipe: {path}")
    print(path.read_text(encoding="utf-8"), end="", flush=True)
    return path


def train_and_compare(
    args: argparse.Namespace, settings: Config, recipe: Path, sets: list[EvalSet]
) -> dict[str, Any] | int:
    """Measure, train, measure again. Return the record, or the exit code of a training that did not end well."""
    from clipdist.evals.compare import answers, compare
    from clipdist.models.load import load_named
    from launch.local_job import run_here

    with front.joined_ranks(args) as dist_env:
        share, device = front.share_of_work(args, dist_env), str(dist_env.device)
        print("before the training: how it fares as it is", flush=True)
        before = answers(sets, load_named(args.start, args.trust_weights), share, device)
    if settings.device != "cpu":
        import torch

        torch.cuda.empty_cache()  # for the ranks, which are other processes
    program = [sys.executable, "-u", str(REPOSITORY / "launch/rank.py"), "--config", str(recipe)]
    code = run_here(settings, args.out / "log", [*program, "--resume-command", args.again])
    if code:
        return code
    with front.joined_ranks(args) as dist_env:
        tuned = load_named(str(args.out), args.trust_weights)
        after = answers(sets, tuned, share, device)
    rows = [row for each, was, now in zip(sets, before, after) for row in compare(each, was, now)]
    return {
        "start": args.start,
        "model": tuned.label,
        "fingerprint": tuned.fingerprint,
        "recipe": digest(recipe),
        "keep": kept_as(args),
        "sets": {each.name: each.source for each in sets},
        "rows": [row.record() for row in rows],
    }


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def results_of(args: argparse.Namespace, recipe: Path) -> dict[str, Any] | None:
    """Return the record of an earlier call with this recipe, these weights and these sets; None: there is none."""
    from clipdist.checkpoint.format import MANIFEST, newest_checkpoint
    from clipdist.evals.results import read_results

    known, newest = read_results(args.out).get(TOOL), newest_checkpoint(args.out)
    if known is None or newest is None:
        return None
    fingerprint = hashlib.sha256((newest / MANIFEST).read_bytes()).hexdigest()[:16]  # see LoadedModel
    same = known["recipe"] == digest(recipe) and known["fingerprint"] == fingerprint and known["keep"] == kept_as(args)
    return known if same else None


def kept_as(args: argparse.Namespace) -> list[str]:
    return [args.keep or "", args.templates, args.classes]


# Results


def report(args: argparse.Namespace, record: dict[str, Any], data: TuningData) -> None:
    """Print what got better and what got worse, and write the page."""
    from clipdist.evals.results import keep_result
    from clipdist.report.words import label_of
    from tools.report import main as write_page

    rows = record["rows"]
    print(f"{record['start']} -> {record['model']}; percent; in brackets the 95 % interval of the difference")
    names = [f"{row['set']}, {label_of(row['figure']).removesuffix(', %')}" for row in rows]
    width = max(map(len, names))
    print(f"{'':{width}}{'before':>9}{'after':>9}{'difference':>12}")
    for name, row in zip(names, rows):
        interval = f"  ({row['low']:+.2f} to {row['high']:+.2f})"
        figures = f"{row['before']:9.2f}{row['after']:9.2f}{row['difference']:+12.2f}"
        print(f"{name:{width}}{figures}{interval:22}{row['verdict']}".rstrip())
    for verdict in ("better", "worse"):
        found = [name for name, row in zip(names, rows) if row["verdict"] == verdict]
        print(f"got {verdict}: {'; '.join(found) or 'nothing that the intervals show'}")
    print(f"the interval is that of {data.held_out_images} held-out images; the last step was taken, not the best")
    if any(row["set"] != HELD_OUT_SET and row["difference"] < -LOST for row in rows):
        print(f"between both models lies one that keeps more (WiSE-FT):\n  {wise_command(args, data)}")
    keep_result(args.out, TOOL, record)
    write_page([str(args.out)])
    front.finish(args, record)


def wise_command(args: argparse.Namespace, data: TuningData) -> str:
    words = ["python", "tools/interpolate.py", args.start, str(args.out), "--keep", args.keep]
    words += ["--templates", args.templates] if args.templates else []
    words += ["--classes", args.classes] if args.classes else []
    target = ["--alpha", "0.5"] if data.labelled else ["--alpha", "0:1:0.1", "--target", str(data.held_out)]
    return shlex.join([*words, *target, "--out", f"{args.out}-wise"])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = front.make_parser(
        "Fine-tunes a model: looks at the data, holds a part of it out, proposes a recipe for this machine and this\n"
        "amount of data, trains, and measures before and after, on what is held out and on what shall be kept.",
        EXAMPLES,
    )
    add = parser.add_argument
    what = "a folder of images by class, a CSV, TSV, JSONL or Parquet file, a folder of pairs, or shards"
    add("data", metavar="DATA", help=what)
    what = "NAME:TAG, NAME:FILE, a Hugging Face folder, or a run"
    add("--from", dest="start", required=True, metavar="MODEL", help=what)
    add("--keep", metavar="PATH", help="labelled images, as zero_shot.py --data: what shall not be forgotten")
    front.add_prompts(parser)
    add("--train", choices=("projections", "lora", "full"), help="what trains; default: by model, data and machine")
    add("--out", type=Path, metavar="RUN", help="the run folder (runs/finetune-DATA)")
    add("--dry-run", action="store_true", help="stop after the recipe")
    add("--trust-weights", action="store_true", help="run a TorchScript file that is not OpenAI's")
    front.add_work(parser)
    args = parser.parse_args(argv)
    args.again = shlex.join(["python", "tools/finetune.py", *(sys.argv[1:] if argv is None else argv)])
    args.out = args.out or Path("runs", f"finetune-{Path(args.data).resolve().name.partition('.')[0]}")
    return args


if __name__ == "__main__":
    run_main(main)
