"""A regular expression of Python's `re`, written again for the package `regex`.

People copy patterns from musubi-tuner, which uses `re`; only `regex` can be stopped in the middle
of a match. The two read some texts differently: `{e<=1}`, `[[:alpha:]]` and more are plain
characters to `re` and orders to `regex`. So a pattern is read by `re`'s own parser, which refuses
what `re` refuses, and what it understood is written out with every special character escaped.

On names of printable ASCII characters both then mean the same, save that (?i) on the Turkish ı and
İ takes i and I in `re` alone.
"""

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .refusals import shortened

if sys.version_info >= (3, 11):
    from re import _constants as codes
    from re import _parser as parser
else:
    import sre_constants as codes
    import sre_parse as parser

DEEPEST = 60
"""Levels of the parsed tree; a bracket that is repeated makes two or three."""
LARGEST = 10_000
"""Parts of an expression, see `size`; compiling takes some 3 µs and 300 bytes for each."""
_LETTERS = {re.IGNORECASE: "i", re.MULTILINE: "m", re.DOTALL: "s"}
"""The flags that still mean something once a pattern was read, for names in ASCII."""
_PLACES = {
    codes.AT_BEGINNING: "^",
    codes.AT_BEGINNING_STRING: r"\A",
    codes.AT_BOUNDARY: r"\b",
    codes.AT_NON_BOUNDARY: r"\B",
    codes.AT_END: "$",
    codes.AT_END_STRING: r"\Z",
}
_CATEGORIES = {
    codes.CATEGORY_DIGIT: r"\d",
    codes.CATEGORY_NOT_DIGIT: r"\D",
    codes.CATEGORY_SPACE: r"\s",
    codes.CATEGORY_NOT_SPACE: r"\S",
    codes.CATEGORY_WORD: r"\w",
    codes.CATEGORY_NOT_WORD: r"\W",
}
_SINGLE = {codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN}
"""Parts that take one character, in one way."""
_REPEATS = {codes.MAX_REPEAT: "", codes.MIN_REPEAT: "?"}
if sys.version_info >= (3, 11):
    _REPEATS[codes.POSSESSIVE_REPEAT] = "+"


class RefusedExpression(ValueError):
    """Why a pattern is not taken: the end of a sentence that begins with the pattern."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expression:
    """A pattern of `re` as `regex` takes it."""

    text: str
    is_quick: bool
    """Whether a match takes microseconds, whatever the name: it needs no clock."""


def rewritten(pattern: str) -> Expression:
    """`pattern` of `re` for `regex`; RefusedExpression when it is broken or too large."""
    tree = _parsed(pattern)
    parts = size(tree)
    if parts > LARGEST:
        raise RefusedExpression(
            f"is too large a regular expression: with all its repetitions it has {parts:,} parts, "
            f"and at most {LARGEST:,} are taken; use + or * for a large number"
        )
    return Expression(text=_flagged(tree.state.flags, 0, _text(tree)), is_quick=_is_quick(tree))


def size(tree: Any, depth: int = 0) -> int:
    """Parts that `regex` makes of a tree of `re`'s parser.

    It writes a{1000} out a thousand times and a+ as a and a*, so that (?:a+)+ has four a.
    RefusedExpression below `DEEPEST` levels.
    """
    if depth > DEEPEST:
        raise _too_deep()
    parts = 0
    for code, argument in tree:
        inside = sum(size(child, depth + 1) for child in _children(argument))
        if code in _REPEATS:
            least, most, _ = argument
            inside *= least + (most > least)
        parts += 1 + inside + (len(argument) if code is codes.IN else 0)
    return parts


def _is_quick(tree: Any) -> bool:
    """Whether `tree` is characters in a row with two repetitions of one character at most, as in
    .*attn.*: then a name of n letters is tried in n² ways, and in n³ when it is searched."""
    repetitions = 0
    for code, argument in tree:
        if code in _REPEATS:
            least, most, body = argument
            repetitions += least != most
            if len(body) != 1 or body[0][0] not in _SINGLE:
                return False
        elif code not in _SINGLE and code is not codes.AT:
            return False
    return repetitions <= 2


def _parsed(pattern: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about [[ and the like, which may change one day
            return parser.parse(pattern)
    except RecursionError as error:
        raise _too_deep() from error
    except (re.error, ValueError, OverflowError, MemoryError) as error:
        reason = shortened(str(error))  # it may quote the whole pattern
        raise RefusedExpression(f"is not a regular expression ({reason})") from error


def _too_deep() -> RefusedExpression:
    return RefusedExpression("is too deep a regular expression; nest fewer brackets in brackets")


def _children(argument: Any) -> Iterator[Any]:
    """The trees in an argument of `re`'s parser."""
    if isinstance(argument, parser.SubPattern):
        yield argument
    elif isinstance(argument, tuple | list):
        for part in argument:
            yield from _children(part)


