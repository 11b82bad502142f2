"""Read lists of images and captions: CSV, TSV, Parquet, JSONL, COCO's captions, or a folder of pairs.

Lists are read as a stream, however long they are: nothing is kept but the rows at hand, of a folder its own names, and
COCO's JSON. Neighbouring rows with the same image are one image with several captions.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from tqdm import tqdm

from clipdist.data.index import IMAGE_KINDS
from clipdist.datasets.files import walk
from clipdist.errors import UserError

# Column names that need not be given, the likeliest first; case does not matter.
IMAGE_COLUMNS = (
    *("filepath", "file_path", "image_path", "img_path", "image_file", "image", "file", "path"),
    *("filename", "file_name", "image_name", "img", "picture", "jpg", "image_bytes", "bytes", "url"),
)
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "description", "comment", "alt_text", "txt")
_NUMBERED = re.compile(rf"({'|'.join(CAPTION_COLUMNS)})[ _-]?\d+", re.IGNORECASE)  # caption_0, caption_1 ...
_NAMES = re.compile(r"(large_)?string|dictionary<values=(large_)?string")  # Arrow's types
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")  # in names of Parquet files
_SUFFIXES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl"}
_SUFFIXES |= {".ndjson": "jsonl"}
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar")
_DELIMITERS = (",", "\t", ";", "|")
_HEAD_BYTES = 1 << 16
_BATCH_ROWS, _IMAGE_ROWS = 4096, 64  # of Parquet at a time, without and with the images' bytes
_RAGGED = "\0"  # a column that marks a row with more or fewer cells than there are columns
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,17})(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)  # 007 and 20 digits are names

Form = Literal["csv", "parquet", "jsonl", "coco", "folder"]
ListRow = tuple[int, Mapping[str, Any]]  # its number, and its cells by column


@dataclass(frozen=True)
class Pair:
    """An image and its captions, at least one in a list of captions.

    Attributes:
        row: of its first caption, from 1 (a CSV's header does not count; in JSONL the line); 0 in a folder.
        file: as the list names it.
        captions: without white space around them.
        extra: the other columns of its first row: numbers as numbers, empty cells left out.
        data: the image where the list itself holds it; None: it is a file.
        label: number of its class.
    """

    row: int
    file: str
    captions: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    data: bytes | None = None
    label: int | None = None


class PairSource(Protocol):
    """Where pairs come from: a list, or a set of images. Iterating reads it, anew each time, in the same order."""

    @property
    def source(self) -> Path:
        """The file or folder, for messages and as the data set's name."""

    @property
    def holds_images(self) -> bool:
        """Whether pairs have their images with them."""

    def __iter__(self) -> Iterator[Pair | Skip]: ...


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
        columns: of the image, then those of captions; empty names for a folder.
        root: where relative file names start.
        delimiter, quotes: of a CSV.
        files: of a Parquet list, in their order.
        holds_images: the image's column is bytes, or Hugging Face's {"bytes", "path"}.
    """

    source: Path
    form: Form
    columns: tuple[str, ...]
    root: Path
    delimiter: str = ","
    quotes: bool = True
    files: tuple[Path, ...] = ()
    holds_images: bool = False

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
                rows = _parquet_rows(self)
            case "coco":
                rows = _coco_rows(self.source)
            case _:
                rows = _json_rows(self.source)
        return _grouped(_entries(rows, self))


def open_list(
    source: Path,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    root: Path | None = None,
    quotes: bool = True,
) -> PairList:
    """Find out what a source is and which of its columns name the image and the captions.

    Args:
        source: a file or folder; of Parquet files a pattern too.
        image_column: None: the first of IMAGE_COLUMNS that is there, one that holds images before others.
        caption_columns: none: the first of CAPTION_COLUMNS that is there, else all such names with a number.
        root: where relative file names start; None: the list's own folder.
        quotes: False takes quotation marks of a CSV for plain characters.

    Raises:
        UserError: nothing there, empty, not a list, or without these columns.
    """
    files = _parquet_files(source)
    if source.is_dir() and not files:
        if image_column or caption_columns:
            raise UserError(f"{source}: is a folder of pairs, which has no columns; leave the column options out")
        return PairList(source, "folder", ("", ""), root or source)
    root = root or (source if source.is_dir() else (files or (source,))[0].absolute().parent)
    form: Form = "parquet"
    delimiter = ","
    image_names: list[str] = []  # of columns that hold images
    if not files:
        head = _read_head(source)
        form = _form_of(source, head)
    match form:
        case "csv":
            delimiter = _delimiter(source, head, image_column)
            names = _csv_header(source, delimiter, quotes)
        case "parquet":
            files = files or (source,)
            schema = _open_parquet(files[0]).schema_arrow
            names = schema.names
            image_names = [column.name for column in schema if _holds_bytes(column.type)]
        case "coco":
            names = ["file_name", "caption"]
        case _:
            names = list(next(iter(_json_rows(source)))[1])
    image = _choose(source, "--image-column", image_column or _known(image_names, IMAGE_COLUMNS), names, IMAGE_COLUMNS)
    captions = _choose_captions(source, caption_columns, names)
    if form == "parquet" and image not in image_names and not _NAMES.match(kind := str(schema.field(image).type)):
        raise UserError(f"{source}: column {image!r} is {kind}: expected names, bytes, or a struct of bytes and path")
    if image in captions:
        raise UserError(f"{source}: column {image!r} cannot hold both the pictures and the captions")
    return PairList(source, form, (image, *captions), root, delimiter, quotes, files, image in image_names)


# --- what a list holds, before anything is written ---


@dataclass(frozen=True)
class Survey:
    """A list read once to its end.

    Attributes:
        images: with a caption at least.
        repeated: images that stand again at another place of the list, and become a sample of their own there.
        backslashes: images with a backslash in their names, as Windows writes paths.
        fingerprint: hex digits that change with any file name, caption or other cell.
    """

    images: int
    repeated: int
    backslashes: int
    fingerprint: str


def survey(pairs: PairSource) -> Survey:
    """Read the whole list, so that what is wrong with it is known at once. Memory: 8 bytes per image, twice.

    Raises:
        UserError: as iterating; no row has both an image and a caption.
    """
    digest = hashlib.blake2b(digest_size=16)
    files = array("Q")
    skipped: Skip | None = None
    backslashes = 0
    for entry in tqdm(pairs, desc="read the list", unit="row", disable=None):
        if isinstance(entry, Skip):
            skipped = skipped or entry
            if not entry.row:  # in a folder: it decides nothing
                continue
            said: list[Any] = [entry.row, entry.file, entry.reason]
        else:
            image = entry.file.encode("utf-8", "surrogatepass") if entry.data is None else entry.data
            name = hashlib.blake2b(image, digest_size=8).digest()
            said = [entry.row, entry.file, entry.captions, entry.extra]
            said += [] if entry.data is None else [name.hex()]
            said += [] if entry.label is None else [entry.label]
            backslashes += entry.data is None and "\\" in entry.file
            files.append(int.from_bytes(name, "little"))
        digest.update(json.dumps(said, default=str).encode() + b"\n")
    if not files:
        row = f"row {skipped.row} " if skipped and skipped.row else ""
        first = f": {row}{skipped.file!r}: {skipped.reason}" if skipped else ""
        raise UserError(f"{pairs.source}: no picture with a caption in it{first}")
    ordered = np.sort(np.frombuffer(files, dtype=np.uint64))
    return Survey(len(files), int((ordered[1:] == ordered[:-1]).sum()), backslashes, digest.hexdigest())


# --- rows to images ---


def _entries(rows: Iterable[ListRow], pairs: PairList) -> Iterator[Pair | Skip]:
    image, *captions_in = pairs.columns
    for number, cells in rows:
        file, data = cells.get(image), None
        if pairs.holds_images:
            file, data = _named_image(file, number)
        if _RAGGED in cells:
            yield Skip(number, str(file or ""), "wrong number of columns")
        elif not isinstance(file, str) or not file.strip():
            yield Skip(number, "", "no picture named")
        elif _URL.match(file := file.strip()) and data is None:
            raise UserError(
                f"{pairs.source}: row {number}: {file[:80]} is an address, not a file: fetch such lists with "
                "img2dataset, whose shards are trained on as they are (docs/data.md)"
            )
        else:
            captions, reason = _captions([cells.get(column) for column in captions_in])
            if not captions:
                yield Skip(number, file, reason)
            else:
                extra = {name: cells[name] for name in cells if name not in pairs.columns}
                yield Pair(number, file, captions, _clean(extra), data)


def _named_image(cell: Any, number: int) -> tuple[str, bytes | None]:
    """Return name and bytes of a cell with an image: bytes, or {"bytes", "path"}; without bytes the path is a file."""
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    return path or (f"row {number}" if data else ""), data or None


def _captions(cells: Sequence[Any]) -> tuple[tuple[str, ...], str]:
    """Return the captions of cells, and why there are none where there are none."""
    every = [text for cell in cells for text in (cell if isinstance(cell, list) else [cell])]
    texts = [str(text).strip() for text in every if text is not None]
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
    """Join neighbouring rows of one image (the same bytes or name); rows without a caption do not part them."""
    held: Pair | None = None
    captions: list[str] = []
    for entry in entries:
        if isinstance(entry, Skip):
            yield entry
        elif held is not None and entry.data == held.data and (entry.data or entry.file == held.file):
            captions += entry.captions
        else:
            if held is not None:
                yield replace(held, captions=tuple(captions))
            held, captions = entry, list(entry.captions)
    if held is not None:
        yield replace(held, captions=tuple(captions))


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
    if suffix == ".json" and first == b"{" and any(key in head for key in (b'"info"', b'"images"', b'"annotations"')):
        return "coco"
    if form != "csv" and first == b"[":
        raise UserError(f"{source}: is one JSON array; write one object a line: jq -c '.[]' {source} > list.jsonl")
    return "jsonl" if form == "jsonl" or (form is None and first == b"{") else "csv"


def _delimiter(source: Path, head: bytes, image_column: str | None) -> str:
    """Return what parts the first line so that a column for images comes out; the tab of a .tsv, then the likeliest."""
    first = head.removeprefix(b"\xef\xbb\xbf").splitlines()[0].decode("utf-8", "replace")
    likely = sorted(_DELIMITERS, key=first.count, reverse=True)
    if source.suffix.lower() == ".tsv" and "\t" in first:
        likely = ["\t", *likely]
    known = (image_column,) if image_column else IMAGE_COLUMNS

    def parts(delimiter: str) -> list[str]:
        return [name.strip().strip('"') for name in first.split(delimiter)]

    return next((delimiter for delimiter in likely if _known(parts(delimiter), known)), likely[0])


def _known(names: Sequence[str], known: Sequence[str]) -> str | None:
    """Return the first of the known names that is there, as it is written there."""
    by_name = {name.strip().lower(): name for name in reversed(names)}
    return next((by_name[name.lower()] for name in known if name.lower() in by_name), None)


def _choose(source: Path, option: str, wanted: str | None, names: Sequence[str], known: Sequence[str]) -> str:
    listed = ", ".join(name[:40] for name in names[:30]) or "none"
    if wanted is not None:
        if wanted not in names:
            raise UserError(f"{option} {wanted}: {source} has no such column; its columns are: {listed}")
        return wanted
    if found := _known(names, known):
        return found
    raise UserError(
        f"{source}: no column has a name to be expected ({known[0]}, {known[1]} ...): name it with {option} of"
        f" tools/shard_pairs.py; the columns are: {listed} (the first line of CSV and TSV must name them)"
    )


def _choose_captions(source: Path, wanted: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    option = "--caption-column"
    numbered = tuple(name for name in names if _NUMBERED.fullmatch(name.strip()))
    if not wanted and numbered and not _known(names, CAPTION_COLUMNS):
        return numbered
    return tuple(_choose(source, option, name, names, CAPTION_COLUMNS) for name in wanted or (None,))


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


# --- COCO ---


def _coco_rows(source: Path) -> Iterator[ListRow]:
    """Yield the images of captions_train2017.json and the like, by their place in it, with all of their captions."""
    try:
        content = json.loads(source.read_bytes())
        images, annotations = content["images"], content.get("annotations")
        if annotations is None and "sentences" in images[0]:
            raise UserError(
                f"{source}: is Karpathy's JSON, of several splits: for Flickr8k tools/shard_flickr8k.py reads it; of "
                'others write one split as a list: jq -c \'.images[] | select(.split == "train") | {file: .filename, '
                f"caption: [.sentences[].raw]}}' {source} > train.jsonl"
            )
        captions: dict[Any, list[str]] = {image["id"]: [] for image in images}
        for annotation in annotations:
            captions[annotation["image_id"]].append(annotation["caption"])
        for number, image in enumerate(images, start=1):
            facts = {name: value for name, value in image.items() if isinstance(value, (str, int, float))}
            yield number, {**facts, "file_name": image["file_name"], "caption": captions[image["id"]]}
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(
            f"{source}: not COCO's captions ({type(error).__name__}: {error}): expected images with id and file_name, "
            "and annotations with image_id and caption, as in captions_train2017.json"
        ) from None


# --- Parquet ---


def _parquet_files(source: Path) -> tuple[Path, ...]:
    """Return the files of a pattern, or of a folder without images; none where it is something else.

    Raises:
        UserError: nothing there, or files of several splits.
    """
    found: list[Path] = []
    if source.is_dir():
        for here, folders, names in walk(source):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if any(os.path.splitext(name)[1][1:].lower() in IMAGE_KINDS for name in names):
                return ()
            found += [Path(here, name) for name in sorted(names) if _SUFFIXES.get(Path(name).suffix) == "parquet"]
    elif not source.exists():
        found = [Path(name) for name in sorted(glob.glob(str(source), recursive=True))]
        if not found:
            raise UserError(f"{source}: no such file or folder")
        if other := [path for path in found if _SUFFIXES.get(path.suffix) != "parquet"]:
            raise UserError(f"{source}: a pattern is of Parquet files; {other[0]} is none")
    splits = sorted({split for path in found for split in [_split_of(path)] if split})
    if len(splits) > 1:
        raise UserError(
            f"{source}: Parquet files of several splits ({', '.join(splits)}): name one, as a folder or as a pattern "
            f"in quotes, such as '{found[0].parent}/{splits[-1]}*.parquet'"
        )
    return tuple(found)


def _split_of(path: Path) -> str | None:
    """Return the split that a file's name begins with (train-00000-of-00004.parquet), or its folder's."""
    words = re.split(r"[^a-z]+", path.name.lower())[0], path.parent.name.lower()
    return next((word for word in words if word in _SPLITS), None)


def _holds_bytes(column_type: Any) -> bool:
    """Whether a column of this Arrow type is images: bytes, or Hugging Face's struct of bytes and path."""
    words = str(column_type).replace("large_", "").replace("binary_view", "binary")
    return words == "binary" or (words.startswith("struct<") and re.search(r"\bbytes: binary\b", words) is not None)


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


def _parquet_rows(pairs: PairList) -> Iterator[ListRow]:
    """Yield one row group after another, numbered through all files. Of columns with bytes only the images' is read."""
    number = 0
    for path in pairs.files:
        file = _open_parquet(path)
        import pyarrow

        columns = [column.name for column in file.schema_arrow if "binary" not in str(column.type)]
        if missing := set(pairs.columns[1:]) - set(columns) or {pairs.columns[0]} - set(file.schema_arrow.names):
            raise UserError(f"{path}: has no column {', '.join(sorted(missing))}, which {pairs.files[0]} has")
        if pairs.holds_images:
            columns.append(pairs.columns[0])
        rows = _IMAGE_ROWS if pairs.holds_images else _BATCH_ROWS
        try:
            for batch in file.iter_batches(batch_size=rows, columns=columns):
                for cells in batch.to_pylist():
                    number += 1
                    yield number, cells
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: damaged after row {number} ({error}); fetch it again") from None


# --- folders of pairs ---


def _folder_entries(folder: Path) -> Iterator[Pair | Skip]:
    """Yield images in the order of their paths, with the captions of the .txt or .json beside them.

    What is neither an image by its suffix nor a caption of one is a Skip.
    """
    for here, folders, files in walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        seen = sorted(name for name in files if not name.startswith("."))
        captions = {name for name in seen if name.endswith((".txt", ".json"))}
        stems = {os.path.splitext(name)[0] for name in seen if name not in captions}
        has_shards = {"plan.json", "shards.jsonl"} <= set(seen)  # --out of an earlier run
        for name in seen:
            stem, suffix = os.path.splitext(name)
            path = os.path.relpath(os.path.join(here, name), folder)
            if suffix[1:].lower() in IMAGE_KINDS:
                yield _folder_pair(folder, path, stem, captions)
            elif has_shards:
                continue
            elif name not in captions:
                yield Skip(0, path, f"suffix {suffix or 'none'} is not of a picture")
            elif stem not in stems:
                yield Skip(0, path, "caption without picture")


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
    captions, reason = _captions([said])
    return Pair(0, file, captions, _clean(record)) if captions else Skip(0, file, reason)
