"""Texts that the page shows, as they are written in the scripts and in what answers them."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from .find import PACK

CALL = re.compile(r"""(?<![\w.])words\((?:\s*"((?:[^"\\]|\\.)*)"|(?!text\b|sent\.text\b))""")
"""A call of web/language/texts.js, and the text in it; that file alone hands on what it got."""
PLACE = re.compile(r"\{(\w+)\}")


def page_texts() -> dict[str, str]:
    """Every text -> a file that shows it; a text that is not written out is "" of its file."""
    scripts = {path: _of_script(path) for path in sorted((PACK / "web").rglob("*.js"))}
    folders = (PACK / "engine", PACK / "nodes")
    modules = {path: _of_module(path) for each in folders for path in sorted(each.rglob("*.py"))}
    return {
        text: path.relative_to(PACK).as_posix()
        for path, texts in (scripts | modules).items()
        for text in texts
    }


def translations(language: str) -> dict[str, str]:
    """Text -> what it is in a language."""
    path = PACK / "locales" / language / "main.json"
    return json.loads(path.read_text(encoding="utf-8"))["braid"]


def english(sent: str | dict) -> str:
    """What the server sent for a reader, in English."""
    if isinstance(sent, str):
        return sent
    return sent["text"].format(**{name: english(value) for name, value in sent["values"].items()})


def _of_script(path: Path) -> Iterator[str]:
    for match in CALL.finditer(path.read_text(encoding="utf-8")):
        yield match[1] or ""


def _of_module(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Name(id="Text"), args=[ast.Constant(value=text), *_]):
                yield text
            case ast.Call(func=ast.Name(id="Text")):
                yield ""
