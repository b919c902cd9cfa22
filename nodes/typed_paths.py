"""Where nodes read: what is typed, as a file or folder that may be opened.

A workflow is a stranger's document. Opening it reads nothing but ComfyUI's own folders. A run that
somebody queued reads any folder of this machine, but no other machine and no device.
"""

import os
import reprlib
from pathlib import Path

import folder_paths

from ..engine.names import check_local_path, check_typed_path, is_device_path
from ..engine.texts import Text
from .live_node import DecidedByTheRunError
from .outputs import loras_folder, output_folder

LONGEST_NAME = 255
"""Bytes that file systems take between two slashes."""


def typed_path(option: str, typed: str, root: Path) -> Path:
    """The path, below `root` where it is relative, with ~ and .. resolved; asks no disk.

    ValueError for what names another machine or a device.
    """
    check_typed_path(option, typed, LONGEST_NAME)
    check_local_path(option, typed)
    named = os.path.expanduser(typed) if typed[:2] in ("~", "~/", "~\\") else typed
    _refuse_device(option, Path(named))
    path = Path(os.path.abspath(root / named))
    _refuse_device(option, path)
    return path


def path_for_a_run(option: str, typed: str, root: Path) -> Path:
    """A path that a queued run may open, wherever it lies on this machine."""
    path = typed_path(option, typed, root)
    _refuse_device(option, Path(os.path.realpath(path)))
    return path


def refusal_of(option: str, typed: object) -> str | None:
    """What a run would say of a text, for the queue; None where it lies on this machine, or comes
    from a linked node."""
    if not isinstance(typed, str):
        return None if typed is None else f"{option} is {reprlib.repr(typed)}; it must be text"
    try:
        typed_path(option, typed.strip(), loras_folder())
    except ValueError as refusal:
        return str(refusal)
    return None


class OwnFolders:
    """ComfyUI's folders, links followed: its output, and where its models lie."""

    def __init__(self) -> None:
        models = [
            folder
            for kind, (folders, _) in folder_paths.folder_names_and_paths.items()
            if kind != "custom_nodes"
            for folder in folders
        ]
        folders = (output_folder(), loras_folder(), folder_paths.models_dir, *models)
        self._named = {Path(os.path.abspath(folder)) for folder in folders}
        self._real = {Path(os.path.realpath(folder)) for folder in folders}

    def hold(self, path: Path) -> bool:
        """Whether a path lies in them; of one whose text leads elsewhere no disk is asked."""
        return _is_below(path, self._named | self._real) and _is_below(
            Path(os.path.realpath(path)), self._real
        )

    def check(self, path: Path) -> None:
        """DecidedByTheRunError for a path that leads elsewhere."""
        if not self.hold(path):
            raise DecidedByTheRunError(
                Text("The files lie outside ComfyUI's folders: run the graph to see them here.")
            )


def _is_below(path: Path, folders: set[Path]) -> bool:
    return not folders.isdisjoint((path, *path.parents))


def _refuse_device(option: str, path: Path) -> None:
    if is_device_path(path) and not OwnFolders().hold(path):
        raise ValueError(f"{option} leads to {path}, a device; give a folder or file on a disk")
