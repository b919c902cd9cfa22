"""Regular expressions that users write for names of layers, matched under a time limit.

A workflow is a stranger's document, and `([a-z_.]+|.)+!` would hold a server for ever. So every
pattern of a user is compiled and matched here: bounded in number, length and size, read as
Python's `re` (and musubi-tuner) reads it, and matched by the package `regex` until the time for a
whole selection is spent, while other threads go on.
"""

import contextlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import regex

from .arguments import parse_literal
from .expressions import RefusedExpression, rewritten
from .refusals import quoted, refuse_long, shortened

MOST_PATTERNS = 1_000
LONGEST_PATTERN = 1_000
SECONDS = 3.0
"""Processor time for the patterns of one selection. A pattern on a name takes 1 µs, or 2 to 10
with a clock; a thousand names of layers as patterns for a thousand layers take 2 s."""
_FIRST_TRY = 0.01
"""Seconds of a match that keeps the interpreter: nearly all end in microseconds, and giving it up
for each would cost 5 ms wherever another thread computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeLimit:
    """When the patterns of one selection have had their time."""

    ends: float
    """On the clock of this thread's own processor time, whatever else the machine does."""
    earliest: float
    """The same on the wall's clock, which is never behind that one, and ten times faster read."""

    @classmethod
    def start(cls) -> "TimeLimit":
        """`SECONDS` from now."""
        return cls(ends=time.thread_time() + SECONDS, earliest=time.monotonic() + SECONDS)

    @property
    def left(self) -> float:
        """Seconds that are left at least; 0 or less when it is over."""
        left = self.earliest - time.monotonic()
        return left if left > 0 else self.ends - time.thread_time()


@dataclass(frozen=True, kw_only=True, slots=True)
class UserPattern:
    """One regular expression of a user's, ready to match."""

    option: str
    """Where it was written, such as exclude_patterns."""
    text: str
    """As it was written."""
    expression: regex.Pattern
    """The same for the package `regex`."""
    is_quick: bool
    """Whether no match of it needs a clock."""

    def fullmatch(self, name: str, limit: TimeLimit) -> bool:
        """Whether it matches the whole name; ValueError when the time is over."""
        return self._within(limit, self.expression.fullmatch, name)

    def search(self, name: str, limit: TimeLimit) -> bool:
        """Whether it is found anywhere in the name; ValueError when the time is over."""
        return self._within(limit, self.expression.search, name)

    def _within(self, limit: TimeLimit, match: Callable[..., object], name: str) -> bool:
        """regex counts its timeout on the clock of the whole process, which runs faster than this
        thread's where others compute: it may come early, never late."""
        left = limit.left
        if left > 0 and self.is_quick:
            return match(name) is not None
        if left > 0:
            with contextlib.suppress(TimeoutError):
                return match(name, timeout=min(left, _FIRST_TRY)) is not None
        while (left := limit.left) > 0:
            with contextlib.suppress(TimeoutError):
                return match(name, timeout=left, concurrent=True) is not None
        raise _too_slow(self.option, self.text)


def parse_patterns(option: str, text: str) -> tuple[str, ...]:
    """Regexes, one a line (blank ones skipped), or musubi's Python list [r'…', r'…']."""
    text = text.strip()
    refuse_long(option, text)
    if not re.match(r"[\[(]\s*([rR]?['\"]|[\])]$)", text):
        return tuple(_bare_regex(line.strip()) for line in text.splitlines() if line.strip())
    allowed = "one regular expression a line, or a Python list such as [r'.*single_blocks.*']"
    patterns = parse_literal(option, text, allowed)
    if isinstance(patterns, str):  # ('…') is a string in brackets, not a tuple
        patterns = [patterns]
    if not isinstance(patterns, list | tuple) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(f"{option}={shortened(text)}: not {allowed}")
    return tuple(patterns)


def check_patterns(option: str, patterns: Sequence[str]) -> None:
    """ValueError that names the first pattern that cannot be used."""
    compile_patterns(option, patterns, TimeLimit.start())


def compile_patterns(
    option: str, patterns: Sequence[str], limit: TimeLimit
) -> tuple[UserPattern, ...]:
    """The patterns, ready to match; ValueError that names the first that cannot be used."""
    if len(patterns) > MOST_PATTERNS:
        raise ValueError(
            f"{option} holds {len(patterns):,} patterns; at most {MOST_PATTERNS:,} are taken: let "
            "one pattern match several layers"
        )
    return tuple(_compiled(option, pattern, limit) for pattern in patterns)


def _compiled(option: str, pattern: str, limit: TimeLimit) -> UserPattern:
    if limit.left <= 0:
        raise _too_slow(option, pattern)
    try:
        if len(pattern) > LONGEST_PATTERN:
            raise RefusedExpression(
                f"is one pattern of {len(pattern):,} characters; at most {LONGEST_PATTERN:,} are "
                "taken: write one a line"
            )
        written = rewritten(pattern)
    except RefusedExpression as reason:
        raise ValueError(f"{option}: {quoted(pattern)} {reason}") from reason
    return UserPattern(
        option=option,
        text=pattern,
        expression=regex.compile(written.text, regex.VERSION0, cache_pattern=False),
        is_quick=written.is_quick,
    )


def _too_slow(option: str, pattern: str) -> ValueError:
    return ValueError(
        f"{option}: the patterns took over {SECONDS:g} s, up to {quoted(pattern)}; write that one "
        "without a repetition inside a repetition, such as (a+)+, or give fewer patterns"
    )


def _bare_regex(line: str) -> str:
    """A line of a pattern widget; r'…' and '…' around it, as copied from a list, are removed."""
    inside = re.fullmatch(r"[rR]?(['\"])(.*)\1,?", line)
    return inside.group(2) if inside else line
