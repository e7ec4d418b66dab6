"""What pages are made of: one file with its style and pictures in it, which opens without a network."""

import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from ecdit.whole import whole

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; margin: 0 auto; max-width: 1100px;
  padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid #d8dee4; }
p { max-width: 46rem; } p.note { color: #57606a; font-size: .9rem; } code { background: #f3f4f6; padding: 0 .25em; }
table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e5e7eb; text-align: right; vertical-align: top; }
th:first-child, td:first-child, table.text td, table.text th { text-align: left; }
thead th { border-bottom: 2px solid #afb8c1; } td small { color: #57606a; white-space: nowrap; }
.wide { overflow-x: auto; } img { max-width: 100%; } img.chart { display: block; }
img.small { width: 60px; height: 60px; image-rendering: pixelated; }
img.sample { width: 96px; height: 96px; object-fit: contain; image-rendering: pixelated; }
div.strip { display: flex; flex-wrap: wrap; gap: 4px; max-width: 400px; }
figure { margin: .5rem 0 1rem; } figcaption { color: #57606a; font-size: .85rem; }
nav a { margin-right: 1rem; }
"""


def write_page(title: str, command: Sequence[str], sections: Sequence[tuple[str, str, str]], out: Path) -> None:
    """command: what made the page. sections: (id, title, content) of each, the content marked up."""
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{name}</h2>{content}</section>' for key, name, content in sections)
    made = escape(shlex.join(command))
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f'<p class="note">Made by <code>{made}</code></p><nav>{links}</nav>{body}</body></html>\n'
    )
    with whole(out) as aside:
        aside.write_text(page, encoding="utf-8")


def table(heads: list[str], rows: Iterable[list[str]], *, html: bool = False, kind: str = "") -> str:
    """`html`: the cells are marked up already; heads never are. kind: its class, text for columns of words."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell if html else escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def image(uri: str, text: str, kind: str = "") -> str:
    return f'<img class="{kind}" src="{uri}" alt="{escape(text)}" title="{escape(text)}">'


def figure(image: str, caption: str) -> str:
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def note(text: str, *, html: bool = False) -> str:
    return f'<p class="note">{text if html else escape(text)}</p>'


def number(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.4g}"


def percent(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.1%}"
