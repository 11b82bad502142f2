"""Copy the code, as it is in the working tree, and the configuration to the run folder.

A job runs the copy: what is changed after the submission, and before or between its starts, does not reach it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path

from clipdist.config import REPOSITORY, SNAPSHOT, Config, to_yaml
from clipdist.errors import UserError
from clipdist.monitor.provenance import commit

KINDS = {"clipdist": (".py",), "launch": (".py", ".sh"), "configs": (".yaml", ".json")}
DIGITS = 12  # of the SHA-256 that names a snapshot


def take_snapshot(config: Config, repository: Path = REPOSITORY) -> Path:
    """Copy the code and the resolved configuration to RUN/code/HASH.

    HASH is of all names and contents: the same code and settings make one snapshot, however often they are submitted,
    and other ones never change one that a queued job will run. A half-written copy is never seen under that name.

    Returns:
        The snapshot's folder, absolute. It holds clipdist/, launch/, configs/, config.yaml and snapshot.json.

    Raises:
        UserError: the run folder cannot be written to.
    """
    contents = read_code(repository) | model_files(config) | {"config.yaml": to_yaml(config).encode()}
    digest = hashlib.sha256()
    for name, content in sorted(contents.items()):
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    name = digest.hexdigest()[:DIGITS]
    folder = (config.run.dir / "code" / name).resolve()
    if folder.is_dir():
        return folder
    contents[SNAPSHOT] = json.dumps({"hash": name, "commit": commit(), "files": len(contents)}).encode()
    try:
        _write(folder, contents)
    except OSError as error:
        raise UserError(f"run folder {config.run.dir}: the code cannot be copied there ({error.strerror})") from None
    return folder


def read_code(repository: Path) -> dict[str, bytes]:
    """Return path below the repository -> content, of all that a run reads."""
    return {
        path.relative_to(repository).as_posix(): path.read_bytes()
        for folder, kinds in KINDS.items()
        for path in sorted((repository / folder).rglob("*"))
        if path.suffix in kinds and "__pycache__" not in path.parts
    }


def model_files(config: Config) -> dict[str, bytes]:
    """Return the model JSON where the configuration names one by a relative path."""
    name = Path(config.model.name)
    if name.suffix == ".json" and not name.is_absolute() and ".." not in name.parts and name.is_file():
        return {name.as_posix(): name.read_bytes()}
    return {}


def _write(folder: Path, contents: dict[str, bytes]) -> None:
    """Write to a temporary folder and rename it; where another process was first, its folder stays."""
    partial = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        for name, content in contents.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
