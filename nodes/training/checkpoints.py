"""Load Checkpoints, the node that finds the adapter files of a run."""

from pathlib import Path

from comfy_api.latest import io

from ...engine.checkpoints import SHADOWS_SUFFIX, Checkpoints, find_checkpoints
from ...engine.disk.folders import Bounds, Search
from .. import sockets
from ..outputs import loras_folder, newest_first
from ..typed_paths import OwnFolders, path_for_a_run, refusal_of, typed_path

TOP = "."
"""The choice that means output/loras itself."""
LIVE_ENTRIES, LIVE_SECONDS = 5_000, 0.4


def named_folder(folder: str, path: str = "") -> tuple[str, str]:
    """(widget, text) that says where the files are: `path` wins."""
    return ("path", path.strip()) if path.strip() else ("folder", folder.strip() or TOP)


def chosen_folder(folder: str, path: str = "") -> Path:
    """The folder that the widgets name, for a run; relative ones lie under output/loras."""
    return path_for_a_run(*named_folder(folder, path), loras_folder())


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
            display_name="Load Training Checkpoints",
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
                    tooltip="Any other folder of this machine, as an absolute path; wins over "
                    "folder. Empty = use folder.",
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
    def validate_inputs(cls, folder: str, path: str = "") -> bool | str:
        """Any folder of this machine may be typed; whether it exists is said when the node runs."""
        return refusal_of("folder", folder) or refusal_of("path", path) or True

    @classmethod
    def fingerprint_inputs(cls, folder: str, pattern: str, path: str = "") -> str:
        """Changes with the files: their names, times and sizes."""
        chosen = chosen_folder(folder, path)
        if not chosen.is_dir():
            return "no such folder"
        search, stats = Search(), {}
        for glob in (pattern.strip(), f"*{SHADOWS_SUFFIX}"):
            for file in search.files(chosen, glob):
                stat = file.stat()
                stats[file.relative_to(chosen).as_posix()] = stat.st_mtime_ns, stat.st_size
        return repr(sorted(stats.items()))

    @classmethod
    def execute(cls, folder: str, pattern: str, path: str = "") -> io.NodeOutput:
        return io.NodeOutput(find_checkpoints(chosen_folder(folder, path), pattern.strip()))


def live_search() -> Search:
    """What may be read while a graph is only looked at: little, and of ComfyUI's own folders."""
    own = OwnFolders()
    return Search(Bounds(entries=LIVE_ENTRIES, seconds=LIVE_SECONDS, check=own.check))


def live_checkpoints(search: Search, folder: str, pattern: str, path: str = "") -> Checkpoints:
    """What the node would give for these widgets."""
    chosen = typed_path(*named_folder(folder, path), loras_folder())
    return find_checkpoints(chosen, pattern.strip(), search)
