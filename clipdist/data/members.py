"""Decide which members of a sample are its image and its captions. Training, validation and all tools ask here."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from clipdist.data.index import IMAGE_KINDS

if TYPE_CHECKING:
    from clipdist import config

CAPTIONS = ("json:captions", "txt", "json:caption")
NEGATIVES = ("json:negatives", "neg")


class Captions(NamedTuple):
    """The captions of a sample, and where they come from, in words."""

    texts: list[str]
    source: str


@dataclass(frozen=True)
class Members:
    """What is looked for in a sample; the first that is there and not empty is taken.

    Attributes:
        images: kinds of members.
        captions: kinds of members that are text, or KIND:FIELD of a JSON member. FIELD is a path of names with dots,
            each of which may lead into a list. A kind that ends in json, without a field, is a text or a list of texts.
        lines: whether the lines of a text are captions. auto: they are, unless "caption" of the .json is the same text,
            as img2dataset writes it.
        negatives: as captions: texts that are no captions of the image; none are looked for.
    """

    images: tuple[str, ...] = IMAGE_KINDS
    captions: tuple[str, ...] = CAPTIONS
    lines: Literal["auto", "split", "whole"] = "auto"
    negatives: tuple[str, ...] = ()

    @functools.cached_property
    def caption_kinds(self) -> frozenset[str]:
        """The kinds of members that captions are looked for in."""
        return frozenset(source.partition(":")[0] for source in self.captions)

    @functools.cached_property
    def negative_kinds(self) -> frozenset[str]:
        """The kinds of members that negatives are looked for in."""
        return frozenset(source.partition(":")[0] for source in self.negatives)

    def is_read(self, kind: str) -> bool:
        """Return whether a reader asks for members of this kind."""
        texts = kind == "json" or kind in self.caption_kinds or kind in self.negative_kinds
        return texts or kind in self.images or kind.endswith(".ids")

    def split(self, kind: str, text: str, record: Any) -> Captions:
        """Return the captions that a text member holds.

        Args:
            record: the sample's .json.
        """
        lines = [line.strip() for line in re.split("[\r\n]+", text) if line.strip()]
        if len(lines) < 2:
            return Captions(lines, f".{kind}")
        caption = record.get("caption") if isinstance(record, dict) else None
        same = isinstance(caption, str) and caption.split() == text.split()
        if self.lines == "whole" or (self.lines == "auto" and same):
            return Captions([text.strip()], f".{kind} with its line breaks as one caption")
        return Captions(lines, f"lines of .{kind}")


DEFAULT_MEMBERS = Members()


def members_of(cfg: config.Data) -> Members:
    """Return what the configuration says of samples' members."""
    return Members(
        tuple(map(_kind, cfg.image_members)) or IMAGE_KINDS,
        tuple(map(_kind, cfg.caption_members)) or CAPTIONS,
        cfg.caption_lines,
        (tuple(map(_kind, cfg.negative_members)) or NEGATIVES) if cfg.negatives else (),
    )


def is_json(source: str) -> bool:
    """Return whether a caption source is a JSON member or a field of one."""
    return ":" in source or source.rpartition(".")[2] == "json"


def tell_sources(sources: Mapping[str, int]) -> str:
    """Return in words where captions were found.

    Args:
        sources: Captions.source -> number of samples.
    """
    if len(sources) < 2:
        return "".join(sources)
    return ", ".join(f"{source} ({count} samples)" for source, count in sources.items())


def texts_at(value: Any, path: str) -> list[str]:
    """Return the texts, not empty, that a JSON value holds at a path of names with dots; "": the value itself."""
    values = [value]
    for name in path.split(".") if path else ():
        values = [item[name] for item in _items(values) if isinstance(item, dict) and name in item]
    return [text for text in _items(values) if isinstance(text, str) and text.strip()]


def text_fields(record: Any, path: str = "", depth: int = 4) -> list[str]:
    """Return the paths of a JSON value at which texts_at finds something, in their order."""
    found = [path] if texts_at(record, "") else []
    for item in _items([record]) if depth else ():
        for name, value in item.items() if isinstance(item, dict) else ():
            found += text_fields(value, f"{path}.{name}".lstrip("."), depth - 1)
    return list(dict.fromkeys(found))


def _items(values: Iterable[Any]) -> list[Any]:
    """Return the values, the items of a list in its place."""
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def _kind(name: str) -> str:
    """ ".TXT" -> "txt", as the index writes kinds; a field keeps its case."""
    kind, colon, field = name.partition(":")
    return kind.lower().lstrip(".") + colon + field
