"""Writes random full-size models, runs each in a process of its own, and prints a table.

python -m full_size                      every model that this machine has room for
python -m full_size "Wan 1.3B" --keep    one of them; its file stays for the next time
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

TESTS = Path(__file__).resolve().parents[1]
sys.path.append(str(TESTS))

import conftest  # noqa: E402, F401  makes the package importable
from host.inprocess import import_comfyui  # noqa: E402

from .watch import PHASES, Watched, watched  # noqa: E402

GIB = 2**30
PRECISIONS = ("bf16", "fp8")
ITEMS = {
    "Wan 1.3B": ((1, 16, 1, 32, 32), 64),
    "Z-Image": ((1, 16, 16, 16), 64),
    "FLUX.1": ((1, 16, 16, 16), 64),
}
"""Model → (shape of the latents, tokens of the prompt): small, because the weights are tried."""
ROOM_GIB = {
    "Wan 1.3B": {"bf16": 8, "fp8": 4},
    "Z-Image": {"bf16": 28, "fp8": 10},
    "FLUX.1": {"bf16": 52, "fp8": 24},
}
"""Memory below which a case is left out: on a CPU core computes in float32, and holds that."""
HEADS = (
    *("model", "numbers", "file, GB", "load, s", "steps, s", "samples, s"),
    *(f"{phase}, GiB" for phase in PHASES),
    "estimate",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", help=", ".join(ITEMS))
    parser.add_argument("--folder", type=Path, help="of the files, up to 24 GB each")
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    given = parser.parse_args()
    if unknown := set(given.models) - set(ITEMS):
        parser.error(f"{', '.join(sorted(unknown))}: choose among {', '.join(ITEMS)}")
    if not import_comfyui():
        sys.exit("full-size needs a ComfyUI checkout: set COMFYUI_PATH")
    folder = given.folder or Path(tempfile.mkdtemp(prefix="braid_full_size_"))
    folder.mkdir(parents=True, exist_ok=True)
    say(HEADS)
    say(["---"] * len(HEADS))
    failed = 0
    try:
        for name in given.models or ITEMS:
            for row, ended in rows(name, folder, given.keep):
                say(row)
                failed += bool(ended)
    finally:
        if not (given.keep or given.folder):
            shutil.rmtree(folder)
    return min(failed, 1)


def rows(name: str, folder: Path, keep: bool) -> Iterator[tuple[list[str], str]]:
    """(cells, why it failed) of the model in each precision."""
    from .files import write_model

    available = psutil.virtual_memory().available / GIB
    room = ROOM_GIB[name]
    fitting = [precision for precision in PRECISIONS if room[precision] <= available]
    for precision in PRECISIONS:
        if precision not in fitting:
            left_out = f"left out: needs {room[precision]} GiB, {available:.0f} are free"
            yield [f"{name} {precision}", left_out], ""
    if not fitting:
        return
    path = folder / f"{name}.safetensors"
    started = time.monotonic()
    numbers = write_model(name, path)
    note(f"{path} written in {time.monotonic() - started:.0f} s")
    shape, tokens = ITEMS[name]
    try:
        for precision in fitting:
            case = Path(__file__).with_name("case.py")
            seen = watched(case, name, precision, str(path), str(list(shape)), str(tokens))
            yield cells(f"{name} {precision}", numbers, path, seen), seen.ended
    finally:
        if not keep:
            path.unlink()


def cells(title: str, numbers: int, path: Path, seen: Watched) -> list[str]:
    """A row of the table."""
    said = seen.said
    steps = [said.get("first_step_seconds"), said.get("step_seconds")]
    return [
        title,
        f"{numbers / 1e9:.2f} B",
        f"{path.stat().st_size / 1e9:.1f}",
        _rounded(said.get("load_seconds")),
        " then ".join(map(_rounded, steps)),
        _rounded(said.get("sample_seconds")),
        *(_rounded(seen.peaks.get(phase, 0) / GIB, 2) for phase in PHASES),
        seen.ended or str(said.get("estimate")),
    ]


def _rounded(value: float | None, places: int = 1) -> str:
    return "—" if value is None else f"{value:.{places}f}"


def say(row: list[str] | tuple[str, ...]) -> None:
    sys.stdout.write(f"| {' | '.join(row)} |\n")
    sys.stdout.flush()


def note(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
