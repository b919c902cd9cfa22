"""Kills real processes in the middle of what they write, and looks at what is left.

After each kill every file must be whole and equal, bit for bit, to that of a run that was never
stopped; going on must end in the same bits; and the next start's sweep must leave nothing behind.
Prints one table; the exit status is 1 when anything failed.
"""

import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import conftest  # noqa: F401  registers the package
from host.inprocess import import_comfyui

sys.path.append(str(Path(__file__).resolve().parent.parent / "comfyui"))  # tiny models

SEED = 20260101
TRIES = 4
"""Of one trial: on a busy machine a child may end before it is killed."""
TWO_DAYS_S = 2 * 86400
SUFFIXES = (".safetensors", ".state", ".json")


@dataclass(kw_only=True, slots=True)
class Tally:
    """What the trials of one operation came to."""

    name: str
    duration_s: float
    killed: int = 0
    in_a_write: int = 0
    """Kills that left an unfinished file."""
    resumed: int = 0
    """Kills after which there was a state to go on from."""
    checked: int = 0
    faults: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("damaged", "differing", "leftover"), 0)
    )

    def fault(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        self.faults.append(f"{self.name}: {kind}: {text}")


def in_child(
    act: Callable[[], None],
    log: Path,
    kill_after_s: float | None = None,
    may_kill: Callable[[], bool] = lambda: True,
) -> float | None:
    """Run `act` in a process of its own; seconds it took, None where it was killed in time.

    The kill comes once `may_kill` after that time. RuntimeError with the child's traceback when it
    failed by itself.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become_child(act, writing, log)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    started = time.perf_counter()
    ended, status = 0, 0
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        while not ended and not may_kill():
            ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            os.kill(pid, signal.SIGKILL)
    if not ended:
        _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return None
    if os.WEXITSTATUS(status):
        raise RuntimeError(log.read_text())
    return time.perf_counter() - started


def _become_child(act: Callable[[], None], writing: int, log: Path) -> None:
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.write(writing, b"s")
        act()
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


@contextmanager
def world() -> Iterator[Path]:
    """ComfyUI's folders, empty, for the time of one trial."""
    import folder_paths

    with tempfile.TemporaryDirectory(prefix="braid-faults-") as folder:
        for name in ("output", "temp", "user"):
            (Path(folder) / name).mkdir()
            setattr(folder_paths, f"{name}_directory", str(Path(folder) / name))
        yield Path(folder)


def visible(folder: Path) -> list[Path]:
    """The files that anyone would take for whole ones."""
    return sorted(path for path in written(folder) if is_visible(path))


def hidden(folder: Path) -> list[Path]:
    """Everything else below output/: what a killed process left."""
    return sorted(path for path in written(folder) if not is_visible(path))


def is_visible(path: Path) -> bool:
    return path.suffix in SUFFIXES and not path.name.startswith(".")


def written(folder: Path) -> Iterator[Path]:
    """Every file below output/; a folder may go while this looks."""
    for root, _, names in os.walk(folder / "output"):
        yield from (Path(root, name) for name in names)


def compare(folder: Path, whole: dict[str, str], tally: Tally) -> set[str]:
    """Read every file and compare it with that of the whole run; the keys that were found."""
    from .operations import digest, key_of

    found = set()
    for path in visible(folder):
        tally.checked += 1
        found.add(key_of(path))
        try:
            if digest(path) != whole[key_of(path)]:
                tally.fault("differing", path.name)
        except Exception as error:
            tally.fault("damaged", f"{path.name}: {error!r}")
    return found


def killed_once(operation, after_s: float, in_a_write: bool, folder: Path) -> bool:
    """Run and kill after that time, or in the next write; whether the kill came in time."""

    def may_kill() -> bool:
        return not in_a_write or bool(hidden(folder))

    return in_child(operation.run, folder / "child.log", after_s, may_kill) is None


def look_after(operation, folder: Path, whole: dict[str, str], tally: Tally) -> None:
    """What is there after a kill, after going on, and after the next start."""
    from comfyui_braid.nodes.outputs import sweep

    from .operations import can_resume

    tally.killed += 1
    tally.in_a_write += bool(hidden(folder))
    tally.resumed += operation.name == "training" and can_resume()
    compare(folder, whole, tally)
    if removed := sweep():
        tally.fault("leftover", f"a sweep took {removed[0].name}, which is not old")
    in_child(operation.again, folder / "child.log")
    for key in whole.keys() - compare(folder, whole, tally):
        tally.fault("differing", f"{key} is missing after going on")
    for path in hidden(folder):
        os.utime(path, (time.time() - TWO_DAYS_S,) * 2)
    sweep()
    for path in hidden(folder):
        tally.fault("leftover", path.name)


def tried(operation, draw: random.Random) -> Tally:
    """All trials of one operation, their kills spread evenly over its duration.

    Every second one waits for the next write to begin.
    """
    from .operations import digest, key_of

    with world() as folder:
        duration_s = in_child(operation.run, folder / "child.log")
        whole = {key_of(path): digest(path) for path in visible(folder)}
    tally = Tally(name=operation.name, duration_s=duration_s)
    for trial in range(operation.trials):
        for _ in range(TRIES):
            part = (trial + draw.random()) / operation.trials
            with world() as folder:
                if killed_once(operation, part * duration_s, trial % 2 == 1, folder):
                    look_after(operation, folder, whole, tally)
                    break
            duration_s *= 0.9  # it ended before the kill
        sys.stderr.write(f"\r{operation.name}: {trial + 1}/{operation.trials} ")
        sys.stderr.flush()
    sys.stderr.write("\r" + " " * 40 + "\r")
    return tally


COLUMNS = (
    "operation duration_s kills in_a_write with_state files_read damaged differing leftover"
).split()


def table(tallies: list[Tally]) -> str:
    rows = [COLUMNS]
    for t in tallies:
        figures = [t.killed, t.in_a_write, t.resumed, t.checked, *t.counts.values()]
        rows.append([t.name, f"{t.duration_s:.2f}", *map(str, figures)])
    columns = list(zip(*rows[1:], strict=True))[2:]
    rows.append(["all", "", *(str(sum(map(int, column))) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(lines) + "\n"


def main() -> int:
    if not hasattr(os, "fork") or not import_comfyui():
        sys.stderr.write("make faults needs Unix and a ComfyUI (COMFYUI_PATH)\n")
        return 1
    from .operations import operations

    started, draw = time.perf_counter(), random.Random(SEED)
    with tempfile.TemporaryDirectory(prefix="braid-faults-") as folder:
        tallies = [tried(operation, draw) for operation in operations(Path(folder))]
    sys.stdout.write(table(tallies))
    faults = [fault for tally in tallies for fault in tally.faults]
    sys.stdout.write("".join(f"{fault}\n" for fault in faults))
    seconds = time.perf_counter() - started
    sys.stdout.write(f"seed {SEED}, {seconds:.0f} s, {len(faults)} faults\n")
    return 1 if faults or sum(t.killed for t in tallies) < 50 else 0


if __name__ == "__main__":
    sys.exit(main())
