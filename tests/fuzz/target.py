"""What is fuzzed: one reader with what it is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from .containers import mutated_container
from .mutate import mutated_text

Input = bytes | str


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One reader with what it is given."""

    name: str
    make: Callable[[Random], Input]
    """An input: a well-formed one that was changed at random."""
    read: Callable[[Any, Path], object]
    """Reads an input, in a folder that is empty at first; may raise only what a user is told."""
    is_file: bool
    """Whether a refusal must say the name `damaged`, which the file goes by."""
    long: int = 5000
    """Inputs of the long run."""


def container(corpus: Callable[[], Sequence[bytes]], finish=None) -> Callable[[Random], bytes]:
    """Makes safetensors files out of well-formed ones."""
    return lambda rng: mutated_container(rng, corpus(), finish)


def text(*texts: str) -> Callable[[Random], str]:
    """Makes texts out of well-formed ones."""
    return lambda rng: mutated_text(rng, texts)


def written(data: bytes, folder: Path, name: str = "damaged.safetensors") -> Path:
    """The file with that content."""
    path = folder / name
    path.write_bytes(data)
    return path
