"""musubi-tuner's `key=value` options (network_args, optimizer_args, lr_scheduler_args) as text.

One parser for all three. Accepted layouts, freely mixed:

    one token a line          exclude_patterns=[r'.*single_blocks.*', r'.*txt_.*']
    as on a command line      "exclude_patterns=[r'.*single_blocks.*']" "loraplus_lr_ratio=4"
    as a TOML list            network_args = ["loraplus_lr_ratio=4", 'verbose=True']

A token is split at its first `=`, so that a value may contain more of them (musubi refuses those).
Values stay strings here; `parse_literal` and its typed relatives turn one into a Python value, by
`ast.literal_eval` only; `parse_patterns` reads the patterns of one value, or of a widget.
"""

import ast
import difflib
import math
import re
import warnings
from collections.abc import Collection, Mapping

_OPENING = {"[": "]", "(": ")", "{": "}"}
_OPTION_NAME = re.compile(r"\s*(?:--)?\w*_args\b\s*(?:=\s*)?(?=[\s\"'\[]|--|$)")
_SPACED_KEY = re.compile(r"(\w+)[ \t]+=[ \t]*")
LITERALS = "a Python literal such as 0.01, True, None, 'text' or (0.9, 0.99)"
LARGEST = 2.0**53
"""Of a number among literals; whole ones are exact up to here."""
MAX_TEXT = 100_000
"""Characters of one option; a hundred times what anybody writes."""


def parse_arguments(
    text: str, option: str = "network_args", unquote: bool = True
) -> dict[str, str]:
    """`key=value` tokens of `text` in the order given; keys and values without outer blanks.

    `unquote`: take quotes around a whole value off, as a shell does from key="value".
    Raises ValueError, naming the token, for one without `=`, without a key, or given twice, and
    for more than MAX_TEXT characters.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"{option} has {len(text)} characters; at most {MAX_TEXT} are read")
    arguments: dict[str, str] = {}
    for token in _tokens(text, option):
        key, equals, value = token.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise ValueError(
                f"{option}: {shortened(token)!r} is not key=value; write one a line, such as "
                "rank_dropout=0.1"
            )
        if key in arguments:
            raise ValueError(f"{option}: {shortened(key)} is given twice; keep one of the two")
        arguments[key] = _unquoted(value.strip()) if unquote else value.strip()
    return arguments


def refuse_unknown(option: str, arguments: Mapping[str, str], known: Collection[str]) -> None:
    """ValueError for the first key that is not in `known`, with the closest one and all of them."""
    for key in arguments:
        if key not in known:
            raise ValueError(
                f"{option}: unknown key {shortened(key)!r}{did_you_mean(key, known)}; "
                f"known keys: {', '.join(sorted(known))}"
            )


def did_you_mean(word: str, known: Collection[str]) -> str:
    """ " (did you mean …?)" with the closest known word, or nothing."""
    close = difflib.get_close_matches(word[:100], known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def shortened(text: str, limit: int = 80) -> str:
    """One line of `text` for a sentence: blanks joined, signs that print nothing replaced, and
    what is beyond the limit cut."""
    line = " ".join(text[: 10 * limit].split())
    line = "".join(sign if sign.isprintable() else "\ufffd" for sign in line)
    return line if len(line) <= limit else f"{line[:limit]} …"


def said(error: BaseException) -> str:
    """What an error of somebody else's code says, as part of a sentence."""
    return shortened(f"{type(error).__name__}: {error}".rstrip(": ."), 300)


def _shown(key: str, value: object) -> str:
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # Python writes no integer of over 4300 digits
        text = "an integer of very many digits"
    return f"{shortened(key)}={shortened(text)}"


def parse_literal(key: str, value: str, allowed: str = LITERALS) -> object:
    """`value` as a Python literal; ValueError that names the key, the value and what is allowed."""
    try:
        with warnings.catch_warnings():
            # r'…' is often forgotten before a regex; '\d' keeps its backslash, with this warning.
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{_shown(key, value)}: not {allowed}") from error


def check_values(option: str, arguments: Mapping[str, object]) -> None:
    """ValueError for a value that is no plain literal or no number to calculate with.

    Plain are None, True, False, text, finite numbers up to 2**53, and lists, tuples and dicts of
    them: what a file can keep.
    """
    for key, value in arguments.items():
        if not _is_plain(value):
            raise ValueError(
                f"{option}: {_shown(key, value)} is not a finite number up to 9e15, "
                "True, False, None, text, or a tuple or list of them"
            )


def _is_plain(value: object) -> bool:
    if value is None or isinstance(value, bool | str):
        return True
    if isinstance(value, int | float):
        return abs(value) <= LARGEST  # neither an infinity nor NaN is
    if isinstance(value, dict):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    return isinstance(value, list | tuple) and all(_is_plain(part) for part in value)


def parse_float(key: str, value: str, allowed: str = "a number such as 0.1") -> float:
    """`value` as a finite float."""
    try:
        number = float(value)
    except ValueError as error:
        raise ValueError(f"{_shown(key, value)}: not {allowed}") from error
    if not math.isfinite(number):
        raise ValueError(f"{_shown(key, value)}: not {allowed}")
    return number


