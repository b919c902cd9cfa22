"""File names that users type, checked before anything is made of them."""

import re
from pathlib import PurePath, PureWindowsPath

LONGEST_PART = 180
"""Bytes between two slashes. File systems take 255, and the ending of a file and of its temporary
name come on top."""
FORBIDDEN_IN_NAMES = '<>:"|?*\\'
"""What Windows takes in no file name; / is left to paths."""
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_SEPARATORS = re.compile(r"[/\\]")
_OTHER_MACHINE = re.compile(r"\s*[/\\](?:[/\\]|\?\?)")
"""A share, with slashes of either kind, and what Windows' own prefixes for devices start with."""
_WINDOWS_DEVICE = re.compile(
    r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9¹²³])\s*(?:[.:].*)?", re.IGNORECASE
)


def check_typed_path(option: str, typed: str, longest_part: int = LONGEST_PART) -> None:
    """ValueError when no file system could hold a path with this text in it."""
    if _UNUSABLE.search(typed):
        raise ValueError(f"{option} is {typed!r}; file names hold no control characters")
    longest = max(_SEPARATORS.split(typed), key=len)
    if len(longest.encode()) > longest_part:
        raise ValueError(
            f"{option} holds a name of {len(longest.encode())} bytes ({longest[:20]}…); at most "
            f"{longest_part} fit between two slashes"
        )


def check_local_path(option: str, typed: str) -> None:
    """ValueError for a path of another machine, or of one of Windows' devices, by its text alone:
    to look whether it is there would already greet that machine in the user's name."""
    if _OTHER_MACHINE.match(typed):
        raise ValueError(
            f"{option} is {typed[:80]!r}, which names another machine or a device; give a folder "
            "or file of this machine, or map that one to a drive or a mounted folder"
        )


def is_device_path(path: PurePath) -> bool:
    """Whether a path, by its text alone, names a device or what a kernel makes up."""
    if isinstance(path, PureWindowsPath):
        return any(_WINDOWS_DEVICE.fullmatch(part) for part in path.parts)
    return any(path.is_relative_to(root) for root in ("/dev", "/proc", "/sys"))
