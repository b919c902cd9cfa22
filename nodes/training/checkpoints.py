"""Load Checkpoints, the node that finds the adapter files of a run."""

import os
from pathlib import Path

from comfy_api.latest import io

from ...engine.checkpoints import Checkpoints, find_checkpoints
from .. import sockets
from ..outputs import loras_folder, newest_first

TOP = "."
"""The choice that means output/loras itself."""


def chosen_folder(folder: str, path: str = "") -> Path:
    """The folder that the widgets name: `path` wins; relative ones lie under output/loras."""
    named = path.strip() or folder.strip() or TOP
    return loras_folder() / os.path.expanduser(named)


def _run_folders() -> list[str]:
    """Folders under output/loras that hold adapter files, the newest first."""
    loras = loras_folder()
    files = newest_first(loras, "*.safetensors")
    return list(dict.fromkeys(f.parent.relative_to(loras).as_posix() for f in files)) or [TOP]


class BraidLoadCheckpoints(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidLoadCheckpoints",
            display_name="Load Checkpoints",
            category=sockets.TRAINING,
            description="The LoRA files that one training run saved, in training order: Braid's, "
            "musubi-tuner's, kohya's or ComfyUI's own.",
            search_aliases=["lora folder", "epochs", "post-hoc ema", "training run"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=_run_folders(),
                    tooltip="Folder under output/loras in which the run saved, newest first. "
                    "'.' is output/loras itself.",
                ),
                io.String.Input(
                    "pattern",
                    default="*.safetensors",
                    tooltip="Which files of the folder, as a glob: my_run-*.safetensors takes one "
                    "run out of a folder of several. Merged files and EMA shadows are left out.",
                ),
                io.String.Input(
                    "path",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Any other folder, as an absolute path; wins over folder. Empty = use "
                    "folder.",
                ),
            ],
            outputs=[
                sockets.Checkpoints.Output(
                    "checkpoints",
                    tooltip="The files with their steps, and the EMA shadows beside them, for the "
                    "EMA nodes.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str, path: str = "") -> bool:
        """Any folder may be typed; whether it exists is said when the node runs."""
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: str, pattern: str, path: str = "") -> str:
        """Changes with the files: their names, times and sizes."""
        chosen = chosen_folder(folder, path)
        if not chosen.is_dir():
            return "no such folder"
        # below it too: a pattern may name folders
        files = sorted(file for file in chosen.rglob("*.safetensors") if file.is_file())
        stats = ((file.relative_to(chosen).as_posix(), file.stat()) for file in files)
        return repr([(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats])

    @classmethod
    def execute(cls, folder: str, pattern: str, path: str = "") -> io.NodeOutput:
        return io.NodeOutput(load_checkpoints(folder, pattern, path))


def load_checkpoints(folder: str, pattern: str, path: str = "") -> Checkpoints:
    """What the node gives for these widgets."""
    return find_checkpoints(chosen_folder(folder, path), pattern.strip())


NODES: list[type[io.ComfyNode]] = [BraidLoadCheckpoints]
