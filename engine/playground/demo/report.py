"""The report page of the demo: sections of text, pictures and tables in one folder."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ...disk.writing import replaced_when_whole

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --dim: #667; --paper: #fff; --line: #d8dce6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ef; --dim: #99a; --paper: #15171d; --line: #333947; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.8rem; } h2 { margin-top: 2.5rem; }
img { max-width: 100%; image-rendering: auto; border-radius: 6px; }
figure { margin: 1rem 0; } figcaption { color: var(--dim); font-size: .9rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """(H, W, 3) in [0, 1] or 8-bit, with what it shows."""

    pixels: np.ndarray
    caption: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One chapter of the report."""

    title: str
    text: str
    pictures: Sequence[Picture] = ()
    table: Sequence[Sequence[str]] = field(default=())
    """Rows, the first one is the head."""


def write_report(folder: Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write index.html and its pictures; returns the page."""
    parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>"]
    for number, section in enumerate(sections, start=1):
        parts.append(_section_html(folder, number, section))
    page = folder / "index.html"
    body = "\n".join(parts)
    text = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><body>{body}</body></html>"
    )
    with replaced_when_whole(page) as file:
        file.write(text.encode())
    return page


def _section_html(folder: Path, number: int, section: Section) -> str:
    parts = [f"<h2>{number} · {html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>"]
    for index, picture in enumerate(section.pictures, start=1):
        name = f"{number}-{index}.png"
        _write_png(folder / name, picture.pixels)
        caption = html.escape(picture.caption)
        parts.append(
            f"<figure><img src='{name}' alt='{caption}'><figcaption>{caption}</figcaption></figure>"
        )
    if section.table:
        parts.append(_table_html(section.table))
    return "\n".join(parts)


def _table_html(rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows[1:])
    return f"<table>{row(rows[0], 'th')}{body}</table>"


def _write_png(path: Path, pixels: np.ndarray) -> None:
    if pixels.dtype != np.uint8:
        pixels = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    with replaced_when_whole(path) as file:
        Image.fromarray(pixels).save(file, format="PNG")


def tiled(rows: Sequence[np.ndarray], scale: int = 4) -> np.ndarray:
    """Rows of pictures (N, H, W, 3) as one picture, each pixel `scale` screen pixels wide."""
    joined = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    return joined.repeat(scale, axis=0).repeat(scale, axis=1)
