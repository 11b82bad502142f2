"""The command line that the tools share: arguments, labelled data, ranks, the model, results.

Nothing here imports torch before it is needed: a misspelt word is reported before that takes its seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdist.errors import UserError

if TYPE_CHECKING:
    from clipdist.data.catalog import Catalog
    from clipdist.data.members import Members
    from clipdist.datasets.labelled import LabelledSet
    from clipdist.distributed.rank import DistEnv
    from clipdist.evals.embed import WorkShare
    from clipdist.models.load import LoadedModel


def make_parser(description: str, examples: str, usage: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with --json, whose help shows both texts with their line breaks."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=examples, usage=usage, formatter_class=form)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser


class _Number(argparse.Action):
    """The action of an option that takes a number in least .. most."""

    def __init__(self, *args: Any, least: float = 1, most: float = math.inf, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.least, self.most = least, most

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, *_: Any) -> None:
        if not self.least <= value <= self.most:
            allowed = f"be at least {self.least}" if self.most == math.inf else f"lie in {self.least} .. {self.most}"
            parser.error(f"{self.option_strings[0]} {value}: must {allowed}")
        setattr(namespace, self.dest, value)


def add_number(
    parser: argparse.ArgumentParser,
    flag: str,
    default: float | None,
    text: str,
    metavar: str | None = None,
    least: float = 1,
    most: float = math.inf,
) -> None:
    """Add an option that takes a number of the default's type (None: an integer) in least .. most."""
    limits: dict[str, Any] = {"action": _Number, "least": least, "most": most}
    kind = float if isinstance(default, float) else int
    parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=text, **limits)


class _Renamed(argparse.Action):
    """The action of an option's former name, which is not shown in the help."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error(f"{self.option_strings[0]} is {self.const} now; write that")


def add_renamed(parser: argparse.ArgumentParser, old: str, new: str) -> None:
    """Answer the former name of an option in one line."""
    parser.add_argument(old, action=_Renamed, const=new, nargs="?", help=argparse.SUPPRESS)


def add_processes(parser: argparse.ArgumentParser, of: str = "") -> None:
    """Add --processes, as in_order takes them."""
    add_number(parser, "--processes", 0, f"{of}default: one per core", "N", 0, 1024)


def add_model(parser: argparse.ArgumentParser, name: str = "run", optional: bool = False) -> None:
    """Add the model's position and where its weights are; `load` reads both."""
    what = "run, checkpoint or Hugging Face CLIP folder, or an open_clip name with --weights"
    parser.add_argument(name, metavar=name.upper(), nargs="?" if optional else None, help=what)
    parser.add_argument("--weights", default="", help="of an open_clip name: a tag or a file")
    parser.add_argument("--trust-weights", action="store_true", help="run a TorchScript file that is not OpenAI's")
    _add_ema(parser)


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add the positions of several models; `load_named` reads each."""
    what = "run, checkpoint or Hugging Face CLIP folders, or NAME:WEIGHTS (an open_clip name with a tag or a file)"
    parser.add_argument("models", metavar="RUN", nargs="+", help=what)
    parser.add_argument("--trust-weights", action="store_true", help="run TorchScript files that are not OpenAI's")
    _add_ema(parser)


def _add_ema(parser: argparse.ArgumentParser) -> None:
    what = "of a run with train.ema: the moving average of its weights; no figures are kept for the report"
    parser.add_argument("--ema", action="store_true", help=what)


def add_data(parser: argparse.ArgumentParser) -> None:
    what = "CIFAR-10 or -100 (folder or tar), an image folder, or shards with labels"
    parser.add_argument("--data", required=True, metavar="PATH", help=what)


def add_prompts(parser: argparse.ArgumentParser) -> None:
    what = "a class name per line, by label; or imagenet (the data's own)"
    parser.add_argument("--classes", default="", metavar="FILE", help=what)
    what = (
        "cifar10, imagenet, simple, a file with one per line, or one template (the data's own, or 'a photo of a {}.')"
    )
    parser.add_argument("--templates", default="", metavar="NAME|FILE|TEXT", help=what)


def add_members(parser: argparse.ArgumentParser) -> None:
    """Add which members of a sample are its image and its captions; `members_of_arguments` reads them."""
    names: dict[str, Any] = {"type": lambda text: text.split(","), "default": [], "metavar": "LIST"}
    parser.add_argument("--image-members", help="suffixes, as data.image_members: jpg,img", **names)
    parser.add_argument("--caption-members", help="as data.caption_members: json:text,cap", **names)
    what = "as data.caption_lines: whether lines of a text are captions (auto)"
    parser.add_argument("--caption-lines", choices=("auto", "split", "whole"), default="auto", help=what)


def add_images_only(parser: argparse.ArgumentParser) -> None:
    what = "samples need no captions: one without is good for objectives that need no text"
    parser.add_argument("--images-only", action="store_true", help=what)


def members_of_arguments(args: argparse.Namespace) -> Members:
    """Return what the options of add_members ask for."""
    from clipdist.config import Data
    from clipdist.data.members import members_of

    names = {"image_members": args.image_members, "caption_members": args.caption_members}
    return members_of(Data(**names, caption_lines=args.caption_lines))


def open_catalog(args: argparse.Namespace, shards: Sequence[str], captions: bool = True) -> Catalog:
    """Open the shards of a tool with the options of add_members, and look at some samples; see Catalog.open, look_at.

    Args:
        captions: whether samples need any.
    """
    from clipdist.data.catalog import Catalog
    from clipdist.data.first_look import look_at

    require_shards(shards)
    catalog = Catalog.open(shards, what="SHARDS", members=members_of_arguments(args))
    catalog.contents = look_at(catalog, "SHARDS", shards, captions)
    return catalog


def add_work(parser: argparse.ArgumentParser) -> None:
    """Add what every tool that computes features takes: --batch, --device."""
    add_number(parser, "--batch", 64, "pictures or sentences per forward pass (64)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def require_writable(path: Path | None, option: str) -> None:
    """Make the folder of an output before the long work.

    Raises:
        UserError: the file could not be written there.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written there ({error.strerror}); name another file") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{option} {path}: cannot be written there; name a file in a folder of yours")


