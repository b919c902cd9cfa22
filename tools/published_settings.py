"""Writes the settings that the lists in engine/magcache/ratios were published with into MagCache's
help, in every language; the second half of `make help-tables`."""

import json
import re
from pathlib import Path

from host.find import PACK

DOCS = PACK / "web" / "docs"
PAGES = (DOCS / "BraidMagCache.md", *sorted((DOCS / "BraidMagCache").glob("*.md")))
SETTINGS = ("threshold", "retention_ratio", "k")
TABLE = re.compile(
    r"(\| [^|\n]+" + "".join(rf" \| `{name}`" for name in SETTINGS) + r" \|\n\|[-|]+\|\n)"
    r"((?:\|.*\n)*)"
)


def rows() -> str:
    """A row of the help's table for each choice of settings, with the lists that have it."""
    lists: dict[tuple[str, ...], list[str]] = {}
    for path in sorted((PACK / "engine" / "magcache" / "ratios").glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if published := document["recommended"]:
            settings = tuple(f"{published[name]:g}" for name in SETTINGS)
            lists.setdefault(settings, []).append(document["name"])
    return "".join(
        f"| {', '.join(names)} | {' | '.join(settings)} |\n" for settings, names in lists.items()
    )


def with_rows(page: str) -> str:
    """The help page with the table as the lists have it; ValueError when it has no table."""
    written, count = TABLE.subn(lambda table: table[1] + rows(), page)
    if count != 1:
        raise ValueError(f"{count} tables of published settings in the page, expected one")
    return written


def write(page: Path) -> None:
    page.write_text(with_rows(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    for each in PAGES:
        write(each)
