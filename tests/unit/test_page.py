"""The page of a search: self-contained, escaped, with the pictures in their order."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from clipdist.evals.search import Hit
from clipdist.report.search_page import SIDE, Answer, search_page

NASTY = '<script>alert("1")</script> & {braces}'
VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a reader would see: start tags with their attributes, and text; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def of(self, wanted: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == wanted]


def hit(rank: int, caption: str = "a dog", filename: str = "dog.jpg") -> Hit:
    return Hit(rank, 0.5 - rank / 100, f"key{rank}", "00000.tar", filename, caption, rank)


def grey(level: int, height: int = 20, width: int = 30) -> np.ndarray:
    return np.full((height, width, 3), level, dtype=np.uint8)


def picture_of(address: str | None) -> Image.Image:
    assert address
    head, _, data = address.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_pictures_stand_in_order_with_what_is_said_of_them() -> None:
    answer = Answer("two dogs", [hit(1), hit(2, "", "")], [grey(40), grey(200, 900, 3000)], grey(120))
    page = Page(search_page("two dogs", ["among 2 pictures"], [answer]))
    asked, first, second = (picture_of(attributes["src"]) for attributes in page.of("img"))
    assert [round(np.asarray(p).mean() / 40) for p in (asked, first, second)] == [3, 1, 5]
    assert first.size == (30, 20)  # a small picture stays as it is
    assert second.size == (SIDE, round(SIDE * 900 / 3000))
    assert [attributes["alt"] for attributes in page.of("img")][1:] == ["a dog", "key2"]
    text = " ".join(page.words)
    assert re.search(r"1\. 0\.490.*a dog.*dog\.jpg.*2\. 0\.480.*key2", text, re.DOTALL)
    assert "among 2 pictures" in text


def test_all_text_is_escaped() -> None:
    answer = Answer(NASTY, [hit(1, NASTY, NASTY)], [grey(1)])
    page = Page(search_page(NASTY, [NASTY], [answer, answer]))
    assert not page.of("script")
    assert page.of("img")[0]["alt"] == NASTY
    title_heading_remark, links, query_caption_name = 3, 2, 3
    assert sum(words.count(NASTY) for words in page.words) == title_heading_remark + links + 2 * query_caption_name


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = search_page("q", [], [Answer("http://example.org/a.png", [hit(1)], [grey(1)])])
    page = Page(text)
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert addresses
    assert all(address and address.startswith(("data:image/", "#")) for address in addresses)
    assert "url(" not in text
    assert not page.of("link")
    assert any("default-src 'none'" in (attributes.get("content") or "") for attributes in page.of("meta"))


def test_several_queries_have_a_table_of_contents() -> None:
    answers = [Answer(query, [hit(1)], [grey(1)]) for query in ("one", "two", "three")]
    page = Page(search_page("3 queries", [], answers))
    sections = [attributes["id"] for attributes in page.of("section")]
    assert [attributes["href"] for attributes in page.of("a")] == [f"#{name}" for name in sections]
    assert len(set(sections)) == 3
    assert not Page(search_page("one", [], answers[:1])).of("nav")
