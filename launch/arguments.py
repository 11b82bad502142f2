"""In: the command line of launch/submit.py. Out: what is wanted, and one configuration per run of a sweep."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

from clipdist.config import DEFAULT_RECIPE, REPOSITORY, Config, load_config
from clipdist.errors import UserError
from launch.setup_lines import escape
from launch.sweep import Point, points

EXAMPLES = """examples:
  python launch/submit.py --nodes 2 --gpus 8
  python launch/submit.py --nodes 2 --gpus 8 --config configs/cc3m_vitb16.yaml --dry-run
  python launch/submit.py --gpus 8 --sweep optim.lr=1e-4,3e-4 data.seed=1,2
  python launch/submit.py --cluster local --gpus 2 --config configs/flickr8k_vit_tiny.yaml device=cpu
"""
# Flag -> key of the launch section. A flag wins over key=value, that over the recipe, that over the site file.
FLAGS = {
    "nodes": "nodes",
    "gpus": "gpus",
    "cluster": "cluster",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "exclude": "exclude",
    "dependency": "dependency",
    "comment": "comment",
    "container": "container",
    "time": "time_min",
    "mem": "mem_gb",
    "setup": "setup",
    "max_restarts": "max_restarts",
}


@dataclass(frozen=True)
class Run:
    """One run that is to be launched."""

    point: Point  # of the sweep; without values where there is none
    config: Config


@dataclass(frozen=True)
class Request:
    """What the command line asks for. All runs share the launch section."""

    runs: list[Run]
    recipe: str
    site: Path | None
    dry_run: bool
    plan: bool


def read_arguments(argv: list[str] | None) -> Request:
    """
    Raises:
        UserError: a setting that is unknown, of the wrong type, or does not go with others.
    """
    args = make_parser().parse_intermixed_args(argv)
    given = {key: getattr(args, flag) for flag, key in FLAGS.items() if getattr(args, flag) is not None}
    if "setup" in given:
        given["setup"] = [escape(line) for line in given["setup"]]
    words = [*args.overrides, *(f"launch.{key}={json.dumps(value)}" for key, value in given.items())]
    words += [f"launch.slurm.{_pair(word)}" for word in args.slurm]
    site = site_file()
    # A sweep's values come after the plain words; a swept run.name would undo the suffix, see sweep.py.
    name = load_config(args.config, words, site).run.name
    runs = [
        Run(point, load_config(args.config, [*words, *point.words, f"run.name={name}{point.suffix}"], site))
        for point in points(args.sweep)
    ]
    return Request(runs, args.config, site, args.dry_run, args.plan)


def site_file() -> Path | None:
    """The site's own defaults: the file that $CLIPDIST_SITE names, else site.yaml at the repository's root, if any."""
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
    add("--nodes", type=int, help="number of nodes")
    add("--gpus", type=int, help="GPUs per node; with device=cpu, CPU ranks per node")
    add("--cluster", choices=("slurm", "local", "debug"), help="local: here, and wait; debug: one process, with pdb")
    add("--partition", help="Slurm partition")
    add("--account", help="Slurm account")
    add("--qos", help="Slurm quality of service")
    add("--constraint", help="node features that Slurm shall look for")
    add("--exclude", metavar="NODES", help="nodes that Slurm shall not give")
    add("--dependency", help="as sbatch has it, such as afterok:1234")
    add("--comment", help="shown by squeue and sacct")
    add("--container", metavar="IMAGE", help="container image, where the site has pyxis")
    add("--time", type=int, metavar="MINUTES", help="time limit; the run goes on in the next job")
    add("--mem", type=int, metavar="GB", help="memory per node")
    add("--setup", action="append", metavar="LINE", help="shell line before the job (repeatable)")
    add("--slurm", action="append", default=[], metavar="KEY=VALUE", help="further sbatch option (repeatable)")
    add("--max-restarts", type=int, metavar="N", help="after a fault; preemptions and time limits do not count")
    add("--sweep", nargs="+", action="extend", default=[], metavar="KEY=V1,V2", help="one run for each combination")
    add("--plan", action="store_true", help="print what the run will need and take, and end")
    add("--dry-run", action="store_true", help="print configuration and sbatch script; needs no Slurm")
    add("overrides", nargs="*", metavar="section.key=value", help="settings on top of the recipe")
    return parser


def _pair(word: str) -> str:
    key, equals, value = word.partition("=")
    if not equals or not key.removeprefix("--") or "." in key:
        raise UserError(f"--slurm {word}: expected KEY=VALUE with sbatch's long name, such as reservation=clip")
    return f"{key.removeprefix('--')}={json.dumps(value) if value not in ('true', 'false') else value}"
