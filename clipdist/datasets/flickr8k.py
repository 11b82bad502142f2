"""Read Flickr8k as people have it: captioned images by split, and a record of everything left out.

Three layouts: the original distribution (Flicker8k_Dataset/, Flickr8k.token.txt, Flickr_8k.*Images.txt), Kaggle's
(Images/, captions.txt or .csv) and Karpathy's JSON (dataset_flickr8k.json); in folders, or in zips, read in place.
Data set: M. Hodosh, P. Young, J. Hockenmaier, JAIR 47 (2013).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clipdist.datasets.files import SourceFile, files_below
from clipdist.datasets.images import LFS_POINTER, CheckedImage, SourceImage
from clipdist.errors import UserError

SPLITS = ("train", "val", "test", "extra")
EVALUATED = ("test", "val")  # an image that is in one of these too stays out of train
LISTED = {"train": "train", "dev": "val", "test": "test"}  # the word in a list file's name -> the split
NOT_COMPARABLE = "not comparable with published numbers"
_IMAGE_NAME = re.compile(r".+\.(jpe?g|png|webp)(\.\d+)?", re.IGNORECASE)  # Flickr8k's captions name one .jpg.1
_TOKEN_LINE = re.compile(r"(.+?)#\d+(?:\s+(.*))?")
_CSV_ROW_START = re.compile(r'(?:\d*,)?"?[^,"\n]+\.(jpe?g|png|webp)"?\s*,|image\s*,', re.IGNORECASE)
_UNDECODABLE = re.compile("[\ud800-\udfff]")  # what errors="surrogateescape" makes of bytes that are not UTF-8

# Reason -> what happened. The first group was left out; the second stays in and is worth knowing.
SKIPPED = {
    "captions without picture": "captions whose picture is nowhere in the source",
    "listed picture missing": "named by a split list, nowhere in the source",
    "picture without captions": "no caption names it, or none is usable",
    "empty caption": "nothing but white space",
    "caption not UTF-8": "bytes that are no text",
    "stray line": "neither a caption nor a picture's name",
    "repeated list line": "named twice by one list",
    "listed in two splits": "kept in test before val before train",
    "same bytes as a test or val picture": "left out of train",
    "junk file": "__MACOSX and ._ files of a macOS archive",
    "git-LFS pointer": "the picture was never fetched (git lfs pull)",
    "truncated picture": "the file ends too early",
    "not a picture": "cannot be decoded",
    "too many pixels": "larger than any picture of this data set can be",
    "unreadable file": "the archive or the disk does not give its bytes",
}
NOTED = {
    "picture in no list": "goes to extra",
    "repeated caption": "pictures that have the same caption more than once; all are kept",
    "caption on several pictures": "captions that describe more than one picture",
    "picture found twice": "the same file name at another place, which is not used",
    "other captions not used": "a second caption file of another layout",
    "no list for this split": "list files exist for other splits only",
}


@dataclass
class Defects:
    """Names by reason; the reasons are the keys of SKIPPED and NOTED."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.names.setdefault(reason, []).append(printable(name))

    def report(self) -> dict[str, dict[str, dict[str, object]]]:
        """Return {"skipped" | "noted": {reason: {"count", "meaning", "names"}}}, in a fixed order."""
        return {
            group: {
                reason: {"count": len(names), "meaning": reasons[reason], "names": sorted(names)}
                for reason in reasons
                if (names := self.names.get(reason))
            }
            for group, reasons in (("skipped", SKIPPED), ("noted", NOTED))
        }


