"""Compare what all ranks must have alike before a run begins: code, packages, configuration, data, start.

Ranks that run other code, other packages or other data than the rest would train without an error, and wrongly.
"""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import clipdist
from clipdist.checkpoint.format import MANIFEST
from clipdist.config import Config, flat
from clipdist.distributed.collectives import all_equal, gather_json
from clipdist.distributed.compare import who_has_what
from clipdist.distributed.rank import DistEnv
from clipdist.errors import UserError

if TYPE_CHECKING:
    from clipdist.checkpoint.reader import CheckpointReader
    from clipdist.data.catalog import Catalog

PACKAGES = (
    "torch",
    "deepspeed",
    "numpy",
    "open_clip_torch",
    "timm",
    "transformers",
    "tokenizers",
    "simplejpeg",
    "pillow",
)
# Paths may be others on other nodes. What lies there is compared by content, or not at all (caches).
_PLACES = ("run.root", "data.train", "data.val", "data.cache", "eval.labelled", "train.resume")
_FILES = ("model.name", "model.weights", "model.word_vectors", "eval.templates")  # the name without its folder
_CODE = "clipdist/"  # what the names of facts on code begin with
_MOST_NAMED = 5


def facts(
    config: Config,
    order_record: dict[str, Any],
    val: Catalog | None,
    skipped: list[list[int]],
    resume: CheckpointReader | None,
) -> dict[str, str]:
    """Return what this rank would train with, by name, without paths and host names.

    Args:
        order_record, skipped: of the data order, as a checkpoint keeps them.
        val: validation data.
        resume: the checkpoint to start from.

    Raises:
        UserError: no tokenizer; see make_tokenizer.
    """
    from clipdist.models.spec import resolve_run_spec

    spec = resume.manifest.state["model"] if resume else resolve_run_spec(config).to_dict()
    order = {name: value for name, value in order_record.items() if name != "fingerprint"}
    return {
        **{f"package {name}": _version(name) for name in PACKAGES},
        "Python": platform.python_version(),
        **code_facts(Path(clipdist.__file__).parent),
        **config_facts(config),
        "training data": short(order_record["fingerprint"]),
        "validation data": short(val.fingerprint()) if val else "none",
        "data order": json.dumps(order, sort_keys=True),
        "skipped ranges": str(skipped),
        "model": short(_digest(json.dumps(_without_places(spec), sort_keys=True).encode())),
        "tokenizer": short(_tokenizer(spec)),
        "start": _start(resume),
    }


def compare(facts: dict[str, str], dist_env: DistEnv) -> None:
    """Compare the facts of all ranks. Collective.

    Raises:
        UserError: on all ranks, naming what differs and on which ranks.
    """
    if dist_env.world_size == 1 or all_equal(json.dumps(facts, sort_keys=True).encode()):
        return
    everyone = gather_json([socket.gethostname(), facts])
    raise UserError(disagreement([own for _, own in everyone], [node for node, _ in everyone]))


def disagreement(everyone: list[dict[str, str]], nodes: list[str]) -> str:
    """Return the error message for ranks whose facts differ.

    Args:
        everyone: the facts of every rank, in rank order.
    """
    names = list(dict.fromkeys(name for own in everyone for name in own))
    differing = [name for name in names if len({own.get(name) for own in everyone}) > 1]
    files = [name for name in differing if name.startswith(_CODE)]
    told = [name for name in differing if name not in files[1:]]  # of other code the first file tells enough
    words = []
    for name in told[:_MOST_NAMED]:
        more = f" and {len(files) - 1} more files" if name in files[:1] and len(files) > 1 else ""
        words.append(f"{name}{more}: {who_has_what([own.get(name, 'nothing') for own in everyone], nodes)}")
    if len(told) > _MOST_NAMED:
        words.append(f"and {len(told) - _MOST_NAMED} more differences")
    return (
        f"the ranks do not agree on what to train: {'; '.join(words)}. Start all nodes from the same code and packages"
    )


def code_facts(package: Path) -> dict[str, str]:
    """Return digests of the package's sources and data, by their names below its parent folder."""
    files = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".json"))
    return {path.relative_to(package.parent).as_posix(): short(_digest(path.read_bytes())) for path in files}


def config_facts(config: Config) -> dict[str, str]:
    """Return all settings as JSON, but those that name places of this node."""
    found = {}
    for name, value in flat(config).items():
        if name in _FILES:
            value = Path(value).name
        if name not in _PLACES:
            found[name] = json.dumps(value)
    return found


def _without_places(tree: Any) -> Any:
    """Replace paths by file names, such as those of Hugging Face folders."""
    if isinstance(tree, dict):
        return {name: _without_places(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_without_places(value) for value in tree]
    return Path(tree).name if isinstance(tree, str) else tree


def _tokenizer(spec: dict[str, Any]) -> str:
    from clipdist.data.tokens import make_tokenizer
    from clipdist.models.spec import ModelSpec

    return make_tokenizer(ModelSpec.from_dict(spec)).fingerprint()


def _start(resume: CheckpointReader | None) -> str:
    if resume is None:
        return "new weights"
    return f"{resume.folder.name} {short(_digest((resume.folder / MANIFEST).read_bytes()))}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def short(digest: str) -> str:
    """Return as much of a digest as a person compares."""
    return digest[:16]
