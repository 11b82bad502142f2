"""Load a configuration: merge a recipe and key=value overrides onto the defaults, and check it. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from clipdist.config.checks import check
from clipdist.config.moved_keys import refuse_old_keys, upgrade
from clipdist.config.schema import DEFAULT_RECIPE, REPOSITORY, Config, Objectives
from clipdist.errors import UserError


def load_config(
    path: str | Path | None = None, overrides: list[str] | None = None, site: str | Path | None = None
) -> Config:
    """Read a recipe and overrides on top of the defaults, and check all that does not depend on data.

    A recipe with a section `objectives` trains only the objectives in it; a recipe without one trains CLIP.

    Args:
        path: YAML file with differences from the defaults; None: only the defaults. The config.yaml of a run folder may
            be of an earlier version.
        overrides: "section.key=value" arguments, as on a command line; values are YAML.
        site: YAML file with defaults of a site, overridden by the recipe; only a launch section.

    Raises:
        UserError: a misspelt key, a wrong type, or inconsistent values.
    """
    where = str(path) if path else "the defaults"
    try:
        recipe = _read_recipe(Path(path)) if path is not None else OmegaConf.create()
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
            recipe = OmegaConf.merge(recipe, tree)
        if missing := sorted(OmegaConf.missing_keys(recipe)):  # a merge onto defaults passes over ???
            raise UserError(f"{', '.join(missing)}: still ???; give a value in the recipe or on the command line")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        text = str(error).splitlines()[0]
        if isinstance(error, (ConfigKeyError, ConfigAttributeError)) and key and "Did you mean" not in text:
            text += _did_you_mean(key)
        raise UserError(f"{where}: {key + ': ' if key else ''}{text}") from None
    except TypeError as error:  # OmegaConf's of a table where a list is due, such as data.train.0=PATH
        raise UserError(f"{where}: {error}") from None
    assert isinstance(config, Config)
    check(config)
    return config


def _did_you_mean(key: str) -> str:
    """Return ". Did you mean: ..." with the settings whose own name is that of a key, or close to it; "" if none is."""
    found = _settings_like(key)
    return f". Did you mean: {', '.join(found)}?" if found else ""


def _settings_like(key: str) -> list[str]:
    full_names: dict[str, list[str]] = {}
    for full_name in flat(Config()):
        full_names.setdefault(full_name.rpartition(".")[2], []).append(full_name)
    name = key.rpartition(".")[2]
    names = [name] if name in full_names else difflib.get_close_matches(name, full_names)
    return [full_name for name in names for full_name in full_names[name]]


def refuse_options(unknown: Sequence[str], argv: Sequence[str]) -> None:
    """Raise UserError for options that a program does not have, with the setting that the first may stand for.

    Args:
        unknown: what argparse did not know of `argv`.
    """
    if not unknown:
        return
    option, equals, value = unknown[0].partition("=")
    after = [*argv[list(argv).index(unknown[0]) + 1 :], ""][0]
    value = value if equals else "VALUE" if after.startswith("-") or "=" in after else after or "VALUE"
    key = option.lstrip("-").replace("-", "_")
    found = [key] if key in flat(Config()) else _settings_like(key)
    meant = " or ".join(f"{name}={value}" for name in found[:3]) or "section.key=value, such as optim.lr=1e-3"
    raise UserError(f"{option}: no such option; settings are words without dashes: {meant}")


def escape_shell(line: str) -> str:
    r"""Return \${HOME} for ${HOME}, which OmegaConf would take for a reference to one of its own keys."""
    return re.sub(r"(?<!\\)\$\{", r"\\${", line)


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, all keys, in the order of the dataclasses; load_config reads it back."""
    launch = dataclasses.replace(config.launch, setup=[escape_shell(line) for line in config.launch.setup])
    return OmegaConf.to_yaml(OmegaConf.structured(dataclasses.replace(config, launch=launch)))


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as nested dicts."""
    return dataclasses.asdict(config)


def saved_config(tree: dict[str, Any]) -> Config | None:
    """Return the configuration that a checkpoint holds, without its sections run and launch.

    Args:
        tree: as `to_dict` gave it, perhaps in an earlier version.

    Returns:
        None: it has keys that this version does not know.
    """
    with suppress(OmegaConfBaseException):
        kept = upgrade(OmegaConf.create({name: value for name, value in tree.items() if name not in ("run", "launch")}))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config(objectives=Objectives())), kept))
        assert isinstance(config, Config)
        return config
    return None


def flat(config: Config) -> dict[str, Any]:
    """Return the configuration as {"section.key": value}."""
    return flatten(to_dict(config))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree of tables as {"section.key": value}."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _read_recipe(path: Path) -> Any:
    """Read a recipe; refuse or upgrade the keys of earlier versions."""
    tree = _read_yaml(path)
    if not OmegaConf.is_dict(tree):
        raise UserError(f"--config {path}: must hold sections of settings, such as train:")
    if (path.parent / "metrics.jsonl").is_file():  # a run folder
        tree = upgrade(tree)
    refuse_old_keys(tree, str(path))
    return tree


def _read_yaml(path: Path) -> Any:
    """Read a YAML file; a relative path may also start at the repository."""
    given, path = path, path if path.is_file() else REPOSITORY / path
    if not path.is_file():
        raise UserError(f"--config {given}: no such file{_recipes_like(given)}")
    try:
        return OmegaConf.load(path)
    except OmegaConfBaseException:
        raise
    except Exception as error:  # the YAML parser's own errors: they carry line and column
        raise UserError(f"--config {path}: not YAML: {_one_line(error)}") from None


def _recipes_like(given: Path) -> str:
    """Return a hint: the recipe with nearly this name, else those of the same folder, else the project's."""
    own = Path(DEFAULT_RECIPE).parent
    folders = [own] if given.parent == Path() else [given.parent, own]
    recipes = [folder / path.name for folder in folders for path in sorted((REPOSITORY / folder).glob("[!.]*.yaml"))]
    near = difflib.get_close_matches(given.stem, [path.stem for path in recipes], n=1, cutoff=0.8)
    if near:
        return f"; did you mean --config {next(path for path in recipes if path.stem == near[0])}?"
    folder = recipes[0].parent
    return f"; {folder} holds {', '.join(path.name for path in recipes if path.parent == folder)}"