def printable(name: str) -> str:
    """Return the name, with bytes that are not UTF-8 as backslash escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True)
class Flickr8kSource:
    """What a source holds, before any image is opened.

    Attributes:
        layout: "original", "kaggle" or "karpathy".
        images: {name: image}, those that have a file and a caption.
        split: {name: split} where lists or the JSON say so; None where nothing does.
        fingerprint: hex, of names, sizes and texts: equal for copies.
    """

    layout: str
    images: dict[str, SourceImage]
    split: dict[str, str] | None
    fingerprint: str


def read_source(
    sources: Sequence[str | Path],
    defects: Defects,
    images: str | Path | None = None,
    lists: str | Path | None = None,
    with_splits: bool = True,
) -> Flickr8kSource:
    """Find images, captions and splits.

    Args:
        sources: folders, zips or files, searched in depth.
        images: take images from here alone.
        lists: take split lists from here alone.
        with_splits: False passes over what the source says about splits.

    Raises:
        UserError: nothing there, no images, no captions, an archive that is damaged as a whole.
    """
    found = find_files(sources, defects)
    candidates = find_files([images], defects) if images is not None else found
    files = _images_by_name(candidates, defects)
    if not files:
        inner = [file for file in candidates if file.name.lower().endswith(".zip")]
        hint = f"; it holds the archive {inner[0].name}: unpack that one" if inner else ""
        raise UserError(f"{_named(sources, images)}: no pictures (.jpg) there{hint}")
    layout, text_file = _caption_file(found, sources, defects)
    raw = _read_text(text_file)
    split: dict[str, str] | None
    if layout == "karpathy":
        if lists is not None:
            raise UserError(f"--lists {lists}: the source {text_file} has its own splits; leave one of the two away")
        captions, split = _read_karpathy(raw, str(text_file), defects, with_splits)
    else:
        text = decode_text(raw)
        rows = token_rows(text, defects) if layout == "original" else csv_rows(text, defects, text_file.name)
        captions = _group(rows, defects)
        listed = find_files([lists], defects) if lists is not None else found
        split = _read_lists(listed, defects) if with_splits else None
        if lists is not None and split is None:
            raise UserError(f"--lists {lists}: no Flickr_8k.trainImages.txt, .devImages.txt or .testImages.txt there")
    if not captions:
        raise UserError(f"{text_file}: no captions in it")
    captioned = _match(files, captions, split, defects)
    digest = hashlib.sha256(raw + json.dumps(sorted((split or {}).items())).encode())
    for name in sorted(files):
        digest.update(f"{printable(name)} {files[name].size} {files[name].crc}\n".encode())
    return Flickr8kSource(layout, captioned, split, digest.hexdigest())


# --- where the files are ---


def find_files(sources: Iterable[str | Path], defects: Defects) -> list[SourceFile]:
    """Return all files of the sources, sorted per source, the members of zips among them; junk is counted and left out.

    Raises:
        UserError: a source is not there, or a zip is damaged as a whole.
    """
    kept = []
    for source in sources:
        if not Path(source).exists():
            raise UserError(f"{source}: no such file or folder; docs/data.md says where Flickr8k comes from")
        for file in files_below(Path(source)):
            if "__MACOSX" in file.folder.split("/") or file.name.startswith("._"):
                defects.add("junk file", file.member or file.path)
            else:
                kept.append(file)
    return kept


def _images_by_name(files: list[SourceFile], defects: Defects) -> dict[str, SourceFile]:
    """Return one file per name: where a name occurs twice, the one in the folder that holds more images."""
    files = [file for file in files if _IMAGE_NAME.fullmatch(file.name)]
    crowd = Counter(file.folder for file in files)
    by_name: dict[str, SourceFile] = {}
    for file in sorted(files, key=lambda file: -crowd[file.folder]):
        if file.name in by_name:
            defects.add("picture found twice", file.member or file.path)
        else:
            by_name[file.name] = file
    return by_name


def _caption_file(files: list[SourceFile], sources: Sequence[str | Path], defects: Defects) -> tuple[str, SourceFile]:
    """Return the layout, and the one file that holds its captions. The JSON comes first: it knows the splits."""
    named = {str(Path(source)) for source in sources}
    jsons = [
        p for p in files if re.fullmatch(r"dataset.*\.json", p.name) or (p.path in named and p.name[-5:] == ".json")
    ]
    found = {
        "karpathy": [p for p in jsons if p.name == "dataset_flickr8k.json"] or jsons,
        "original": [p for p in files if p.name.lower() == "flickr8k.token.txt"],
        "kaggle": [p for p in files if p.name.lower() in ("captions.txt", "captions.csv")],
    }
    layouts = [layout for layout, files in found.items() if files]
    if not layouts:
        raise UserError(
            f"{_named(sources)}: no captions there: expected Flickr8k.token.txt (original), captions.txt or "
            "captions.csv (Kaggle), or dataset_flickr8k.json (Karpathy); name every zip or folder that belongs together"
        )
    for other in layouts[1:]:
        for file in found[other]:
            defects.add("other captions not used", file.member or file.path)
    return layouts[0], _one_of(found[layouts[0]])


def _one_of(copies: list[SourceFile]) -> SourceFile:
    """Return one of several copies of a text file.

    Raises:
        UserError: they differ.
    """
    for other in copies[1:]:
        if _read_text(other) != _read_text(copies[0]):
            raise UserError(f"{copies[0]} and {other} differ: name the source that you mean")
    return copies[0]


def _named(sources: Sequence[str | Path], images: str | Path | None = None) -> str:
    return f"--images {images}" if images is not None else " ".join(str(source) for source in sources)


def _read_text(file: SourceFile) -> bytes:
    try:
        data = file.read()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if data.startswith(LFS_POINTER):
        raise UserError(f"{file}: is a git-LFS pointer, not the file; fetch it with `git lfs pull`")
    return data


# --- captions ---


def decode_text(data: bytes) -> str:
    """Decode UTF-8 with any line ends to text with \\n; bytes that are none become lone surrogates, to tell later."""
    text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def token_rows(text: str, defects: Defects) -> Iterator[tuple[str, str]]:
    """Yield (image, caption) of "name.jpg#0<TAB>caption" lines, in their order."""
    for number, line in enumerate(text.split("\n"), 1):
        match = _TOKEN_LINE.fullmatch(line)
        if match and _IMAGE_NAME.fullmatch(match[1]):
            yield match[1], match[2] or ""
        elif line.strip():
            defects.add("stray line", f"Flickr8k.token.txt line {number}: {line[:80]}")


def csv_rows(text: str, defects: Defects, file: str = "captions.txt") -> Iterator[tuple[str, str]]:
    """Yield (image, caption) of Kaggle's captions.txt, in their order; the first line may name further columns.

    A record is parsed by itself, so that a quote that is never closed costs one caption and not the rest of the file.
    """
    image, caption, last = 0, 1, 1
    for number, record in _csv_records(text):
        try:
            row = next(csv.reader(io.StringIO(record, newline=""), strict=True), [])
        except csv.Error:
            row = []
        names = [cell.strip().lower() for cell in row] if number == 1 else []
        if {"image", "caption"} <= set(names):
            image, caption, last = names.index("image"), names.index("caption"), len(names) - 1
            continue
        if len(row) > max(image, caption) and _IMAGE_NAME.fullmatch(row[image].strip()):
            # of a copy without quotes the caption's own commas part cells
            yield row[image].strip(), ",".join(row[caption:]) if caption == last else row[caption]
        else:
            defects.add("stray line", f"{file} line {number}: {record[:80]}")


def _csv_records(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, record): a line is continued only while a quote is open and no new row begins."""
    start, record = 0, ""
    for number, line in enumerate(text.split("\n"), 1):
        if record and record.count('"') % 2 and not _CSV_ROW_START.match(line):
            record += "\n" + line
            continue
        if record.strip():
            yield start, record
        start, record = number, line
    if record.strip():
        yield start, record


