"""Measure models on a list of test sets, and keep each figure under the weights and data that it is of.

A set is in CLIP_benchmark's WebDataset form, or anything else that the tools take. A task is a zero-shot classifier, a
linear probe, or retrieval, by the code of these tools.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdist.data.catalog import Catalog
from clipdist.data.first_look import look_at
from clipdist.datasets.labelled import LabelledSet, open_labelled, read_lines, require_all_shards
from clipdist.errors import UserError
from clipdist.evals.fractions import require_classes
from clipdist.evals.prompts import find_classes, find_templates
from clipdist.storage import write_text

if TYPE_CHECKING:
    from clipdist.distributed.rank import DistEnv
    from clipdist.evals.embed import WorkShare
    from clipdist.models.load import LoadedModel

FORMAT = 1  # of kept figures: another one where a task measures otherwise
TASKS = ("zero_shot", "probe", "retrieval")
KEYS = ("data", "task", "templates", "classes")
DATASET_TYPE = "dataset_type.txt"  # of CLIP_benchmark: retrieval, or nothing for classes
HEADLINES = {  # what stands in a table; records have all figures
    "zero_shot": ("top1",),
    "probe": ("accuracy",),
    "retrieval": ("t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10"),
}


@dataclass(frozen=True)
class EvalSet:
    """A test set and what is measured on it.

    Attributes:
        task: one of TASKS.
        source: where it is, in words.
        data: labelled images, for retrieval captioned ones.
        templates: of the zero-shot classifier.
    """

    name: str
    task: str
    source: str
    data: LabelledSet | Catalog
    templates: tuple[str, ...] = ()

    def key(self, fingerprint: str) -> str | None:
        """Return 32 hex digits that change with the weights, the images, their labels or captions, and the prompts.

        None: the images are not known by a digest.
        """
        if isinstance(self.data, Catalog):
            facts: list[Any] = [self.data.fingerprint()]
        else:
            splits = [self.data.test, *([self.data.train] if self.task == "probe" and self.data.train else [])]
            facts = [split.digest for split in splits]
            if not all(facts):
                return None
            facts += [self.data.words, self.templates] if self.task == "zero_shot" else []
        text = json.dumps([FORMAT, fingerprint, self.task, facts])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_suite(path: Path) -> list[EvalSet]:
    """Open all sets of a suite, in its order.

    Args:
        path: YAML: NAME: PATH, or NAME: {data: PATH, task: TASK or a list, templates: ..., classes: ...}. A path is
            relative to the file's folder. Without a task: retrieval where dataset_type.txt says so, else zero_shot.

    Raises:
        UserError: no such file, another form, an unknown key or task, or a set that cannot be opened.
    """
    from omegaconf import OmegaConf

    try:
        listed: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        raise UserError(f"--suite {path}: no such file") from None
    except Exception as error:  # the YAML parser's and OmegaConf's own
        raise UserError(f"--suite {path}: not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"--suite {path}: must hold lines such as cifar10: data/wds_cifar10")
    return [found for name, entry in listed.items() for found in _open_entry(path, str(name), entry)]


def _open_entry(path: Path, name: str, entry: Any) -> list[EvalSet]:
    where = f"--suite {path}: {name}"
    entry = {"data": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("data"), str):
        raise UserError(f"{where}: must be a path, or {{data: PATH, task: {' | '.join(TASKS)}}}")
    for key in entry:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1) or [", ".join(KEYS)]
            raise UserError(f"{where}: unknown key {key}; did you mean {near[0]}?")
    folder = path.parent / entry["data"]
    tasks = entry.get("task") or _task_of(folder, where)
    opened = []
    for task in [tasks] if isinstance(tasks, str) else tasks:
        if task not in TASKS:
            raise UserError(f"{where}: task {task}: must be one of {', '.join(TASKS)}")
        given = {key: str(entry.get(key) or "") for key in ("templates", "classes")}
        for key, value in given.items():  # a file beside the suite's
            given[key] = str(path.parent / value) if value and (path.parent / value).is_file() else value
        opened.append(open_set(name, task, str(folder), **given, where=where))
    return opened


def _task_of(folder: Path, where: str) -> str:
    kind = "".join(read_lines(folder / DATASET_TYPE)).lower()
    if kind not in ("", "classification", "retrieval"):
        raise UserError(f"{where}: {folder / DATASET_TYPE} says {kind}: only classification and retrieval are measured")
    return "retrieval" if kind == "retrieval" else "zero_shot"


def open_set(
    name: str, task: str, source: str | Sequence[str], templates: str = "", classes: str = "", where: str = ""
) -> EvalSet:
    """Open a set for one task.

    Args:
        source: labelled images as open_labelled takes them; for retrieval shards as Catalog.open takes them, or a
            folder with test/ in it.
        templates, classes: see find_templates and find_classes; for zero_shot alone.
        where: what an error message shall name.

    Raises:
        UserError: it cannot be opened, has no training images where a probe needs some, or options do not belong to it.
    """
    where = where or name
    sources = [source] if isinstance(source, str) else source
    said = " ".join(sources)
    if (templates or classes) and task != "zero_shot":
        raise UserError(f"{where}: templates and classes are for zero_shot, not for {task}")
    try:
        if task == "retrieval":
            return EvalSet(name, task, said, _open_captioned(sources))
        find_templates(templates)  # a misspelt word is reported before the data is opened
        data = open_labelled(said)
        if task == "probe":
            if data.train is None:
                raise UserError(f"{said}: the probe needs training pictures as well: DIR/train beside DIR/test")
            require_classes(data.train, data.classes)
            return EvalSet(name, task, said, data)
        words = find_classes(classes, data.words, data.listed)
        spoken = replace(data, classes=words, listed=True)
        return EvalSet(name, task, said, spoken, find_templates(templates, data.templates))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _open_captioned(sources: Sequence[str]) -> Catalog:
    folders = [str(Path(source) / "test") if (Path(source) / "test").is_dir() else source for source in sources]
    for folder in folders:
        require_all_shards(Path(folder))
    catalog = Catalog.open(folders, what="shards")
    catalog.contents = look_at(catalog, "shards", folders, captions=True)
    return catalog


def measure_all(
    sets: Sequence[EvalSet], loaded: LoadedModel, dist_env: DistEnv, share: WorkShare, cache: bool = True
) -> list[dict[str, Any]]:
    """Measure a model on every set. Collective: the ranks share the work, and rank 0 has the results.

    Args:
        cache: keep figures in RUN/suite (~/.cache/clipdist/suite for a model without a run), and take what is there.

    Returns:
        of every set in order: "set", "task", "data" (where it is), "cached", and the figures of `measure`.
    """
    from clipdist.distributed.collectives import gather_json

    folder = (loaded.run_dir or Path.home() / ".cache" / "clipdist") / "suite"
    keys = [each.key(loaded.fingerprint) if cache else None for each in sets]
    files = [folder / f"{key}.json" if key else None for key in keys]
    known = gather_json([_read(file) for file in files] if dist_env.rank == 0 else [])[0]
    results = []
    for each, file, found in zip(sets, files, known):
        try:
            figures = found or measure(each, loaded, dist_env, share)
        except UserError as error:
            raise UserError(f"{loaded.label}, {each.name}, {each.task}: {error}") from None
        if file and not found and dist_env.rank == 0:
            with suppress(OSError):  # a run that may not be written to: measured again next time
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text(file, json.dumps(figures))
        results.append({"set": each.name, "task": each.task, "data": each.source, "cached": bool(found), **figures})
    return results


def headlines(results: Sequence[Sequence[dict[str, Any]]]) -> list[tuple[str, str, str, list[float]]]:
    """Return the rows of a table: set, task, figure's name, its value for each model; means over sets are the last.

    Args:
        results: of each model, what measure_all returned for the same sets.
    """
    rows = [
        (found[0]["set"], found[0]["task"], name, [float(each[name]) for each in found])
        for found in zip(*results)
        for name in HEADLINES[found[0]["task"]]
    ]
    for task, names in HEADLINES.items():
        for name in names:
            values = [row[3] for row in rows if row[1:3] == (task, name)]
            if len(values) > 1:
                means = [sum(of_model) / len(values) for of_model in zip(*values)]
                rows.append((f"mean of {len(values)} sets", task, name, means))
    return rows


def text_needed(sets: Sequence[EvalSet]) -> str:
    """Return what of the sets a text tower is needed for, in words; "": they need none."""
    return next((f"{each.task} of {each.name}" for each in sets if each.task != "probe"), "")


def _read(file: Path | None) -> dict[str, float] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def measure(
    each: EvalSet, loaded: LoadedModel, dist_env: DistEnv, share: WorkShare, keep_features: bool = True
) -> dict[str, float]:
    """Measure a model on one set. Collective.

    Args:
        keep_features: let the probe keep its features in RUN/features, as its tool does.

    Returns:
        zero_shot_metrics, what probe_of gives (on rank 0 alone), or `summarise` of retrieval; of the two that look at
        test images alone also "left_out", how many could not be used.

    Raises:
        UserError: as these.
    """
    from clipdist.evals.embed import embed_catalog, model_encoder
    from clipdist.evals.features import embed_split, features_path, frozen_encoder
    from clipdist.evals.locked import kept_features
    from clipdist.evals.probe import probe_of
    from clipdist.evals.retrieval import distributed_retrieval
    from clipdist.evals.zero_shot import zero_shot_classifier, zero_shot_metrics

    model, tokenizer, data, device = loaded.model, loaded.tokenizer, each.data, dist_env.device
    transform = model.spec.transform
    if isinstance(data, Catalog):
        locked = kept_features(loaded, data, dist_env)
        own = embed_catalog(model_encoder(model, device), data, tokenizer, transform, share, locked=locked)
        metrics, whole = distributed_retrieval(own, device=device)
        return metrics | {"left_out": float(sum(map(len, whole.bad.values())))}
    if each.task == "probe":
        folder = (loaded.run_dir or Path.home() / ".cache" / "clipdist") / "features"
        cache = features_path(folder, model, data, "tower") if keep_features else None
        encode = frozen_encoder(model, device, "tower")
        return probe_of(encode, data, transform, share, unit=False, device=device, cache=cache)
    encode = model_encoder(model, device)
    classifier = zero_shot_classifier(encode, tokenizer, data.words, each.templates, share)
    test = embed_split(encode, data.test, transform, share)
    assert model.logit_scale is not None
    metrics = zero_shot_metrics(test.image, test.labels, classifier, model.logit_scale)
    return metrics | {"left_out": float(test.left_out)}
