"""Read lists of images and captions: CSV, TSV, Parquet, JSONL, or a folder of pairs.

Lists are read as a stream, however long they are: nothing is kept but the rows at hand, and of a folder its own names.
Neighbouring rows with the same image are one image with several captions.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from clipdist.data.index import IMAGE_KINDS
from clipdist.datasets.files import walk
from clipdist.errors import UserError

# Column names that need not be given, the likeliest first; case does not matter.
IMAGE_COLUMNS = (
    *("filepath", "file_path", "image_path", "img_path", "image_file", "image", "file", "path"),
    *("filename", "file_name", "image_name", "img", "picture", "url"),
)
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "description", "comment", "alt_text")
_SUFFIXES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl"}
_SUFFIXES |= {".ndjson": "jsonl"}
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar")
_DELIMITERS = (",", "\t", ";", "|")
_HEAD_BYTES = 1 << 16
_BATCH_ROWS = 4096
_RAGGED = "\0"  # a column that marks a row with more or fewer cells than there are columns
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,17})(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)  # 007 and 20 digits are names

Form = Literal["csv", "parquet", "jsonl", "folder"]
ListRow = tuple[int, Mapping[str, Any]]  # its number, and its cells by column


@dataclass(frozen=True)
class Pair:
    """An image and its captions, at least one.

    Attributes:
        row: of its first caption, from 1 (a CSV's header does not count; in JSONL the line); 0 in a folder.
        file: as the list names it.
        captions: without white space around them.
        extra: the other columns of its first row: numbers as numbers, empty cells left out.
    """

    row: int
    file: str
    captions: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skip:
    """A row or image that is left out, and why."""

    row: int
    file: str
    reason: str


@dataclass(frozen=True)
class PairList:
    """A list that has been found readable. Iterating reads it, anew each time, in the same order.

    Attributes:
        columns: of the image and of the caption; empty names for a folder.
        root: where relative file names start.
        delimiter, quotes: of a CSV.
    """

    source: Path
    form: Form
    columns: tuple[str, str]
    root: Path
    delimiter: str = ","
    quotes: bool = True

    def __iter__(self) -> Iterator[Pair | Skip]:
        """
        Raises:
            UserError: the list cannot be read to its end, or an image is an address on the web.
        """
        if self.form == "folder":
            return _folder_entries(self.source)
        rows: Iterable[ListRow]
        match self.form:
            case "csv":
                rows = _csv_rows(self)
            case "parquet":
                rows = _parquet_rows(self.source)
            case _:
                rows = _json_rows(self.source)
        return _grouped(_entries(rows, self))


def open_list(
    source: Path,
    image_column: str | None = None,
    caption_column: str | None = None,
    root: Path | None = None,
    quotes: bool = True,
) -> PairList:
    """Find out what a source is and which of its columns name the image and the caption.

    Args:
        image_column, caption_column: None: the first of IMAGE_COLUMNS and CAPTION_COLUMNS that is there.
        root: where relative file names start; None: the list's own folder.
        quotes: False takes quotation marks of a CSV for plain characters.

    Raises:
        UserError: nothing there, empty, not a list, or without these columns.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if source.is_dir():
        if image_column or caption_column:
            raise UserError(f"{source}: is a folder of pairs, which has no columns; leave the column options out")
        return PairList(source, "folder", ("", ""), root or source)
    root = root or source.absolute().parent
    head = _read_head(source)
    form = _form_of(source, head)
    delimiter = ","
    match form:
        case "csv":
            delimiter = _delimiter(source, head)
            names = _csv_header(source, delimiter, quotes)
        case "parquet":
            names = _open_parquet(source).schema_arrow.names
        case _:
            names = list(next(iter(_json_rows(source)))[1])
    image = _choose(source, "--image-column", image_column, names, IMAGE_COLUMNS)
    caption = _choose(source, "--caption-column", caption_column, names, CAPTION_COLUMNS)
    if image == caption:
        raise UserError(f"{source}: column {image!r} cannot hold both the pictures' names and the captions")
    return PairList(source, form, (image, caption), root, delimiter, quotes)


# --- what a list holds, before anything is written ---


@dataclass(frozen=True)
class Survey:
    """A list read once to its end.

    Attributes:
        images: with a caption at least.
        repeated: images that stand again at another place of the list, and become a sample of their own there.
        fingerprint: hex digits that change with any file name, caption or other cell.
    """

    images: int
    repeated: int
    fingerprint: str


def survey(pairs: PairList) -> Survey:
    """Read the whole list, so that what is wrong with it is known at once. Memory: 8 bytes per image, twice.

    Raises:
        UserError: as iterating; no row has both an image and a caption.
    """
    digest = hashlib.blake2b(digest_size=16)
    files = array("Q")
    skipped: Skip | None = None
    for entry in tqdm(pairs, desc="read the list", unit="row", disable=None):
        if isinstance(entry, Skip):
            skipped = skipped or entry
            said: list[Any] = [entry.row, entry.file, entry.reason]
        else:
            said = [entry.row, entry.file, entry.captions, entry.extra]
            name = entry.file.encode("utf-8", "surrogatepass")
            files.append(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little"))
        digest.update(json.dumps(said, default=str).encode() + b"\n")
    if not files:
        first = f": row {skipped.row} {skipped.file!r}: {skipped.reason}" if skipped else ""
        raise UserError(f"{pairs.source}: no picture with a caption in it{first}")
    ordered = np.sort(np.frombuffer(files, dtype=np.uint64))
    return Survey(len(files), int((ordered[1:] == ordered[:-1]).sum()), digest.hexdigest())


# --- rows to images ---


def _entries(rows: Iterable[ListRow], pairs: PairList) -> Iterator[Pair | Skip]:
    image, caption = pairs.columns
    for number, cells in rows:
        file = cells.get(image)
        if _RAGGED in cells:
            yield Skip(number, str(file or ""), "wrong number of columns")
        elif not isinstance(file, str) or not file.strip():
            yield Skip(number, "", "no picture named")
        elif _URL.match(file := file.strip()):
            raise UserError(
                f"{pairs.source}: row {number}: {file[:80]} is an address, not a file: fetch such lists with "
                "img2dataset, whose shards are trained on as they are (docs/data.md)"
            )
        else:
            captions, reason = _captions(cells.get(caption))
            if not captions:
                yield Skip(number, file, reason)
            else:
                extra = {name: cells[name] for name in cells if name not in (image, caption)}
                yield Pair(number, file, captions, _clean(extra))


def _captions(cell: Any) -> tuple[tuple[str, ...], str]:
    """Return the captions of a cell, and why there are none where there are none."""
    texts = [str(text).strip() for text in (cell if isinstance(cell, list) else [cell]) if text is not None]
    captions = tuple(text for text in texts if text and _is_utf8(text))
    return captions, "caption is not UTF-8" if any(texts) else "empty caption"


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _clean(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cells but empty ones and numbers that JSON does not know; mend strings that cannot be written."""
    kept: dict[str, Any] = {}
    for name, value in extra.items():
        if not name or value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
            continue
        kept[name] = value if not isinstance(value, str) or _is_utf8(value) else value.encode(errors="replace").decode()
    return kept


def _grouped(entries: Iterable[Pair | Skip]) -> Iterator[Pair | Skip]:
    """Join neighbouring rows of one image; rows without a caption between them do not part them."""
    held: Pair | None = None
    captions: list[str] = []
    for entry in entries:
        if isinstance(entry, Skip):
            yield entry
        elif held is not None and entry.file == held.file:
            captions += entry.captions
        else:
            if held is not None:
                yield Pair(held.row, held.file, tuple(captions), held.extra)
            held, captions = entry, list(entry.captions)
    if held is not None:
        yield Pair(held.row, held.file, tuple(captions), held.extra)


# --- what a file is ---


def _read_head(source: Path) -> bytes:
    if not source.is_file():
        raise UserError(f"{source}: neither a file nor a folder")
    try:
        with open(source, "rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror})") from None
    if not head.strip():
        raise UserError(f"{source}: is empty")
    return head


def _form_of(source: Path, head: bytes) -> Form:
    suffix = source.suffix.lower()
    if suffix in _PACKED:
        raise UserError(f"{source}: is packed; unpack it first")
    form = _SUFFIXES.get(suffix)
    if form == "parquet" or head.startswith(b"PAR1"):
        return "parquet"
    if b"\0" in head:
        raise UserError(f"{source}: not a text in UTF-8, so neither CSV nor JSONL; a Parquet list is named .parquet")
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if form != "csv" and first == b"[":
        raise UserError(f"{source}: is one JSON array; write one object a line: jq -c '.[]' {source} > list.jsonl")
    return "jsonl" if form == "jsonl" or (form is None and first == b"{") else "csv"


def _delimiter(source: Path, head: bytes) -> str:
    """Return the tab for a .tsv, else what stands most often in the first line."""
    if source.suffix.lower() == ".tsv":
        return "\t"
    first = head.splitlines()[0].decode("utf-8", "replace")
    return max(_DELIMITERS, key=first.count)


def _choose(source: Path, option: str, wanted: str | None, names: Sequence[str], known: Sequence[str]) -> str:
    listed = ", ".join(name[:40] for name in names[:30]) or "none"
    if wanted is not None:
        if wanted not in names:
            raise UserError(f"{option} {wanted}: {source} has no such column; its columns are: {listed}")
        return wanted
    by_name = {name.strip().lower(): name for name in reversed(names)}
    for name in known:
        if name in by_name:
            return by_name[name]
    raise UserError(
        f"{source}: no column has a name to be expected ({known[0]}, {known[1]} ...): name it with {option}; "
        f"the columns are: {listed} (the first line of CSV and TSV must name them)"
    )


# --- CSV and TSV ---


def _csv_header(source: Path, delimiter: str, quotes: bool) -> list[str]:
    header = [name.strip() for name in next(_csv_lines(source, delimiter, quotes))[1]]
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise UserError(f"{source}: two columns have the name {twice[0]!r}")
    return header


def _csv_rows(pairs: PairList) -> Iterator[ListRow]:
    lines = _csv_lines(pairs.source, pairs.delimiter, pairs.quotes)
    header = [name.strip() for name in next(lines)[1]]
    numeric = [name not in pairs.columns for name in header]
    for number, cells in lines:
        if len(cells) != len(header):
            yield number, {**dict(zip(header, cells)), _RAGGED: True}
        else:
            yield number, {n: _number(c) if num else c for n, c, num in zip(header, cells, numeric)}


def _csv_lines(source: Path, delimiter: str, quotes: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield (0, header), (1, first row) ...; empty lines are passed over."""
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    # What is not UTF-8 becomes lone surrogates: the one caption is left out, not the list refused.
    with open(source, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        number = 0
        try:
            for cells in reader:
                if cells:
                    yield number, cells
                    number += 1
        except csv.Error as error:
            raise UserError(
                f"{source}: line {reader.line_num}: {error}; if quotation marks are plain characters of this list, "
                "say --no-quotes"
            ) from None


def _number(text: str) -> int | float | str:
    """Return the number that a cell is, else the cell. Empty cells are common: the pattern is the dearest part."""
    if not text or not _NUMBER.fullmatch(text):
        return text
    return int(text) if text.lstrip("-").isdigit() else float(text)


# --- JSONL ---


def _json_rows(source: Path) -> Iterator[ListRow]:
    """Yield rows by their line's number; empty lines are passed over."""
    with open(source, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{source}: line {number}: not JSON ({error})") from None
            if not isinstance(record, dict):
                raise UserError(f"{source}: line {number}: not a JSON object with the columns as its keys")
            yield number, record


# --- Parquet ---


def _open_parquet(source: Path) -> Any:
    """Return pyarrow.parquet.ParquetFile of the source.

    Raises:
        UserError: pyarrow is not installed, or this is not a Parquet file.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{source}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(source)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{source}: not a Parquet file, or cut off ({error}); fetch it again") from None


def _parquet_rows(source: Path) -> Iterator[ListRow]:
    """Yield one row group after another; columns of bytes (images in the list itself) are not read."""
    file = _open_parquet(source)
    import pyarrow

    columns = [field.name for field in file.schema_arrow if "binary" not in str(field.type)]
    number = 0
    try:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            for cells in batch.to_pylist():
                number += 1
                yield number, cells
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{source}: damaged after row {number} ({error}); fetch it again") from None


# --- folders of pairs ---


def _folder_entries(folder: Path) -> Iterator[Pair | Skip]:
    """Yield images in the order of their paths, with the captions of the .txt or .json beside them."""
    for here, folders, files in walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        stems = {name for name in files if name.endswith((".txt", ".json"))}
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if suffix[1:].lower() in IMAGE_KINDS and not name.startswith("."):
                yield _folder_pair(folder, os.path.relpath(os.path.join(here, name), folder), stem, stems)


def _folder_pair(folder: Path, file: str, stem: str, beside: set[str]) -> Pair | Skip:
    """Take the captions from the .json beside it ("captions" or "caption"), else the lines of the .txt."""
    where = (folder / file).parent
    record: dict[str, Any] = {}
    try:
        if f"{stem}.json" in beside:
            record = json.loads((where / f"{stem}.json").read_bytes())
            if not isinstance(record, dict):
                return Skip(0, file, "caption file cannot be read")
        said: Any = record.pop("captions", None) or record.get("caption")
        record.pop("caption", None)
        if said is None and f"{stem}.txt" in beside:
            text = (where / f"{stem}.txt").read_bytes().decode("utf-8-sig", "surrogateescape")
            said = [line for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError):
        return Skip(0, file, "caption file cannot be read")
    if said is None:
        return Skip(0, file, "no caption beside it")
    captions, reason = _captions(said)
    return Pair(0, file, captions, _clean(record)) if captions else Skip(0, file, reason)
