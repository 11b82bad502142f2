"""A recipe and key=value overrides, merged onto the defaults and checked. Imports no torch."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipdist.config.checks import check
from clipdist.config.moved_keys import refuse_old_keys, upgrade
from clipdist.config.schema import REPOSITORY, Config, Objectives
from clipdist.errors import UserError


def load_config(
    path: str | Path | None = None,
    overrides: list[str] | None = None,
    site: str | Path | None = None,
    *,
    of_run: bool = False,
) -> Config:
    """Read a recipe and the overrides on top of the defaults, and check what can be checked without data.

    A recipe that has a section `objectives` trains exactly what that lists; without it, CLIP.

    Args:
        path: YAML with differences from the defaults; None: the defaults alone.
        overrides: "section.key=value" words, as on a command line; values are YAML.
        site: YAML of a site's own defaults, below the recipe; a launch section and nothing else.
        of_run: the file is the config.yaml of a run folder, perhaps of an earlier version: its old keys are understood.

    Raises:
        UserError: a misspelt key, a wrong type, or values that do not go together.
    """
    where = str(path) if path else "the defaults"
    try:
        recipe = _read_recipe(Path(path), of_run) if path is not None else OmegaConf.create()
        merged = OmegaConf.structured(Config(objectives=Objectives()) if "objectives" in recipe else Config())
        if site is not None:
            where = str(site)
            merged = OmegaConf.merge(merged, _scalars_to_lists(_read_site(Path(site))))
        where = str(path) if path else "the defaults"
        merged = OmegaConf.merge(merged, _scalars_to_lists(recipe))
        where = "the command line"
        for word in overrides or []:
            tree = _parse_override(word)
            refuse_old_keys(tree, where)
            merged = OmegaConf.merge(merged, _scalars_to_lists(tree))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        text = str(error).splitlines()[0]
        raise UserError(f"{where}: {key + ': ' if key else ''}{text}") from None
    except TypeError as error:  # OmegaConf's of a table where a list is due, such as data.train.0=PATH
        raise UserError(f"{where}: {error}") from None
    assert isinstance(config, Config)
    check(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, all keys, in the order of the dataclasses."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def flat(config: Config) -> dict[str, Any]:
    """Flat {"section.key": value}, the form that hyper-parameter tables take."""
    return _flatten(to_dict(config))


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= _flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _read_recipe(path: Path, of_run: bool) -> Any:
    tree = _read_yaml(path)
    if not OmegaConf.is_dict(tree):
        raise UserError(f"--config {path}: must hold sections of settings, such as train:")
    if of_run:
        tree = upgrade(tree)
    refuse_old_keys(tree, str(path))
    return tree


def _read_yaml(path: Path) -> Any:
    given, path = path, path if path.is_file() else REPOSITORY / path  # recipes are found from any folder
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; {path.parent} holds {', '.join(near)}" if near else ""
        raise UserError(f"--config {given}: no such file{hint}")
    try:
        return OmegaConf.load(path)
    except OmegaConfBaseException:
        raise
    except Exception as error:  # the YAML parser's own errors: they carry line and column
        raise UserError(f"--config {path}: not YAML: {_one_line(error)}") from None


def _read_site(path: Path) -> Any:
    """A site's own defaults: how jobs are launched there, and nothing that changes what is trained."""
    try:
        tree = OmegaConf.load(path)
    except OmegaConfBaseException:
        raise
    except Exception as error:  # no such file, or the YAML parser's own
        raise UserError(f"site file {path}: cannot be read: {_one_line(error)}") from None
    if not OmegaConf.is_dict(tree) or set(tree) - {"launch"}:
        raise UserError(f"site file {path}: must hold a launch section and nothing else")
    refuse_old_keys(tree, f"site file {path}")
    plain = OmegaConf.to_container(tree)
    launch = plain.get("launch") if isinstance(plain, dict) else None
    if isinstance(launch, dict) and isinstance(launch.get("setup"), (str, list)):
        lines = [launch["setup"]] if isinstance(launch["setup"], str) else launch["setup"]
        # ${HOME} is for the shell; to OmegaConf it would be one of its own keys.
        launch["setup"] = [re.sub(r"(?<!\\)\$\{", r"\\${", str(line)) for line in lines]
    return OmegaConf.create(plain)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _parse_override(word: str) -> Any:
    key, equals, _ = word.partition("=")
    if not equals or not key:
        raise UserError(f"{word!r} on the command line: expected section.key=value, such as optim.lr=1e-3")
    try:
        return OmegaConf.from_dotlist([word])
    except OmegaConfBaseException:
        raise
    except Exception as error:
        raise UserError(f"{word!r} on the command line: the value is not YAML: {_one_line(error)}") from None


def _scalars_to_lists(tree: Any) -> Any:
    """Lets `data.train=PATH` stand for `data.train=[PATH]`, and `data.val=` for `[]`, in all lists."""
    for section in dataclasses.fields(Config):
        if not dataclasses.is_dataclass(section.default_factory):
            continue
        for leaf in dataclasses.fields(section.default_factory):
            if str(leaf.type).startswith("list["):
                value = OmegaConf.select(tree, f"{section.name}.{leaf.name}", default=[])
                if value is None or isinstance(value, (str, int, float)):
                    OmegaConf.update(tree, f"{section.name}.{leaf.name}", [] if value in (None, "") else [value])
    return tree
