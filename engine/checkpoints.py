"""The adapter files of one run, in the order they were trained, and an adapter held in memory."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .disk.folders import Search
from .files import SafetensorsHeader, read_header
from .refusals import quoted, shortened
from .texts import Text

SHADOWS_SUFFIX = "-shadows.safetensors"
"""How the file with the EMA shadows of a run ends: `<run>-shadows.safetensors`."""

_STEP_IN_NAME = re.compile(r"-step(\d{1,15})$|_(\d{1,15})_steps(_|$)")  # musubi; ComfyUI's own
_COUNT = re.compile(r"\d{1,15}")
"""What a file may say of its steps; more would be no exact number of anything."""
_EPOCH_IN_NAME = re.compile(r"-(\d{6})$")  # musubi and kohya


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """One saved adapter file."""

    path: Path
    step: int | None
    """Optimizer steps done when it was saved; None when neither metadata nor name say so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    """Adapter files, oldest first (socket BRAID_CHECKPOINTS)."""

    files: tuple[Checkpoint, ...]
    shadows: Path | None = None
    """The EMA shadow file of the run, when it kept shadows."""


class AdapterStateDict(dict[str, Tensor]):
    """A LORA_MODEL: the tensors of an adapter file, which remember what made them.

    To ComfyUI's own nodes it is the plain dict that they expect.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata)
        """What Braid's Save LoRA writes into the file."""


def step_of(path: Path, metadata: Mapping[str, str]) -> int | None:
    """Optimizer steps: `ss_steps` of the metadata, else the number in the file name, else None."""
    in_metadata = metadata.get("ss_steps", "")
    if _COUNT.fullmatch(in_metadata):
        return int(in_metadata)
    match = _STEP_IN_NAME.search(path.stem)
    return int(match.group(1) or match.group(2)) if match else None


def epoch_of(path: Path, metadata: Mapping[str, str]) -> int | None:
    """Epochs: the number in the file name, else `ss_epoch` of the metadata, else None.

    The name comes first because musubi counts `ss_epoch` from 0 in files saved by step.
    """
    match = _EPOCH_IN_NAME.search(path.stem)
    if match:
        return int(match.group(1))
    in_metadata = metadata.get("ss_epoch", "")
    return int(in_metadata) if _COUNT.fullmatch(in_metadata) else None


def find_checkpoints(
    folder: Path, pattern: str = "*.safetensors", search: Search | None = None
) -> Checkpoints:
    """The adapter files of `folder` that match a glob, in order of step where every file tells it.

    Left out: files of EMA shadows, which become `shadows` when there is one file of them, and files
    that were themselves merged from checkpoints (`modelspec.merged_from`).
    """
    search = search or Search()
    search.check(folder)
    if not folder.is_dir():
        sentence = Text(
            "{folder}: no such folder; choose the one the run saved its files in",
            folder=shortened(str(folder), 300),
        )
        raise ValueError(sentence)
    matching = sorted(search.files(folder, pattern))
    headers = {}
    for path in matching:
        if path.suffix == ".safetensors" and not path.name.endswith(SHADOWS_SUFFIX):
            search.spend(path)
            headers[path] = read_header(path)
    files = [
        Checkpoint(path=path, step=step_of(path, header.metadata))
        for path, header in headers.items()
        if not _is_merged(header)
    ]
    if not files:
        sentence = Text(
            "{folder}: no checkpoint matches {pattern} ({count} files looked at); choose another "
            "folder or pattern",
            folder=shortened(str(folder), 300),
            pattern=quoted(pattern),
            count=len(matching),
        )
        raise ValueError(sentence)
    if all(file.step is not None for file in files):
        files.sort(key=lambda file: file.step or 0)
    return Checkpoints(files=tuple(files), shadows=_shadows_beside(folder, files, search))


def _is_merged(header: SafetensorsHeader) -> bool:
    return "modelspec.merged_from" in header.metadata


def _shadows_beside(folder: Path, files: list[Checkpoint], search: Search) -> Path | None:
    """The shadow file whose run name starts every file; None when none or several do."""
    found = [
        path
        for path in search.files(folder, f"*{SHADOWS_SUFFIX}")
        if all(f.path.name.startswith(path.name.removesuffix(SHADOWS_SUFFIX)) for f in files)
    ]
    return found[0] if len(found) == 1 else None
