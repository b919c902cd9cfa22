"""Loads the repository as package `comfyui_braid`, whatever its folder is called."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _load_package() -> None:
    if "comfyui_braid" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "comfyui_braid", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_braid"] = module
    spec.loader.exec_module(module)


_load_package()
