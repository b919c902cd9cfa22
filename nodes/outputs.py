"""Where nodes write: what is typed, as a place inside ComfyUI's output folder."""

import contextlib
import logging
import os
import threading
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..engine.disk.folders import Bounds, Search, SearchEndedError
from ..engine.disk.writing import failures_said, remove_leftovers
from ..engine.names import check_local_path, check_new_path, check_typed_path
from ..engine.refusals import quoted

logger = logging.getLogger("comfyui_braid")

SUBFOLDERS = ("loras", "diffusion_models", "magcache")
"""Of output/, where the nodes write unless another place is typed; each may be a link."""
RESCUED = "braid_rescued"
A_DAY_S = 24 * 3600.0
LISTED = Bounds(entries=50_000, seconds=2.0)
"""Of a search for what a menu offers: the front end asks for all menus whenever it opens."""


def output_folder() -> Path:
    return Path(folder_paths.get_output_directory())


def loras_folder() -> Path:
    return output_folder() / "loras"


def spare_folders() -> list[Path]:
    """Where a finished LoRA goes when its folder takes it not; temp/ last, for ComfyUI empties it.

    With --user-directory or --temp-directory they may lie on other disks.
    """
    folders = (folder_paths.get_user_directory(), folder_paths.get_temp_directory())
    return [Path(folder) / RESCUED for folder in folders]


def sweep() -> list[Path]:
    """Remove what killed processes left a day ago or earlier where nodes write; never raises."""
    output = output_folder()
    removed: list[Path] = []
    for folder in (output, *(output / name for name in SUBFOLDERS), *spare_folders()):
        removed += remove_leftovers(folder, A_DAY_S)
    if removed:
        logger.info("removed %d unfinished files of a killed process", len(removed))
    return removed


def sweep_in_background() -> threading.Thread:
    """Sweep beside the start of ComfyUI, which does not wait for it."""
    thread = threading.Thread(target=sweep, name="braid sweep", daemon=True)
    thread.start()
    return thread


def shown_picture(image: io.Image.Type, cls: type[io.ComfyNode]) -> ui.PreviewImage | None:
    """The picture under a node, which ComfyUI saves in temp/; None where that has no room for it.

    A picture is no reason to lose what the node has made.
    """
    try:
        return ui.PreviewImage(image, cls=cls)
    except OSError as error:
        logger.warning("the picture of %s is not shown (%s)", cls.__name__, error)
        return None


def newest_first(folder: Path, pattern: str) -> list[Path]:
    """The files below `folder` that match a glob, without links to nothing; of a folder that holds
    very many, those that were found in time."""
    written = {}
    with contextlib.suppress(SearchEndedError):
        for path in Search(LISTED).files(folder, f"**/{pattern}"):
            with contextlib.suppress(OSError):  # a run may prune one meanwhile
                written[path] = path.stat().st_mtime
    return sorted(written, key=written.__getitem__, reverse=True)


def inside_output(option: str, typed: str, below: str = "") -> Path:
    """A path inside output/`below`, links followed; ValueError for one that leads out of it."""
    check_typed_path(option, typed)
    check_local_path(option, typed)
    root = (output_folder() / below).resolve()
    resolved = (root / typed).resolve()
    if not resolved.is_relative_to(root):
        raise ValueError(
            f"{option} is {quoted(typed)}, which is not inside {root}; give a path in it"
        )
    return resolved


def new_place(option: str, typed: str, below: str = "", ending: str = "") -> str:
    """`typed` with / between folders on every system; ValueError for a path that leads out of
    output/`below`, and for one that some system could not open, see `check_new_path`."""
    typed = typed.replace("\\", "/")
    _, without_drive = os.path.splitdrive(typed)
    check_new_path(option, without_drive, ending)
    inside_output(option, typed, below)
    return typed


def new_folder(option: str, typed: str) -> Path:
    """A folder inside the output folder that may have to be made, refused as in `new_place`."""
    return inside_output(option, new_place(option, typed))


def next_file(filename_prefix: str, suffix: str, below: str = "") -> Path:
    """The next free numbered file of that prefix under output/`below`, whose folder then exists.

    ValueError when the prefix names no file or is refused as in `new_place`.
    """
    option = "filename_prefix"
    if not filename_prefix.strip() or filename_prefix.endswith(("/", "\\")):
        raise ValueError(
            f"{option} {quoted(filename_prefix)} names no file; write one such as loras/my_lora"
        )
    if "%date:" in filename_prefix:
        raise ValueError(
            f"{option} is {quoted(filename_prefix)}; ComfyUI fills %date:…% in for its own nodes "
            "alone: write %year%-%month%-%day% here"
        )
    prefix = new_place(option, filename_prefix, below, ending=f"_00001_{suffix}")
    root = output_folder() / below
    with failures_said(root / prefix):
        root.mkdir(parents=True, exist_ok=True)
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, str(root))
    return Path(folder) / f"{name}_{counter:05}_{suffix}"


def plain_name(option: str, name: str, ending: str = "") -> str:
    """A part of a folder's name, before `ending`; ValueError for what holds a path or is refused
    as in `new_place`."""
    check_new_path(option, name, ending)
    if any(sign in name for sign in "/\\") or name in (".", ".."):
        raise ValueError(
            f"{option} is {quoted(name)}; it is part of a folder name and may hold no path"
        )
    return name
