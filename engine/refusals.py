"""The sentences that refuse a setting: what was given, what is allowed, what to do.

    sort is 'stpe' (did you mean step?); choose one of step, mtime, given
    steps is 0; it must be 1 or more

What was typed is quoted in full only where it is short: a stranger's text may be a megabyte.
"""

import difflib
import math
import re
from collections.abc import Collection

LONGEST_QUOTE = 80
"""Characters of what was typed that a sentence repeats."""
LONGEST_TEXT = 50_000
"""Characters of one text widget that are read."""
_REASONS: dict[type[BaseException], str] = {
    SystemExit: "it would end the program",
    KeyboardInterrupt: "it would interrupt the program",
    TypeError: "it needs a value of another kind",
    AttributeError: "it needs a value of another kind",
    LookupError: "something is missing",
    ArithmeticError: "it cannot calculate with this",
    AssertionError: "a check of its own fails",
    NotImplementedError: "it cannot do this",
    RecursionError: "something is nested too deeply",
    MemoryError: "there is too little memory",
    SyntaxError: "its code is broken",
}
"""What the commonest errors mean to somebody who does not know Python; the first that fits."""
_PYTHONS_WORDS = (
    (re.compile(r"Traceback \(most recent.*", re.DOTALL), ""),
    (re.compile(r"\b(?:\w+\.)*[A-Z]\w*(?:Error|Exception)\b:? ?"), ""),
    (re.compile(r"<class '([^']*)'>"), r"\1"),
    (re.compile(r" object at 0x[0-9a-fA-F]+"), ""),
    (re.compile(r"\bNoneType\b"), "None"),
)


def shortened(text: str, limit: int = LONGEST_QUOTE) -> str:
    """One line of `text` for a sentence: blanks joined, signs that print nothing replaced, and
    what is beyond the limit cut."""
    line = " ".join(text[: 10 * limit].split())
    line = "".join(sign if sign.isprintable() else "\ufffd" for sign in line)
    return line if len(line) <= limit else f"{line[:limit]} …"


def said(error: BaseException) -> str:
    """What an error of somebody else's code says, as part of a sentence, without Python's words."""
    reason = next((reason for kind, reason in _REASONS.items() if isinstance(error, kind)), "")
    text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    for words, plain in _PYTHONS_WORDS:
        text = words.sub(plain, text)
    parts = (reason, shortened(text.strip(" :."), 300))
    return ": ".join(part for part in parts if part) or "it does not say why"


def quoted(text: str) -> str:
    """`text` in quotes, with escapes for what cannot be seen, and cut where it is long."""
    return repr(text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}…")


def did_you_mean(word: str, known: Collection[str]) -> str:
    """ " (did you mean …?)" with the closest known word, or nothing."""
    close = difflib.get_close_matches(word[:LONGEST_QUOTE], known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def refuse_long(option: str, text: str) -> None:
    """ValueError for a text that nobody has typed."""
    if len(text) > LONGEST_TEXT:
        raise ValueError(
            f"{option} holds {len(text):,} characters; at most {LONGEST_TEXT:,} are read"
        )


def refuse_other(option: str, value: str, allowed: Collection[str]) -> None:
    """ValueError for a value that is none of `allowed`."""
    if value not in allowed:
        raise ValueError(
            f"{option} is {quoted(value)}{did_you_mean(value, allowed)}; "
            f"choose one of {', '.join(allowed)}"
        )


def refuse_not_finite(option: str, value: float) -> None:
    """ValueError for nan and the infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{option} is {value}; it must be a finite number")


def refuse_not_positive(option: str, value: float) -> None:
    """ValueError for 0 and less, nan and the infinities."""
    refuse_not_finite(option, value)
    if not value > 0:
        raise ValueError(f"{option} is {value}; it must be a number above 0")


def refuse_below(option: str, value: float, least: int, meaning: str = "") -> None:
    """ValueError below `least`, whose `meaning` is said, and for nan and the infinities."""
    refuse_not_finite(option, value)
    if value < least:
        allowed = f"{least} ({meaning})" if meaning else f"{least}"
        raise ValueError(f"{option} is {value}; it must be {allowed} or more")


def refuse_outside(
    option: str, value: float, lowest: float, highest: float, hint: str = ""
) -> None:
    """ValueError outside [lowest, highest], which the sentence ends with a `hint` about; and for
    nan."""
    if not lowest <= value <= highest:
        sentence = f"{option} is {value}; it must be between {lowest:g} and {highest:g}"
        raise ValueError(f"{sentence}{f'; {hint}' if hint else ''}")