def parse_int(key: str, value: str) -> int:
    """`value` as an int; 8.0 is one, 8.5 is not."""
    allowed = "a whole number such as 8"
    number = parse_float(key, value, allowed)
    if number != int(number):
        raise ValueError(f"{_shown(key, value)}: not {allowed}")
    return int(number)


def parse_bool(key: str, value: str) -> bool:
    """True or False in any case, also 1 and 0 (musubi takes exactly `True` for true)."""
    words = {"true": True, "1": True, "false": False, "0": False}
    if value.strip().lower() not in words:
        raise ValueError(f"{_shown(key, value)}: not True or False")
    return words[value.strip().lower()]


def parse_patterns(key: str, text: str) -> tuple[str, ...]:
    """Regexes, one a line (blank ones skipped), or musubi's Python list [r'…', r'…']."""
    text = text.strip()
    if not re.match(r"[\[(]\s*([rR]?['\"]|[\])]$)", text):
        return tuple(_bare_regex(line.strip()) for line in text.splitlines() if line.strip())
    allowed = "one regular expression a line, or a Python list such as [r'.*single_blocks.*']"
    patterns = parse_literal(key, text, allowed)
    if isinstance(patterns, str):  # ('…') is a string in brackets, not a tuple
        patterns = [patterns]
    if not isinstance(patterns, list | tuple) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(f"{_shown(key, text)}: not {allowed}")
    return tuple(patterns)


def _tokens(text: str, option: str) -> list[str]:
    """Split at blanks and commas outside quotes and brackets; shell and TOML quotes are removed."""
    text = re.sub(r"\\\n", "\n", text)  # a command line continued with a backslash
    text = re.sub(r"(?m)^\s*#.*$", "", text)
    named = _OPTION_NAME.match(text)
    text = text[named.end() :] if named else text
    if text.lstrip().startswith("["):
        text = _without_brackets(text, option)
    tokens, start = [], 0
    while start < len(text):
        if text[start].isspace() or text[start] == ",":
            start += 1
            continue
        read = _read_quoted if text[start] in "\"'" else _read_bare
        token, start = read(text, start, option)
        tokens.append(token)
    return tokens


def _without_brackets(text: str, option: str) -> str:
    inside = text.strip()
    if not inside.endswith("]"):
        raise ValueError(f"{option}: the list that starts with '[' does not end with ']'")
    return inside[1:-1]


def _read_quoted(text: str, start: int, option: str) -> tuple[str, int]:
    """A token in quotes, and quotes that touch it: a shell writes ' in '…' as '"'"' or '\\''."""
    token, position = "", start
    while text[position : position + 1] in ("'", '"') or text.startswith("\\'", position):
        if text[position] == "\\":
            piece, position = "'", position + 2
        else:
            piece, position = _read_quotes(text, position, option)
        token += piece
    return token, position


def _read_quotes(text: str, start: int, option: str) -> tuple[str, int]:
    """What is between two quotes; in double ones only \\" and \\\\ are escapes, as in a shell."""
    quote, position, characters = text[start], start + 1, []
    while position < len(text) and text[position] != quote:
        if quote == '"' and text[position] == "\\" and text[position + 1 : position + 2] in '"\\':
            position += 1
        characters.append(text[position : position + 1])
        position += 1
    if position >= len(text):
        raise ValueError(f"{option}: the quote opened in {text[start : start + 40]!r} never closes")
    return "".join(characters), position + 1


def _read_bare(text: str, start: int, option: str) -> tuple[str, int]:
    """An unquoted token: up to the first blank that is outside brackets and Python strings."""
    spaced = _SPACED_KEY.match(text, start)
    position = begin = spaced.end() if spaced else start
    closing: list[str] = []
    while position < len(text):
        character = text[position]
        if character.isspace() and not closing:
            break
        if character in "\"'" and text[position - 1] in "[({,=rR \n":
            position = _end_of_string(text, position, option)
            continue
        if character == "\\":
            position += 2
            continue
        if character in _OPENING:
            closing.append(_OPENING[character])
        elif closing and character == closing[-1]:
            closing.pop()
        position += 1
    if closing:
        raise ValueError(f"{option}: {text[start : start + 40]!r} … misses its {closing[-1]!r}")
    token = text[begin:position].rstrip(",")
    return f"{spaced.group(1)}={token}" if spaced else token, position


def _end_of_string(text: str, start: int, option: str) -> int:
    position = start + 1
    while position < len(text) and text[position] != text[start]:
        position += 2 if text[position] == "\\" else 1
    if position >= len(text):
        raise ValueError(f"{option}: the quote opened in {text[start : start + 40]!r} never closes")
    return position + 1


def _unquoted(value: str) -> str:
    """`"…"` around a whole value, as a shell removes it from key="value"."""
    if len(value) >= 2 and value[0] in "\"'" and value.find(value[0], 1) == len(value) - 1:
        return value[1:-1]
    return value


def _bare_regex(line: str) -> str:
    """A line of a pattern widget; r'…' and '…' around it, as copied from a list, are removed."""
    quoted = re.fullmatch(r"[rR]?(['\"])(.*)\1,?", line)
    return quoted.group(2) if quoted else line
