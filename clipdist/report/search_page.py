"""Queries and the pictures found for them in, one self-contained HTML page out: it loads nothing from anywhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clipdist.evals.search import Hit

SIDE = 384  # longer side of a picture on the page, pixels: sharp where two stand beside one another on a phone
QUALITY = 82  # of its JPEG

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #fff; --ink: #181c24; --quiet: #5c6472; --mat: #eef0f4; --line: #d8dce4; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #14171c; --ink: #e8eaee; --quiet: #9aa3b2; --mat: #20252d; --line: #343b46; }}
}}
* {{ box-sizing: border-box; }}
body {{
  margin: 0 auto; padding: 1.5rem max(1rem, env(safe-area-inset-left)); max-width: 90rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere;
}}
h1 {{ margin: 0; font-size: 1.15rem; }}
h2 {{ margin: 0 0 .75rem; font-size: 1.4rem; line-height: 1.25; }}
p, nav {{ margin: .25rem 0 0; color: var(--quiet); font-size: .9rem; }}
nav ol {{ margin: .5rem 0 0; padding-left: 1.5rem; columns: 18rem; }}
a {{ color: inherit; }}
section {{ margin-top: 1.5rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }}
.query {{ display: block; max-width: 12rem; max-height: 12rem; margin-bottom: .75rem; border-radius: .4rem; }}
.hits {{
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(9.5rem, 45%), 1fr)); gap: 1rem .8rem;
  margin: 0; padding: 0; list-style: none;
}}
figure {{ margin: 0; }}
figure img {{
  display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--mat); border-radius: .4rem;
}}
figcaption {{ margin-top: .4rem; font-size: .9rem; }}
figcaption b {{ font-variant-numeric: tabular-nums; }}
figcaption small {{ display: block; color: var(--quiet); }}
@media print {{ section, li {{ break-inside: avoid; }} nav {{ display: none; }} }}
</style>
</head>
<body>
"""


@dataclass(frozen=True)
class Answer:
    """A query, what was found with the pixels, uint8 [h, w, 3] each, and the query's own where it is a picture."""

    query: str
    hits: Sequence[Hit]
    pixels: Sequence[np.ndarray]
    query_pixels: np.ndarray | None = None


def search_page(title: str, remarks: Sequence[str], answers: Sequence[Answer]) -> str:
    """The page: a section per query with a grid of its pictures, rank, score, first caption and name under each.

    It follows the reader's choice of light or dark, stands two pictures abreast on a phone, and prints. All text is
    escaped, and the page forbids its reader to load anything.

    Args:
        title: of the page; the first answer's query is a good one.
        remarks: lines under it.
    """
    parts = [_HEAD.format(title=html.escape(title)), f"<header><h1>{html.escape(title)}</h1>\n"]
    parts += [f"<p>{html.escape(remark)}</p>\n" for remark in remarks]
    if len(answers) > 1:
        parts.append(_contents(answers))
    parts.append("</header>\n<main>\n")
    parts += [_section(number, answer) for number, answer in enumerate(answers, start=1)]
    parts.append("</main>\n</body>\n</html>\n")
    return "".join(parts)


def data_uri(pixels: np.ndarray) -> str:
    """The picture uint8 [h, w, 3], shrunk to SIDE at most, as a data: address that holds a JPEG."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _contents(answers: Sequence[Answer]) -> str:
    links = "".join(
        f'<li><a href="#query-{number}">{html.escape(answer.query)}</a></li>\n'
        for number, answer in enumerate(answers, start=1)
    )
    return f"<nav><ol>\n{links}</ol></nav>\n"


def _section(number: int, answer: Answer) -> str:
    asked = ""
    if answer.query_pixels is not None:
        asked = f'<img class="query" src="{data_uri(answer.query_pixels)}" alt="the picture that was asked with">\n'
    hits = "".join(_figure(hit, pixels) for hit, pixels in zip(answer.hits, answer.pixels))
    heading = f"<h2>{html.escape(answer.query)}</h2>"
    return f'<section id="query-{number}">\n{heading}\n{asked}<ol class="hits">\n{hits}</ol>\n</section>\n'


def _figure(hit: Hit, pixels: np.ndarray) -> str:
    name = html.escape(hit.filename or hit.key)
    caption = html.escape(hit.caption)
    return (
        f'<li><figure><img src="{data_uri(pixels)}" alt="{caption or name}" loading="lazy">'
        f"<figcaption><b>{hit.rank}. {hit.score:.3f}</b> {caption}<small>{name}</small></figcaption></figure></li>\n"
    )
