"""File names that users type, checked before anything is made of them.

What is written has a name that every system can open, Windows too: outputs move between machines,
and a LoRA that only Linux can read is lost to half of its users. Nor does a name hold characters
that cannot be seen, with which `gpj.exe` shows as `exe.jpg`.
"""

import re
import unicodedata
from pathlib import PurePath, PureWindowsPath

from .refusals import quoted

LONGEST_PART = 180
"""Bytes between two slashes. File systems take 255, and the ending of a file and of its temporary
name come on top."""
LONGEST_PATH = 1_000
"""Bytes of all that is typed; Linux takes 4,096 for a path with all its folders."""
FORBIDDEN_IN_NAMES = '<>:"|?*\\'
"""What Windows takes in no file name; / is left to paths."""
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_SEPARATORS = re.compile(r"[/\\]")
_OTHER_MACHINE = re.compile(r"\s*[/\\](?:[/\\]|\?\?)")
"""A share, with slashes of either kind, and what Windows' own prefixes for devices start with."""
_WINDOWS_DEVICE = re.compile(
    r"(?:con|prn|aux|nul|conin\$|conout\$|clock\$|(?:com|lpt)[0-9¹²³])\s*(?:[.:].*)?",
    re.IGNORECASE,
)
"""A name that stands for a device in whatever folder, with whatever ending."""
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of control and format characters and of breaks."""
_BLANK_LETTERS = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0"
"""Letters by category, of no width or shape."""
_JOINING = re.compile(
    "(?<=[^\x00-\x7f\u200c\u200d])[\u200c\u200d](?=[^\x00-\x7f\u200c\u200d])"
    "|\U0001f3f4[\U000e0020-\U000e007e]{1,8}\U000e007f"
)
"""What is spelt with invisible characters: families of emoji, Persian and Indic words, and the
flags of England, Scotland and Wales."""


def check_typed_path(option: str, typed: str, longest_part: int = LONGEST_PART) -> None:
    """ValueError when no file system could hold a path with this text in it."""
    longest = max(_SEPARATORS.split(typed), key=_bytes)
    for text, most, where in (
        (longest, LONGEST_PART, "between two slashes"),
        (typed, LONGEST_PATH, "in all"),
    ):
        if _bytes(text) > most:
            raise ValueError(
                f"{option} holds a name of {_bytes(text):,} bytes ({quoted(text[:20])} …); at most "
                f"{most:,} fit {where}"
            )
    if _UNUSABLE.search(typed):
        raise ValueError(f"{option} is {quoted(typed)}; file names hold no control characters")


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


def check_new_path(option: str, typed: str, ending: str = "") -> None:
    """ValueError for a path of a file or folder to be made that some system could not open, or
    that does not look like what it is.

    `ending` is what the program puts after `typed`: with it, "con" is a name like others.
    """
    check_typed_path(option, typed)
    for character in _JOINING.sub("", typed):
        if unicodedata.category(character) in _INVISIBLE or character in _BLANK_LETTERS:
            name = unicodedata.name(character, "a control character")
            raise ValueError(
                f"{option} is {quoted(typed)}; take out U+{ord(character):04X} ({name}), which "
                "cannot be seen"
            )
    for part in _SEPARATORS.split(typed + ending):
        _check_new_part(option, typed, part)


def _check_new_part(option: str, typed: str, part: str) -> None:
    """`part`: what lies between two slashes; "." and ".." are left to the maker of the path."""
    if any(sign in part for sign in FORBIDDEN_IN_NAMES):
        raise ValueError(
            f'{option} is {quoted(typed)}; file names cannot hold any of < > : " | ? * or a '
            "backslash"
        )
    if _WINDOWS_DEVICE.fullmatch(part):
        raise ValueError(
            f"{option} is {quoted(typed)}; Windows takes {quoted(part)} for a device, choose "
            "another name"
        )
    if part.endswith((".", " ")) and part not in (".", ".."):
        raise ValueError(
            f"{option} is {quoted(typed)}; Windows opens no name that ends in a dot or a blank, "
            "take it off"
        )


def _bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))
