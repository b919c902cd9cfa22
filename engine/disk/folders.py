"""Folders that are searched within bounds: the pattern is typed, and a disk may hold anything."""

import contextlib
import fnmatch
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

LONGEST_PATTERN = 1000
"""Characters of a typed pattern."""


class SearchEndedError(ValueError):
    """A search that looked at as much as it may."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """How far a search may go, and where it may look."""

    entries: int = 100_000
    """Files and folders that are looked at, and files that are opened."""
    seconds: float = 60.0
    check: Callable[[Path], object] = field(default=lambda path: None)
    """Raises for a file or folder that may not be opened; asked before each."""


class Search:
    """What is left of the bounds of one search."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        self._bounds = bounds or Bounds()
        self._looked_at = 0
        self._until = time.monotonic() + self._bounds.seconds

    def check(self, path: Path) -> None:
        """Raises what the bounds raise for a path that may not be opened."""
        self._bounds.check(path)

    def spend(self, path: Path) -> None:
        """One more look, at `path`; SearchEndedError when that is one too many."""
        self._looked_at += 1
        if self._looked_at > self._bounds.entries or time.monotonic() > self._until:
            raise SearchEndedError(
                f"the search ended at {path}, after {self._looked_at - 1} files and folders: "
                "choose a folder that holds fewer, or a pattern without **"
            )

    def files(self, folder: Path, pattern: str) -> Iterator[Path]:
        """Files below `folder` that match a glob, in no order, each once; as `Path.glob` finds them
        (`**` follows no links), and ValueError for a glob that leads out of the folder.

        SearchEndedError once the bounds are reached, so that what was found until then is known.
        """
        found: set[Path] = set()
        waiting = [(folder, _parts(pattern))]
        while waiting:
            below, parts = waiting.pop()
            self.check(below)
            for path, is_last, rest in self._matching(below, parts):
                if not is_last:
                    waiting.append((path, rest))
                elif path not in found:
                    self.check(path)
                    found.add(path)
                    yield path

    def _matching(
        self, folder: Path, parts: tuple[str, ...]
    ) -> Iterator[tuple[Path, bool, tuple[str, ...]]]:
        """(path, whether it is a file that is found, what its own entries must match)."""
        any_depth = parts[0] == "**"
        name, rest = parts[any_depth], parts[any_depth + 1 :]
        for entry in self._entries(folder):
            with contextlib.suppress(OSError):  # a link in a circle, a folder that may not be read
                fits = fnmatch.fnmatch(entry.name, name)
                if any_depth and entry.is_dir(follow_symlinks=False):
                    yield Path(entry.path), False, parts
                if fits and rest and entry.is_dir():
                    yield Path(entry.path), False, rest
                elif fits and not rest and entry.is_file():
                    yield Path(entry.path), True, ()

    def _entries(self, folder: Path) -> Iterator[os.DirEntry[str]]:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                self.spend(folder)
                yield entry


def _parts(pattern: str) -> tuple[str, ...]:
    """A typed glob, folder by folder, `**` never twice in a row nor last."""
    path = Path(pattern)
    if not path.parts or path.anchor or ".." in path.parts or len(pattern) > LONGEST_PATTERN:
        raise ValueError(
            f"pattern {pattern[:80]!r}: give a glob of files in the folder, such as *.safetensors"
        )
    parts: list[str] = []
    for part in path.parts:
        if (part, parts[-1:]) != ("**", ["**"]):
            parts.append(part)
    return tuple([*parts, "*"] if parts[-1] == "**" else parts)
