"""Imports a real ComfyUI into this process, on the CPU when there is no GPU."""

import sys

from . import stand_ins
from .find import find_comfyui


def import_comfyui() -> bool:
    """Make `comfy`, `comfy_api`, `nodes` … importable; False when there is no ComfyUI."""
    root = find_comfyui()
    if root is None:
        return False
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    stand_ins.install()
    import comfy.options
    import torch
    import utils.install_util  # noqa: F401  as main.py does, before comfy/utils.py can hide it

    if "comfy.cli_args" not in sys.modules:
        argv, sys.argv = sys.argv, ["x"] + ([] if torch.cuda.is_available() else ["--cpu"])
        try:
            comfy.options.enable_args_parsing()
            import comfy.cli_args  # noqa: F401
        finally:
            sys.argv = argv
    return True
