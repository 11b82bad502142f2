"""Parse the command line of launch/submit.py: what is wanted, and one configuration per run of a sweep."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from clipdist.config import DEFAULT_RECIPE, REPOSITORY, Config, load_config, refuse_options
from clipdist.config.load import escape_shell
from clipdist.errors import UserError
from launch.sweep import SweepPoint, points

EXAMPLES = """examples:
  python launch/submit.py --nodes 2 --gpus 8
  python launch/submit.py --nodes 2 --gpus 8 --config configs/cc3m_vitb16.yaml --dry-run
  python launch/submit.py --gpus 8 --sweep optim.lr=1e-4,3e-4 data.seed=1,2
  python launch/submit.py --cluster local --gpus 2 --config configs/flickr8k_rn10.yaml device=cpu
"""
FLAGS = (  # flag, key of the launch section, type, name of the value, help
    ("--nodes", "nodes", int, "NODES", "number of nodes"),
    ("--gpus", "gpus", int, "GPUS", "GPUs per node; with device=cpu, CPU ranks per node"),
    ("--partition", "partition", str, "PARTITION", "Slurm partition"),
    ("--account", "account", str, "ACCOUNT", "Slurm account"),
    ("--qos", "slurm.qos", str, "QOS", "Slurm quality of service"),
    ("--constraint", "slurm.constraint", str, "CONSTRAINT", "node features that Slurm shall look for"),
    ("--exclude", "slurm.exclude", str, "NODES", "nodes that Slurm shall not give"),
    ("--dependency", "slurm.dependency", str, "DEPENDENCY", "as sbatch has it, such as afterok:1234"),
    ("--comment", "slurm.comment", str, "COMMENT", "shown by squeue and sacct"),
    ("--container", "slurm.container-image", str, "IMAGE", "container image, where the site has pyxis"),
    ("--time", "time_min", int, "MINUTES", "time limit; the run goes on in the next job"),
    ("--mem", "mem_gb", int, "GB", "memory per node"),
    ("--max-restarts", "max_restarts", int, "N", "after a fault; preemptions and time limits do not count"),
)
CLUSTERS = ("slurm", "local", "debug")


@dataclass(frozen=True)
class RunRequest:
    """One run that is to be launched."""

    point: SweepPoint  # without values where there is no sweep
    config: Config


@dataclass(frozen=True)
class LaunchRequest:
    """What the command line asks for. All runs share the launch section."""

    runs: list[RunRequest]
    recipe: str
    site: Path | None
    dry_run: bool
    plan: bool


def read_arguments(argv: list[str] | None) -> LaunchRequest:
    """Parse the command line and load the configurations.

    A flag wins over key=value, that over the recipe, that over the site file.

    Raises:
        UserError: a setting that is unknown, of the wrong type, or does not go with others.
    """
    args, unknown = make_parser().parse_known_intermixed_args(argv)
    refuse_options(unknown, sys.argv[1:] if argv is None else argv)
    given = {key: value for key, value in vars(args).items() if key.startswith("launch.") and value is not None}
    words = [*args.overrides, *(f"{key}={json.dumps(value)}" for key, value in given.items())]
    words += [f"launch.slurm.{_slurm_option(word)}" for word in args.slurm]
    site = site_file()
    # A sweep's values come after the plain words; a swept run.name would undo the suffix, see sweep.py.
    name = load_config(args.config, words, site).run.name
    runs = [
        RunRequest(point, load_config(args.config, [*words, *point.words, f"run.name={name}{point.suffix}"], site))
        for point in points(args.sweep)
    ]
    return LaunchRequest(runs, args.config, site, args.dry_run, args.plan)


def site_file() -> Path | None:
    """Return the site's own defaults: the file that $CLIPDIST_SITE names, else site.yaml at the root, if any."""
    named = os.environ.get("CLIPDIST_SITE")
    if named:
        return Path(named)
    path = REPOSITORY / "site.yaml"
    return path if path.is_file() else None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Submits a training run: one task per GPU, on Slurm or on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", default=DEFAULT_RECIPE, help=f"recipe (default {DEFAULT_RECIPE})")
    for flag, key, value_type, metavar, text in FLAGS:
        add(flag, dest=f"launch.{key}", type=value_type, metavar=metavar, help=text)
    cluster_help = "local: here, and wait; debug: one process, with pdb"
    add("--cluster", dest="launch.cluster", choices=CLUSTERS, help=cluster_help)
    setup_help = "shell line before the job (repeatable)"
    add("--setup", dest="launch.setup", action="append", type=escape_shell, metavar="LINE", help=setup_help)
    add("--slurm", action="append", default=[], metavar="KEY=VALUE", help="further sbatch option (repeatable)")
    add("--sweep", nargs="+", action="extend", default=[], metavar="KEY=V1,V2", help="one run for each combination")
    add("--plan", action="store_true", help="print what the run will need and take, and end")
    add("--dry-run", action="store_true", help="print configuration and sbatch script; needs no Slurm")
    add("overrides", nargs="*", metavar="section.key=value", help="settings on top of the recipe")
    return parser


def _slurm_option(word: str) -> str:
    key, equals, value = word.partition("=")
    if not equals or not key.removeprefix("--") or "." in key:
        raise UserError(f"--slurm {word}: expected KEY=VALUE with sbatch's long name, such as reservation=clip")
    return f"{key.removeprefix('--')}={json.dumps(value) if value not in ('true', 'false') else value}"
