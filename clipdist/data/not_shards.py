"""Say what a source is that holds no shards, and which tool makes shards of it."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from pathlib import Path

_TABLES = {".csv": "CSV", ".tsv": "TSV", ".parquet": "Parquet", ".jsonl": "JSONL", ".json": "JSON"}
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")
_MARKS = ((b"PK\x03\x04", ".zip"), (b"PAR1", ".parquet"), (b"\x1f\x8b", ".gz"), (b"BZh", ".bz2"))
_IMAGE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)\b", re.IGNORECASE)
_CAPTION = re.compile(r"\b(captions?|comment|text|title)\b", re.IGNORECASE)  # in the head of a table
_LISTS = (".csv", ".tsv", ".parquet", ".jsonl", ".zip", "captions.txt", "token.txt")  # first of all in a folder
_LOOKED_AT = 1000  # files of a folder


def describe_file(path: str, suffix: str = "") -> str:
    """Return what a file is by its suffix, and what to do with it; "" where it may be a shard.

    Args:
        suffix: such as ".zip", in place of that of its name.
    """
    suffix = suffix or os.path.splitext(path.lower())[1]
    if suffix in _TABLES:
        return f"a {_TABLES[suffix]} file, not shards; {_make(path)}"
    if suffix == ".zip":
        return (
            f"a zip archive, not shards; of Flickr8k's, make them: python tools/shard_flickr8k.py {path} --out DIR;"
            " unpack others, then python tools/shard_pairs.py FOLDER --out DIR"
        )
    if suffix in _COMPRESSED:
        return "compressed; shards are plain tars, of which single samples are read: unpack it first"
    return f"an image, not shards; {_make('FOLDER')}" if _IMAGE.fullmatch(suffix) else ""


def describe_folder(path: Path) -> str:
    """Return what a folder without shards holds, and what to do with it; "" where that is not known."""
    names = sorted(itertools.islice(os.listdir(path), _LOOKED_AT))
    for name in names:
        if name.lower().endswith(_LISTS):
            kind = "a list of images and captions, not shards; " + _make(os.path.join(path, name))
            return f"it holds {name}, {describe_file(os.path.join(path, name)) or kind}"
    below = itertools.chain.from_iterable(files for _, _, files in os.walk(path))
    if any(map(_IMAGE.search, itertools.islice(below, _LOOKED_AT))):
        alone = f"without captions: python tools/shard_images.py {path} --out DIR"
        return f"it holds images, not shards; {_make(str(path))}; {alone}"
    if any(name.startswith("data_batch_") for name in names):
        return f"it holds CIFAR's batches, not shards; make shards of it: python tools/shard_images.py {path} --out DIR"
    return next((f"it holds {name}, {told}" for name in names if (told := describe_file(name))), "")


def describe_list(path: Path, lines: list[str]) -> str:
    """Return what a .txt file is that names images instead of shards, and what to do with it; "" for other files."""
    head = re.split(r"[,;|\t]", lines[0])
    if ".tar" in lines[0] or (path.parent / lines[0]).is_dir():
        return ""
    if _IMAGE.search(lines[0]) or (len(head) > 1 and any(map(_CAPTION.search, head))):
        return f"a list of images and captions, not of shards; {_make(f'{path} --images-root FOLDER')}"
    return ""


def describe_content(path: str | Path) -> str:
    """Return what a file is by its first bytes, where it is no tar whatever its name says; "" for other files."""
    first = b""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        first = file.read(4)
    return next((describe_file(str(path), suffix) for mark, suffix in _MARKS if first.startswith(mark)), "")


def _make(source: str) -> str:
    return f"make shards of it: python tools/shard_pairs.py {source} --out DIR (of Flickr8k: tools/shard_flickr8k.py)"
