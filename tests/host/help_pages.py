"""Help pages as text: where they lie, their tables, and what a translation was made from."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from .find import PACK
from .locales import LANGUAGES, english

DOCS = PACK / "web" / "docs"
INPUT_HEADS = {"en": "input", "ja": "入力", "zh": "输入"}
"""The first head of an input table, by which it is found."""
STAMP = re.compile(r"\n<!-- English: ([0-9a-f]{12}) -->\n\Z")


def page_path(node_id: str, language: str) -> Path:
    """Where ComfyUI looks for a help page."""
    return DOCS / (f"{node_id}.md" if language == "en" else f"{node_id}/{language}.md")


def sources_path(language: str) -> Path:
    """For each node the hash of the labels and tooltips that nodeDefs.json was made from."""
    return PACK / "locales" / language / "sources.json"


def cells(line: str) -> list[str]:
    """The cells of a table's row; none of another line."""
    if not line.startswith("|"):
        return []
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def input_table(lines: list[str], language: str) -> tuple[int, int] | None:
    """(first, one past the last) line of the input table."""
    heads = (i for i, line in enumerate(lines) if cells(line)[:1] == [INPUT_HEADS[language]])
    start = next(heads, None)
    if start is None:
        return None
    rows = (i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return start, next(rows, len(lines))


def page_hash(page: str) -> str:
    """Of an English page without the ranges of its inputs, which are generated in each language."""
    lines = page.split("\n")
    start, end = input_table(lines, "en") or (0, 0)
    for i in range(start, end):
        first, *_, last = cells(lines[i])
        lines[i] = f"{first} | {last}"
    return _hash("\n".join(lines))


def texts_hash(texts: dict) -> str:
    """Of a node's labels and tooltips."""
    return _hash(json.dumps(texts, sort_keys=True, ensure_ascii=False))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def stale() -> Iterator[tuple[str, str, Path]]:
    """(node, what its hash would be, file) of each translation made from another English."""
    for node_id, texts in english().items():
        page = page_hash(page_path(node_id, "en").read_text(encoding="utf-8"))
        for language in LANGUAGES:
            path = page_path(node_id, language)
            found = STAMP.search(path.read_text(encoding="utf-8"))
            if found is None or found[1] != page:
                yield node_id, page, path
            if sources(language).get(node_id) != texts_hash(texts):
                yield node_id, texts_hash(texts), sources_path(language)


def sources(language: str) -> dict[str, str]:
    """What sources.json says; nothing before it is there."""
    path = sources_path(language)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
