"""Text, rows and pictures in, the parts of a self-contained HTML page out; the one place that writes tags around data.

The page follows the reader's choice of light or dark, fits a phone, prints on A4, and forbids itself to load anything.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

PICTURE_WIDTH = 1600  # pixels at most; a page with pictures should still go by mail
LONG = 12  # rows of a table of two columns from which on it stands in several columns beside one another

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #181c24; --quiet: #5c6472; --mat: #f3f4f7; --line: #d8dce4; --note: #8a5200;
  --series-0: #0b63ce; --series-1: #c9500c; --series-2: #0f8a5f; --series-3: #9b3192;
  --series-4: #8a6d00; --series-5: #c02a3c; --series-6: #0f7f96; --series-7: #5d6370;
}
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #14171c; --ink: #e8eaee; --quiet: #9aa3b2; --mat: #1e232b; --line: #343b46; --note: #e0a95a;
  --series-0: #6aaefc; --series-1: #ff9a5c; --series-2: #4fd1a1; --series-3: #e08ad6;
  --series-4: #dcc04a; --series-5: #ff7b88; --series-6: #57cbe2; --series-7: #a9b1bf;
} }
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem max(1rem, env(safe-area-inset-left)); max-width: 84rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; }
h2 { margin: 0 0 .75rem; font-size: 1.25rem; }
h3 { margin: 1.25rem 0 .5rem; font-size: 1.05rem; }
h4 { margin: 1rem 0 .4rem; font-size: .95rem; }
p { margin: .4rem 0; color: var(--quiet); font-size: .9rem; }
p.note { color: var(--note); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin-top: .75rem; font-size: .9rem; }
a { color: var(--series-0); }
ul { margin: .4rem 0; padding: 0; list-style: none; }
.runs small { color: var(--quiet); font-size: .85em; }
section { margin-top: 1.75rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem; margin: 0; }
.tiles div { padding: .6rem .75rem; background: var(--mat); border-radius: .4rem; }
dt { color: var(--quiet); font-size: .8rem; }
dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.charts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1.25rem 1.5rem;
  margin-bottom: 1rem;
}
figure { margin: 0; }
.charts figcaption { font-weight: 600; font-size: .95rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--quiet); font: 12px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
.grid, .axis, .mark, .curve { fill: none; vector-effect: non-scaling-stroke; }
.grid { stroke: var(--line); }
.axis { stroke: var(--quiet); }
.mark { stroke-width: 1; opacity: .4; }
.curve { stroke-width: 1.8; stroke-linecap: round; stroke-linejoin: round; }
.pale { stroke-width: 1; stroke-dasharray: none; opacity: .3; }
.key { display: inline-block; width: 26px; height: 10px; margin-right: .4rem; vertical-align: middle; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; color: var(--quiet); font-size: .85rem; }
.wide { overflow-x: auto; }
.long { columns: 19rem; column-gap: 2.5rem; }
.long table { width: 100%; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1.2rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { overflow-wrap: break-word; max-width: 22rem; }
td { min-width: 7.2rem; }
@media screen and (max-width: 40rem) {
  tbody th { overflow-wrap: anywhere; min-width: 8rem; }
  .numbers tbody th { min-width: 0; }
  td:nth-child(4):last-child { min-width: 15rem; }
}
tr { break-inside: avoid; }
thead th { color: var(--quiet); font-weight: 600; }
tbody th { font-weight: 400; color: var(--quiet); }
.numbers th, .numbers td { text-align: right; white-space: nowrap; min-width: 0; }
.marked th, .marked td { font-weight: 700; color: var(--ink); }
.picture { margin: .75rem 0; overflow-x: auto; }
.picture img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: .4rem; }
.picture figcaption { margin-top: .3rem; color: var(--quiet); font-size: .9rem; }
details { margin-top: .75rem; }
summary { cursor: pointer; }
pre {
  margin: .5rem 0; padding: .75rem; background: var(--mat); border-radius: .4rem; font-size: .8rem;
  white-space: pre-wrap;
}
@page { size: A4; margin: 14mm; }
@media print {
  :root { color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, details { display: none; }
  .charts { grid-template-columns: 1fr 1fr; }
  .wide, .picture { overflow: visible; }
  .long { columns: 2; }
  table { font-size: 8.5pt; }
  th, td { padding-right: .6rem; min-width: 4.8rem; }
  thead { display: table-header-group; }
  figure, table, .long, .tiles div, .runs li { break-inside: avoid; }
  .long table { break-inside: auto; }
  h1, h2, h3, h4, p:has(+ .wide) { break-after: avoid; }
  .picture img { min-width: 0 !important; max-height: 200mm; width: auto; }
}
"""


def page(title: str, head: str, body: str) -> str:
    """The document; `head` and `body` are HTML already, the title is not."""
    words = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{words}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{words}</h1>\n{head}</header>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def heading(level: int, text: str) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>\n"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>\n"


def note(text: str) -> str:
    """A line that says what is missing."""
    return f'<p class="note">{html.escape(text)}</p>\n'


def tiles(facts: Sequence[tuple[str, str]]) -> str:
    """Names and values, to be seen at once."""
    inner = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>\n" for name, value in facts)
    return f'<dl class="tiles">\n{inner}</dl>\n'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False, marked: Iterable[int] = ()) -> str:
    """Text cells; the first of a row is its heading. Too wide a table moves sideways on its own.

    Args:
        head: column headings; none for a list of facts.
        numbers: align to the right.
        marked: rows to be set in bold.
    """
    bold = set(marked)
    body = ""
    for place, row in enumerate(rows):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        opened = '<tr class="marked">' if place in bold else "<tr>"
        body += f'{opened}<th scope="row">{html.escape(row[0])}</th>{cells}</tr>\n'
    top = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    top = f"<thead><tr>{top}</tr></thead>\n" if head else ""
    kind = "long" if not head and len(rows) >= LONG and len(rows[0]) == 2 else "wide"
    look = ' class="numbers"' if numbers else ""
    return f'<div class="{kind}"><table{look}>\n{top}<tbody>\n{body}</tbody></table></div>\n'


def picture(path: Path, caption: str) -> str:
    """The picture inside the page: WebP, no wider than PICTURE_WIDTH; a note where it cannot be read.

    On a phone a wide sheet stays large enough to be read, and moves sideways.
    """
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        image.thumbnail((PICTURE_WIDTH, 8 * PICTURE_WIDTH))
        file = io.BytesIO()
        image.save(file, "WEBP", quality=85)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return note(f"{path.name}: cannot be read as a picture.")
    data = base64.b64encode(file.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}" style="min-width: min(40rem, {image.width}px)"'
    words = html.escape(caption)
    return (
        f'<figure class="picture"><img src="data:image/webp;base64,{data}" {size} alt="{words}">'
        f"<figcaption>{words}</figcaption></figure>\n"
    )
