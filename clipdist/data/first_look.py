"""Look at some samples of every source before long work begins: where images and captions are, if there are any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from clipdist.data.bad_sample import BadSample
from clipdist.data.catalog import Catalog
from clipdist.data.fetch import is_remote, safe_name
from clipdist.data.members import Captions, tell_sources, text_fields
from clipdist.data.reader import Reader, StoredSample
from clipdist.errors import Unreadable, UserError
from clipdist.storage import AWAY, reason

LOOKED_AT = 16  # samples of a source, spread evenly
_NAMED = 12  # kinds or fields, in a line
_MARKS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM")  # the first bytes of images that can be decoded
_CAPTION_WORDS = ("caption", "text", "title")  # in the names of fields
_NO_CAPTION = ("missing caption", "not JSON")
_TIFFS = (b"II*\0", b"MM\0*")


class _Look(NamedTuple):
    """What a look at one sample found.

    Attributes:
        sample: None if its shard is remote: then the index alone is known.
        kinds: of its members, empty ones left out.
        image: the kind of its image; "": it has none.
        captions: empty where they were not, or cannot be, read; None: it has none.
        negatives: empty where there are none, or they were not read.
    """

    sample: StoredSample | None
    kinds: list[str]
    image: str
    captions: Captions | None
    negatives: Captions = Captions([], "")


def look_at(catalog: Catalog, what: str, names: Sequence[str], captions: bool = True, needed_by: str = "") -> str:
    """Return in words where images and captions were found. Of remote shards the indices alone are looked at.

    Args:
        what: the setting that names the shards, such as data.train.
        names: of the catalog's sources.
        captions: whether samples need any; else negatives are not looked for either.
        needed_by: what needs the captions, such as objectives.clip, for the error.

    Raises:
        UserError: no sample of a source that was looked at has an image, or none has a caption.
        Unreadable: a shard cannot be read now.
    """
    reader, found = Reader(catalog), []
    try:
        for name, (first, end) in zip(names, catalog.sources):
            begin, count = int(catalog.starts[first]), int(catalog.starts[end] - catalog.starts[first])
            places = np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(np.int64))
            looks = [_look(reader, begin + place) for place in places.tolist()]
            of = f"{what}: {safe_name(name)}: of {len(looks)} samples looked at none has"
            if fault := _image_fault(looks, reader, what):
                raise UserError(f"{of} {fault}")
            if captions and (fault := _caption_fault(looks, reader, what)):
                raise UserError(f"{needed_by} needs captions: {of} {fault}".removeprefix(" needs captions: "))
            found += looks
    finally:
        reader.close()
    if not found:
        return ""
    images = ", ".join(f".{kind}" for kind, _ in Counter(look.image for look in found if look.image).most_common())
    told = f"{len(found)} samples looked at: images are {images}"
    read = [look.captions for look in found if look.captions and look.captions.texts]
    if captions and not any(look.sample for look in found):
        told += "; captions of remote shards are not looked at"
    elif captions and read:
        least, most = min(len(own.texts) for own in read), max(len(own.texts) for own in read)
        each = f"{least} each" if least == most else f"{least} to {most} each"
        told += f"; captions are {tell_sources(Counter(own.source for own in read))}, {each}"
    return told + (_negatives(found, catalog, what) if captions else "")


def _negatives(looks: Sequence[_Look], catalog: Catalog, what: str) -> str:
    """Return in words where negatives were found, if they are looked for.

    Raises:
        UserError: samples were read, and none has any.
    """
    sources, read = catalog.members.negatives, [look for look in looks if look.sample]
    if not sources or not read:
        return ""
    having = [look.negatives for look in read if look.negatives.texts]
    if not having:
        raise UserError(
            f"{what}: of {len(read)} samples looked at none has negatives ({', '.join(sources)} looked for);"
            f" {_members(looks)}; data.negative_members names others"
        )
    most = max(len(own.texts) for own in having)
    where = tell_sources(Counter(own.source for own in having))
    return f"; {len(having)} have negatives: {where}, at most {most} each"


def _look(reader: Reader, sample_id: int) -> _Look:
    """Look at one sample. Raises Unreadable."""
    shard, row = reader.catalog.locate(sample_id)
    tar, members = reader.catalog.shards[shard].tar, reader.members
    try:
        table = reader.catalog.table(shard)
        kinds = [kind for kind, column in table.column_of.items() if table.size[row, column]]
        image = next((kind for kind in members.images if kind in kinds), "")
        if is_remote(tar):
            there = any(kind in kinds for kind in members.caption_kinds)
            return _Look(None, kinds, image, Captions([], "") if there else None)
        sample = reader.sample(sample_id)
        try:
            return _Look(sample, kinds, image, sample.find_captions(), sample.find_negatives())
        except BadSample as error:
            return _Look(sample, kinds, image, None if error.reason in _NO_CAPTION else Captions([], ""))
    except AWAY as error:
        raise Unreadable(f"{safe_name(tar)}: cannot be read ({reason(safe_name(tar), error)})") from None


def _image_fault(looks: Sequence[_Look], reader: Reader, what: str) -> str:
    """Return what is there instead, and what to do, where no sample has an image that is decoded, else ""."""
    if not looks or any(look.image and not _head(look.sample, look.image).startswith(_TIFFS) for look in looks):
        return ""
    heads = {kind: _head(look.sample, kind) for look in looks for kind in look.kinds}
    pictures = [kind for kind, head in heads.items() if head.startswith(_MARKS)]
    way = _way(looks, what, "image", pictures)
    if any(head.startswith(_TIFFS) for head in heads.values()):
        way = "; TIFFs are not decoded: convert them to PNG or JPEG"
    return f"an image ({', '.join(reader.members.images)} looked for); {_members(looks)}{way}"


def _caption_fault(looks: Sequence[_Look], reader: Reader, what: str) -> str:
    """Return what is there instead, and what to do, where no sample has a caption; "" where some have."""
    if not looks or any(look.captions for look in looks):
        return ""
    samples = [(look.sample, look.kinds) for look in looks if look.sample]
    texts = Counter(kind for sample, kinds in samples for kind in kinds if _is_text(sample, kind))
    fields = Counter(f"json:{field}".rstrip(":") for sample, _ in samples for field in _fields(sample))
    held = f"; text is in {_listed(list(fields))}" if fields else ""
    likely = [name for name in fields if name == "json" or any(word in name.lower() for word in _CAPTION_WORDS)]
    way = _way(looks, what, "caption", [*texts, *likely, *(["json:FIELD"] if fields else [])])
    return f"a caption ({', '.join(reader.members.captions)} looked for); {_members(looks)}{held}{way}"


def _kinds(looks: Sequence[_Look]) -> list[str]:
    """Return the kinds of members, the most frequent first."""
    return [kind for kind, _ in Counter(kind for look in looks for kind in look.kinds).most_common()]


def _members(looks: Sequence[_Look]) -> str:
    kinds = _kinds(looks)
    dots = any("." in kind and not kind.endswith(".ids") for kind in kinds)
    why = " (a member's name is a key up to its first dot, then a kind)" if dots else ""
    return f"their members are {_listed(kinds) or 'empty'}{why}"


def _way(looks: Sequence[_Look], what: str, part: str, choices: Sequence[str]) -> str:
    """Return how to name the members that hold a part of a sample, of which `choices` may be meant."""
    if choices and "." in choices[0].partition(":")[0] and len(_kinds(looks)) > _NAMED:
        return "; write names without further dots"
    flag = f"data.{part}_members=" if what.startswith("data.") else f"--{part}-members "
    return f"; name them: {flag}{choices[0]}" if choices else f"; {flag.strip(' =')} names others"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if names[_NAMED:] else "")


def _head(sample: StoredSample | None, kind: str) -> bytes:
    try:
        return ((sample.read(kind) if sample else b"") or b"")[:8]
    except BadSample:
        return b""


def _is_text(sample: StoredSample, kind: str) -> bool:
    """Return whether a member may be captions: printable UTF-8, and none of the kinds that have another meaning."""
    try:
        text = (sample.read(kind) or b"").decode("utf-8")
    except (BadSample, UnicodeDecodeError):
        return False
    text = text.strip().replace("\n", " ")
    return bool(text) and text.isprintable() and kind.rpartition(".")[2] not in ("json", "cls", "ids")


def _fields(sample: StoredSample) -> list[str]:
    try:
        return text_fields(sample.parse("json"))
    except BadSample:
        return []
