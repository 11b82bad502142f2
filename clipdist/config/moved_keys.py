"""Refuse or upgrade configuration keys of earlier versions."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from clipdist.errors import UserError

MOVED = {
    "loss.name": "objectives.clip.loss",
    "loss.logit_scale_init": "objectives.clip.logit_scale_init",
    "loss.logit_scale_max": "objectives.clip.logit_scale_max",
    "loss.logit_bias_init": "objectives.clip.logit_bias_init",
    "loss.group_positives": "objectives.clip.group_positives",
    "loss.label_smoothing": "objectives.clip.label_smoothing",
    "loss.implementation": "objectives.clip.implementation",
    "data.patience_s": "data.retry_s",
    "launch.qos": "launch.slurm.qos",
    "launch.constraint": "launch.slurm.constraint",
    "launch.exclude": "launch.slurm.exclude",
    "launch.dependency": "launch.slurm.dependency",
    "launch.comment": "launch.slurm.comment",
    "launch.container": "launch.slurm.container-image",
}
REMOVED = {
    "data.allow_pipe": "shards are not read through commands any more",
    "loss.tile_rows": "the size of the tiles is chosen for the device",
    "loss.tile_columns": "the size of the tiles is chosen for the device",
}


def refuse_old_keys(tree: Any, where: str) -> None:
    """Refuse keys of an earlier version, all in one line that says what to write instead.

    Args:
        tree: what a recipe or an override sets.

    Raises:
        UserError: it sets such a key.
    """
    hints = [
        f"{old} is {MOVED[old]} now; write that" if old in MOVED else f"{old} is gone: {REMOVED[old]}; leave it out"
        for old in _old_keys(tree)
    ]
    if hints:
        raise UserError(f"{where}: {'. '.join(hints)}")
    if "loss" in tree:
        raise UserError(f"{where}: the section loss is objectives.clip now; its key name is objectives.clip.loss")


def upgrade(tree: Any) -> Any:
    """Rename the keys of a resolved configuration that an earlier version wrote into a run folder."""
    for old in _old_keys(tree):
        section, key = old.split(".")
        value = tree[section].pop(key)
        if old == "loss.implementation" and value == "compiled":
            value = "auto"
        if old in MOVED and value not in ("", None):  # else a Slurm option that was not set
            OmegaConf.update(tree, MOVED[old], value, force_add=True)
    tree.pop("loss", None)
    return tree


def _old_keys(tree: Any) -> list[str]:
    """Return the keys of earlier versions that the tree sets."""
    found = []
    for old in (*MOVED, *REMOVED):
        section, key = old.split(".")
        if OmegaConf.is_dict(tree.get(section)) and key in tree[section]:
            found.append(old)
    return found
