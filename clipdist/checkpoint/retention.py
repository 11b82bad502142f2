"""Which checkpoints of a run stay: folders and what they say of themselves in; the others are removed or set aside."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipdist.checkpoint.format import (
    MANIFEST,
    complete_folders,
    list_checkpoints,
    read_manifest,
    step_folders,
    step_of,
)
from clipdist.errors import Fault, UserError
from clipdist.storage import sync

ROLLED_BACK = "rolled-back-"  # before the name of a checkpoint that a run went back from


@dataclass(frozen=True)
class RetentionPolicy:
    """What stays, beside the newest.

    Attributes:
        last: so many of the newest.
        every: those of every so many steps; 0: none.
        best: the best one by a validation's metric: the lowest of a loss, else the highest; "": none.
        back: one that is so many steps older than the newest, for a run that goes back, and the one that will be it
            next; 0: none.
    """

    last: int = 2
    every: int = 0
    best: str = ""
    back: int = 0


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint. `metrics`: of the validation at its step; empty where there was none."""

    folder: Path
    step: int
    metrics: Mapping[str, float]


def kept(checkpoints: Sequence[Saved], keep: RetentionPolicy) -> set[Path]:
    """The folders that stay. Of equally good ones the newest counts; a metric that is not finite counts for nothing."""
    by_step = sorted(checkpoints, key=lambda saved: saved.step)
    stay = {saved.folder for saved in by_step[-max(1, keep.last) :]}
    if keep.every:
        stay |= {saved.folder for saved in by_step if saved.step % keep.every == 0}
    if keep.back and by_step:
        old = [saved for saved in by_step if saved.step <= by_step[-1].step - keep.back] or by_step[:1]
        stay |= {saved.folder for saved in (old[-1], *[saved for saved in by_step if saved.step > old[-1].step][:1])}
    measured = [saved for saved in by_step if math.isfinite(saved.metrics.get(keep.best, math.nan))]
    if measured:
        sign = -1 if keep.best.endswith("loss") else 1
        stay.add(max(measured, key=lambda saved: (sign * saved.metrics[keep.best], saved.step)).folder)
    return stay


def prune(run_dir: Path, keep: RetentionPolicy, written: Path | None = None) -> None:
    """Removes the checkpoints that need not stay, and what is older than the newest one and no checkpoint: what
    interrupted writers left, and what was set aside.

    Args:
        written: what was written just now stays in any case: a newer one may be damaged.
    """
    complete = complete_folders(run_dir)
    if not complete:
        return
    newest = _step(complete[-1])
    stay = {folder.name for folder in kept([_saved(folder, keep.best) for folder in complete], keep)}
    for folder in step_folders(run_dir):
        if _step(folder) < newest and folder.name not in stay and folder != written:
            _remove(folder)
    for folder in step_folders(run_dir, ROLLED_BACK):
        if _step(folder) < newest:
            _remove(folder)


def set_aside(run_dir: Path, after_step: int) -> list[Path]:
    """Renames checkpoints newer than a step, so that no start finds them, and removes unfinished ones. The oldest stays
    in any case: a run that goes back must not lose all. One rank calls it, while no rank writes.

    Returns the new folders.

    The newest goes first: a kill in between leaves a run that ends earlier, but no gap.
    """
    aside = []
    complete = list_checkpoints(run_dir)
    if complete:
        after_step = max(after_step, _step(complete[0]))
    for folder in reversed(step_folders(run_dir)):
        if not _step(folder) > after_step:
            continue
        if not (folder / MANIFEST).is_file():
            _remove(folder)
            continue
        target = folder.with_name(ROLLED_BACK + folder.name)
        if target.exists():
            _remove(target)
        folder.rename(target)
        sync(folder.parent)
        aside.append(target)
    return aside


def remove_leftovers(run_dir: Path, writing: Path) -> bool:
    """Makes room: removes checkpoints that were never finished, but for the one that is being written.

    Returns:
        Whether there were any.
    """
    found = [folder for folder in step_folders(run_dir) if not (folder / MANIFEST).exists()]
    left = [folder for folder in found if folder.name != writing.name]
    for folder in left:
        _remove(folder)
    return bool(left)


def _saved(folder: Path, best: str) -> Saved:
    metrics: Mapping[str, float] = {}
    if best:  # else the manifest, which can be long, need not be read
        try:
            metrics = read_manifest(folder).state.get("metrics", {})
        except Fault as fault:  # it may be the best
            raise OSError(str(fault)) from None
        except UserError:
            pass  # a damaged one is not
    return Saved(folder, _step(folder), metrics)


def _step(folder: Path) -> int:
    step = step_of(Path(folder.name.removeprefix(ROLLED_BACK)))
    assert step is not None, folder  # all come from step_folders
    return step


def _remove(folder: Path) -> None:
    """The manifest goes first, and for good: a half-removed folder must not look complete."""
    if (folder / MANIFEST).exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        sync(folder)
    shutil.rmtree(folder, ignore_errors=True)