def _text(tree: Any) -> str:
    return "".join(_part(code, argument) for code, argument in tree)


def _part(code: Any, argument: Any) -> str:
    if code not in _WRITERS:
        raise RefusedExpression(f"has a part that Braid does not know ({code})")
    return _WRITERS[code](code, argument)


def _set(_: Any, items: list[Any]) -> str:
    """[…]; its items are (code, argument) as elsewhere."""
    return f"[{''.join(_part(code, argument) for code, argument in items)}]"


def _branches(_: Any, argument: tuple[Any, ...]) -> str:
    return f"(?:{'|'.join(_text(branch) for branch in argument[1])})"


def _group(_: Any, argument: tuple[Any, ...]) -> str:
    """(…) where it captures; groups keep their numbers, and no names are needed."""
    number, add, remove, body = argument
    text = _flagged(add, remove, _text(body))
    return text if number is None else f"({text})"


def _flagged(add: int, remove: int, text: str) -> str:
    on, off = (
        "".join(_LETTERS[flag] for flag in _LETTERS if flag & flags) for flags in (add, remove)
    )
    return f"(?{on}{'-' if off else ''}{off}:{text})"


def _repeat(code: Any, argument: tuple[Any, ...]) -> str:
    least, most, body = argument
    counts = f"{least}," if most is codes.MAXREPEAT else f"{least},{most}"
    return f"(?:{_text(body)}){{{counts}}}{_REPEATS[code]}"


def _look(code: Any, argument: tuple[Any, ...]) -> str:
    direction, body = argument
    if direction < 0:
        shortest, longest = body.getwidth()
        if shortest != longest:
            raise RefusedExpression(
                "is not a regular expression (look-behind requires fixed-width pattern)"
            )
    sign = "=" if code is codes.ASSERT else "!"
    return f"(?{'<' if direction < 0 else ''}{sign}{_text(body)})"


def _condition(_: Any, argument: tuple[Any, ...]) -> str:
    number, yes, no = argument
    return f"(?({number}){_text(yes)}{f'|{_text(no)}' if no is not None else ''})"


_WRITERS: dict[Any, Callable[[Any, Any], str]] = {
    codes.LITERAL: lambda _, character: re.escape(chr(character)),
    codes.NOT_LITERAL: lambda _, character: f"[^{re.escape(chr(character))}]",
    codes.ANY: lambda _, nothing: ".",
    codes.AT: lambda _, place: _PLACES[place],
    codes.IN: _set,
    codes.NEGATE: lambda _, nothing: "^",
    codes.RANGE: lambda _, ends: "-".join(re.escape(chr(end)) for end in ends),
    codes.CATEGORY: lambda _, category: _CATEGORIES[category],
    codes.BRANCH: _branches,
    codes.SUBPATTERN: _group,
    codes.GROUPREF: lambda _, number: rf"\g<{number}>",
    codes.GROUPREF_EXISTS: _condition,
    codes.ASSERT: _look,
    codes.ASSERT_NOT: _look,
    codes.FAILURE: lambda _, nothing: "(?!)",
    **dict.fromkeys(_REPEATS, _repeat),
}
if sys.version_info >= (3, 11):
    _WRITERS[codes.ATOMIC_GROUP] = lambda _, body: f"(?>{_text(body)})"