def _read_karpathy(
    data: bytes, where: str, defects: Defects, with_splits: bool
) -> tuple[dict[str, list[str]], dict[str, str] | None]:
    """Return captions and splits of {"images": [{"filename", "split", "sentences": [{"raw"}]}]}."""
    try:
        images = json.loads(data)["images"]
        entries = [(image["filename"], image["split"], [s["raw"] for s in image["sentences"]]) for image in images]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: not Karpathy's JSON ({type(error).__name__}: {error})") from None
    rows = ((os.path.basename(str(name)), str(raw)) for name, _, sentences in entries for raw in sentences)
    captions = _group(rows, defects)
    if not with_splits:
        return captions, None
    split: dict[str, str] = {}
    order = (*EVALUATED, "train", "extra")
    listed = [(os.path.basename(str(name)), word if word in SPLITS else "extra") for name, word, _ in entries]
    for name, word in sorted(listed, key=lambda entry: order.index(entry[1])):
        if split.setdefault(name, word) != word:
            defects.add("listed in two splits", f"{name}: {word}, kept in {split[name]}")
    return captions, split


def _group(rows: Iterable[tuple[str, str]], defects: Defects) -> dict[str, list[str]]:
    """Return {image: captions}; an image that lost all of its captions stays, with none."""
    captions: dict[str, list[str]] = {}
    for name, text in rows:
        kept = captions.setdefault(name, [])
        caption = " ".join(text.split("\n")).strip()
        if not caption:
            defects.add("empty caption", name)
        elif _UNDECODABLE.search(caption):
            defects.add("caption not UTF-8", f"{name}: {caption[:80]}")
        else:
            kept.append(caption)
    return captions


