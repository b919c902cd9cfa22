"""Prints the packages the ComfyUI on this machine needs, one a line, for `pip install -r`.

Left out: torch, which is pinned elsewhere, and what the stand-ins cover.
"""

import re
import sys

from .find import find_comfyui
from .stand_ins import STOOD_IN

LEFT_OUT = {"torch", "PyOpenGL", "comfy-angle", *STOOD_IN}


def needed(requirements: str) -> list[str]:
    """Requirement lines of a ComfyUI requirements.txt, without those in LEFT_OUT."""
    lines = [line.split("#")[0].strip() for line in requirements.splitlines()]
    return [line for line in lines if line and re.split(r"[<>=~! ]", line)[0] not in LEFT_OUT]


if __name__ == "__main__":
    root = find_comfyui()
    if root:
        sys.stdout.write("\n".join(needed((root / "requirements.txt").read_text())) + "\n")