def require_shards(sources: Sequence[str]) -> None:
    """Raise UserError where RUN and SHARDS are swapped: one of the sources is the folder of a run or model."""
    marks = ("checkpoints", "manifest.json", "config.json", "metrics.jsonl")  # of a run, a checkpoint, Hugging Face
    for folder in map(Path, sources):
        if any((folder / mark).exists() for mark in marks) and not any(folder.glob("*.tar")):
            raise UserError(f"SHARDS {folder}: is the folder of a run or model, and holds no shards; RUN comes first")


def open_classes(args: argparse.Namespace) -> tuple[tuple[str, ...], LabelledSet, tuple[str, ...]]:
    """Return the templates, the labelled data and the names of its classes in prompts.

    Raises:
        UserError: as find_templates, open_labelled and find_classes.
    """
    from clipdist.evals.prompts import find_classes, find_templates

    find_templates(args.templates)  # a misspelt word is reported before the data is opened
    from clipdist.datasets.labelled import open_labelled

    data = open_labelled(args.data)
    names = find_classes(args.classes, data.words, data.listed)
    return find_templates(args.templates, data.templates), data, names


@contextmanager
def joined_ranks(args: argparse.Namespace) -> Iterator[DistEnv]:
    """Join the ranks that torchrun started on --device; alone without a launcher."""
    from clipdist.distributed import rank

    with rank.joined_ranks(rank.resolve_device(args.device)) as dist_env:
        yield dist_env


def share_of_work(args: argparse.Namespace, dist_env: DistEnv | None = None) -> WorkShare:
    """Return what this rank computes; without ranks, all."""
    from clipdist.data.loader import default_threads
    from clipdist.evals.embed import WorkShare

    rank, world = (dist_env.rank, dist_env.world_size) if dist_env else (0, 1)
    return WorkShare(rank, world, args.batch, default_threads())


def load(args: argparse.Namespace, source: str, step: int | None = None, needs_text: str = "") -> LoadedModel:
    """Load the model that the arguments of add_model name, on the CPU; see load_model."""
    from clipdist.models.load import load_model

    given = {"weights": args.weights, "trust_weights": args.trust_weights, "ema": args.ema}
    return load_model(source, step=step, needs_text=needs_text, **given)


def load_named(args: argparse.Namespace, source: str, needs_text: str = "") -> LoadedModel:
    """Load one of several models, on the CPU; see clipdist.models.load.load_named."""
    from clipdist.models.load import load_named

    return load_named(source, args.trust_weights, args.ema, needs_text)


def distinct_labels(sources: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Return the labels of several models; those that are the same, as of runs of one name, with their source."""
    return [f"{label} ({source})" if labels.count(label) > 1 else label for source, label in zip(sources, labels)]


def count_lines(title: str, counts: Mapping[str, int]) -> list[str]:
    """Return a title and a line for every count; nothing where there are none."""
    return [title, *(f"{count:>10}  {reason}" for reason, count in counts.items())] if counts else []


def finish(
    args: argparse.Namespace,
    record: dict[str, Any],
    lines: Sequence[str] = (),
    run_dir: Path | None = None,
    tool: str = "",
) -> None:
    """Print a table's lines, keep the record for the report, and print it as the last line where --json asks for it."""
    from clipdist.evals.results import keep_result

    for line in lines:
        print(line)
    keep_result(run_dir, tool, record)
    if args.json:
        print(json.dumps(record))


def tell(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr)


def tell_left_out(bad: dict[str, list[str]]) -> None:
    """Print the keys of samples that were left out, by reason."""
    for reason, keys in bad.items():
        tell(f"left out, {reason}: {len(keys)} ({', '.join(keys[:3])}{', ...' if keys[3:] else ''})")