# --- splits ---


def _read_lists(files: list[SourceFile], defects: Defects) -> dict[str, str] | None:
    """Return {image: split} of Flickr_8k.{train,dev,test}Images.txt; None where there is no list at all.

    An image that is listed twice stays out of train, whatever the order: nothing that is tested may be trained on.
    """
    split: dict[str, str] = {}
    found = set()
    for word in ("test", "dev", "train"):
        copies = [file for file in files if file.name.lower() == f"flickr_8k.{word}images.txt"]
        if not copies:
            continue
        found.add(word)
        file = _one_of(copies)
        seen: set[str] = set()
        for number, line in enumerate(decode_text(_read_text(file)).split("\n"), 1):
            name = os.path.basename(line.strip())
            if not line.strip():
                continue
            if not _IMAGE_NAME.fullmatch(name) or _UNDECODABLE.search(name):
                defects.add("stray line", f"{file.name} line {number}: {line[:80]}")
            elif name in seen:
                defects.add("repeated list line", f"{file.name} line {number}: {name}")
            elif name in split:
                defects.add("listed in two splits", f"{name}: {LISTED[word]}, kept in {split[name]}")
            else:
                split[name] = LISTED[word]
            seen.add(name)
    for word in sorted(set(LISTED) - found) if found else ():
        defects.add("no list for this split", LISTED[word])
    return split if found else None


def random_splits(names: Iterable[str], seed: int) -> dict[str, str]:
    """Draw 1000 images for val and for test, or an eighth each of a smaller set; the rest is train.

    By a hash of seed and name: the same on every machine and for every order of the files.
    """
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{printable(name)}".encode()).digest())
    held = min(1000, len(order) // 8)
    return {n: "test" if i < held else "val" if i < 2 * held else "train" for i, n in enumerate(order)}


def keep_from_training(splits: dict[str, list[CheckedImage]], defects: Defects) -> dict[str, list[CheckedImage]]:
    """Return the splits without the train images whose bytes are those of a test or val image under another name."""
    held = {image.sha256: image.source.name for split in EVALUATED for image in splits.get(split, [])}
    for image in splits.get("train", []):
        if image.sha256 in held:
            defects.add("same bytes as a test or val picture", f"{image.source.name}: {held[image.sha256]}")
    return {**splits, "train": [p for p in splits.get("train", []) if p.sha256 not in held]}


def _match(
    files: dict[str, SourceFile], captions: dict[str, list[str]], split: dict[str, str] | None, defects: Defects
) -> dict[str, SourceImage]:
    """Return the images that have both a file and a caption, sorted by name; everything else is recorded."""
    split = split or {}
    for name in sorted(set(captions) | set(split)):
        if name not in files:
            defects.add("listed picture missing" if name in split else "captions without picture", name)
    images = {}
    for name in sorted(files):
        texts = captions.get(name, [])
        if not texts or _UNDECODABLE.search(name):
            defects.add("picture without captions", name)
            continue
        images[name] = SourceImage(name, files[name], tuple(texts))
        if split and name not in split:
            defects.add("picture in no list", name)
        if len(set(texts)) < len(texts):
            defects.add("repeated caption", name)
    spread = Counter(c for p in images.values() for c in set(p.captions))
    for caption, count in spread.items():
        if count > 1:
            defects.add("caption on several pictures", f"{count}: {caption}")
    return images