def _read_site(path: Path) -> Any:
    """Read a site's defaults, which may only contain a launch section."""
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
        launch["setup"] = [escape_shell(str(line)) for line in lines]
    return OmegaConf.create(plain)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _parse_override(word: str) -> Any:
    """Parse "section.key=value"."""
    key, equals, _ = word.partition("=")
    if Path(word).suffix in (".yaml", ".yml") and not equals:
        raise UserError(f"{word!r} on the command line: a recipe is named by --config {word}")
    if not equals or not key:
        raise UserError(f"{word!r} on the command line: expected section.key=value, such as optim.lr=1e-3")
    try:
        return OmegaConf.from_dotlist([word])
    except OmegaConfBaseException:
        raise
    except Exception as error:
        raise UserError(f"{word!r} on the command line: the value is not YAML: {_one_line(error)}") from None


def _scalars_to_lists(tree: Any) -> Any:
    """Turn scalars of list-valued keys into lists: data.train=PATH means data.train=[PATH], data.val= means []."""
    for section in dataclasses.fields(Config):
        if not dataclasses.is_dataclass(section.default_factory):
            continue
        for leaf in dataclasses.fields(section.default_factory):
            if str(leaf.type).startswith("list["):
                _scalar_to_list(tree, f"{section.name}.{leaf.name}")
    _scalar_to_list(tree, "model.lora.targets")
    stages = OmegaConf.select(tree, "train.stages", default=None)
    if OmegaConf.is_dict(stages):
        OmegaConf.update(tree, "train.stages", [stages], merge=False)
    return tree


def _scalar_to_list(tree: Any, key: str) -> None:
    value = OmegaConf.select(tree, key, default=[])
    if value is None or isinstance(value, (str, int, float)):
        OmegaConf.update(tree, key, [] if value in (None, "") else [value])
