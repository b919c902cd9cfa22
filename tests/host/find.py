"""Finds a real ComfyUI: COMFYUI_PATH, else the folder this pack lies in, else ~/comfy."""

import os
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent.parent


def find_comfyui() -> Path | None:
    """The root of a ComfyUI checkout, or None."""
    named = os.environ.get("COMFYUI_PATH")
    candidates = (
        [Path(named).expanduser()]
        if named
        else [PACK.parent.parent, Path.home() / "comfy" / "ComfyUI"]
    )
    return next(
        (p for p in candidates if (p / "main.py").is_file() and (p / "comfy").is_dir()), None
    )
