"""ComfyUI's folders, for as long as one input is read."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import folder_paths


@contextmanager
def output_in(folder: Path) -> Iterator[None]:
    """Inside, ComfyUI's output folder is `folder`."""
    before = folder_paths.output_directory
    folder_paths.set_output_directory(str(folder))
    try:
        yield
    finally:
        folder_paths.set_output_directory(before)


@contextmanager
def apart_in(folder: Path, user: str) -> Iterator[Path]:
    """Inside, ComfyUI's user, output, input and temp folders lie side by side in `folder`; gives
    the first, which is called `user`."""
    names = {"user": user, "input": "input", "output": "output", "temp": "temp"}
    with ExitStack() as stack:
        for kind, name in names.items():
            (folder / name).mkdir()
            attribute = f"{kind}_directory"
            stack.callback(setattr, folder_paths, attribute, getattr(folder_paths, attribute))
            setattr(folder_paths, attribute, str(folder / name))
        yield folder / user
