"""File names that users type, checked before anything is made of them."""

import re

LONGEST_PART = 180
"""Bytes between two slashes. File systems take 255, and the ending of a file and of its temporary
name come on top."""
FORBIDDEN_IN_NAMES = '<>:"|?*\\'
"""What Windows takes in no file name; / is left to paths."""
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_SEPARATORS = re.compile(r"[/\\]")


def check_typed_path(option: str, typed: str) -> None:
    """ValueError when no file system could hold a path with this text in it."""
    if _UNUSABLE.search(typed):
        raise ValueError(f"{option} is {typed!r}; file names hold no control characters")
    longest = max(_SEPARATORS.split(typed), key=len)
    if len(longest.encode()) > LONGEST_PART:
        raise ValueError(
            f"{option} holds a name of {len(longest.encode())} bytes ({longest[:20]}…); at most "
            f"{LONGEST_PART} fit between two slashes"
        )
