"""Files that strangers made: kind, size and depth are checked before anything is made of them.

The one error for all of them is DamagedFileError, whose message is the sentence for the user.
"""

import json
import re
import reprlib
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

AGAIN = "copy, download or save it again"
MAX_JSON_BYTES = 32 << 20
"""Of one document; the largest headers that are known, with thumbnails in them, have a tenth."""
MAX_JSON_PARTS = 2_000_000
"""Commas, quotes and opening brackets of one document: they bound what its values take in memory,
which may be thirty times the text."""
LONGEST_INTEGER = 40
"""Digits; Python takes 4300, which no message could hold."""
LONGEST_REASON = 600
_TEXTS = re.compile('"[^"]*"')
_BRACKETS = re.compile(r"[\[\]{}]")
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


class DamagedFileError(ValueError):
    """A file that is not what it should be, in one sentence with its name."""

    def __init__(self, path: Path, sentence: str) -> None:
        super().__init__(f"{path}: {one_line(sentence)}")


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Inside, every ValueError is a DamagedFileError about `path`."""
    try:
        yield
    except DamagedFileError:
        raise
    except ValueError as error:
        raise DamagedFileError(path, str(error)) from error


def one_line(text: object, longest: int = LONGEST_REASON) -> str:
    """`text` in a message: blanks for whatever is not printable, and not longer than that."""
    line = "".join(c if c.isprintable() else " " for c in str(text)[: longest + 1])
    return line if len(line) <= longest else line[: longest - 1] + "…"


def shown(value: object) -> str:
    """A value out of a file in a message: `repr`, of long ones the beginning and the end."""
    return _repr.repr(value)


def is_unicode(text: str) -> bool:
    """Whether it can be written; JSON may hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_regular(path: Path) -> BinaryIO:
    """The file at `path`, opened for reading; DamagedFileError for a folder, a pipe or a device.

    A pipe would never answer, and a device such as /dev/zero never end. OSError as `open` raises.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise DamagedFileError(path, "not a file with contents; choose another one")
    return path.open("rb")


def read_json(path: Path, deepest: int) -> Any:
    """The JSON document in a file; DamagedFileError when it is none, too large or too deep."""
    with open_regular(path) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    with damage_named(path):
        return parse_json(text, deepest)


def parse_json(text: str | bytes, deepest: int) -> Any:
    """A JSON document, within MAX_JSON_BYTES and MAX_JSON_PARTS, of at most `deepest` brackets in
    each other and no key twice; ValueError says what is wrong with it."""
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"more than {MAX_JSON_BYTES} bytes of JSON")
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        _check_depth(text, deepest)
        return json.loads(text, object_pairs_hook=_each_key_once, parse_int=_integer)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"not JSON ({error.msg} in {where})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not text (byte {error.start} is no UTF-8)") from error


def _check_depth(text: str, deepest: int) -> None:
    """ValueError before a parser would run out of memory, or of stack."""
    if sum(map(text.count, ',"[{')) > MAX_JSON_PARTS:
        raise ValueError(f"JSON of more than {MAX_JSON_PARTS} values")
    bare = _TEXTS.sub("", text.replace("\\\\", "").replace('\\"', ""))
    depth = 0
    for bracket in _BRACKETS.findall(bare):
        depth += 1 if bracket in "[{" else -1
        if depth > deepest:
            raise ValueError(f"JSON with more than {deepest} brackets in each other")


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_INTEGER:
        raise ValueError(f"JSON with a number of {len(digits)} digits")
    return int(digits)


def _each_key_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"JSON that says {shown(key)} twice")
        found[key] = value
    return found
