"""What the owner of a server allows beyond the pack's own lists: user/__braid/settings.json.

ComfyUI lets anyone who reaches the server write below user/<name of a user>/ (its userdata and
settings routes), input/, output/ and temp/ (uploads, nodes), and, with assets turned on, the
folders of models. A folder in user/ that begins with two underscores belongs to no user: ComfyUI
keeps those for itself, gives them to none of its routes, and lets no user be called like that.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths

from ..engine.disk.reading import read_json
from ..engine.refusals import did_you_mean, said, shortened
from .outputs import output_folder

SETTINGS = ("optimizers",)
"""The keys of the file."""
DEEPEST = 4
"""Brackets in each other in it; there are two."""


def settings_file() -> Path:
    """Where the owner's settings are, if there are any."""
    return Path(folder_paths.get_system_user_directory("braid")) / "settings.json"


def allowed_optimizers() -> tuple[str, ...]:
    """Dotted paths of optimizer classes that workflows may name besides those in the list."""
    paths = _settings().get("optimizers", [])
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(
            f'{settings_file()}: "optimizers" must be a list of classes such as '
            '["package.module.Class"]'
        )
    return tuple(paths)


def _settings() -> dict[str, Any]:
    """The file's content, {} without one; ValueError for one that is damaged or not safe."""
    path = settings_file()
    if not path.exists():
        return {}
    _refuse_reachable(path)
    try:
        settings = read_json(path, DEEPEST)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({said(error)})") from error
    if not isinstance(settings, dict):
        raise ValueError(f'{path}: must hold a JSON object such as {{"optimizers": []}}')
    for key in settings:
        if key not in SETTINGS:
            raise ValueError(
                f"{path}: unknown setting {shortened(key)!r}{did_you_mean(key, SETTINGS)}; known: "
                f"{', '.join(SETTINGS)}"
            )
    return settings


def _refuse_reachable(path: Path) -> None:
    """ValueError when a workflow or a client of the server could write the file, links followed."""
    resolved = path.resolve()
    for folder in _written_by_clients():
        if resolved.is_relative_to(folder.resolve()):
            raise ValueError(
                f"{path} lies in {folder}, where everyone who reaches this server can write, so "
                "it allows nothing; keep these folders apart"
            )


def _written_by_clients() -> Iterator[Path]:
    """The folders that ComfyUI's routes and nodes write to."""
    yield output_folder()
    yield Path(folder_paths.get_input_directory())
    yield Path(folder_paths.get_temp_directory())
    for folders, _ in folder_paths.folder_names_and_paths.values():
        yield from map(Path, folders)
    for entry in Path(folder_paths.get_user_directory()).glob("*"):
        if not entry.name.startswith(folder_paths.SYSTEM_USER_PREFIX):
            yield entry
