"""The long run: `python -m fuzz`, or `python -m fuzz <target> <number>` to see one input again."""

import resource
import sys
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS), str(TESTS / "engine"), str(TESTS / "comfyui")]

import conftest  # noqa: E402, F401  makes the package importable
from host.inprocess import import_comfyui  # noqa: E402

from .harness import Tally, fuzz, input_of  # noqa: E402
from .target import Target  # noqa: E402
from .targets import FILES, TEXTS  # noqa: E402

PROCESSES = 2
CHUNK = 2000
HEADS = "target              " + "".join(
    f"{head:>10}" for head in "inputs refused accepted crashes raw hangs memory MiB s".split()
)
FAILURES = TESTS.parent / "fuzz_failures"


def all_targets() -> tuple[Target, ...]:
    if not import_comfyui():
        print("no ComfyUI here: what it reads is left out")
        return FILES + TEXTS
    from .host_targets import HOST_FILES, HOST_TEXTS

    return FILES + HOST_FILES + TEXTS + HOST_TEXTS


def main(arguments: list[str]) -> int:
    targets = {target.name: target for target in all_targets()}
    if len(arguments) == 2:
        return again(targets[arguments[0]], int(arguments[1]))
    chosen = [targets[name] for name in arguments] or list(targets.values())
    started = time.monotonic()
    print(HEADS, flush=True)
    with TemporaryDirectory() as folder:
        tallies = run(chosen, Path(folder))
    print(row("all", sum_of(tallies.values())))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = used.ru_utime + used.ru_stime
    print(f"{time.monotonic() - started:.0f} s, of the processor {processor:.0f} s")
    failures = [failure for tally in tallies.values() for failure in tally.failures]
    for failure in failures:
        path = saved(targets[failure.target], failure.number)
        print(f"{failure.target} {failure.number}: {failure.kind}: {failure.detail} ({path})")
    return min(len(failures), 1)


def run(targets: list[Target], folder: Path) -> dict[str, Tally]:
    """Every target's inputs, in chunks, PROCESSES at a time; says what became of each target's."""
    chunks = [
        (target, range(start, min(start + CHUNK, target.long)))
        for target in targets
        for start in range(0, target.long, CHUNK)
    ]
    tallies: dict[str, Tally] = {}
    with ThreadPoolExecutor(PROCESSES) as pool:
        done = pool.map(lambda chunk: fuzz(*chunk, folder), chunks)
        for target, parts in groupby(zip(chunks, done, strict=True), key=lambda part: part[0][0]):
            tallies[target.name] = sum_of(tally for _, tally in parts)
            print(row(target.name, tallies[target.name]), flush=True)
    return tallies


def sum_of(tallies: Iterable[Tally]) -> Tally:
    """One tally of several."""
    whole = Tally()
    for tally in tallies:
        whole.counts += tally.counts
        whole.failures += tally.failures
        whole.peak_bytes = max(whole.peak_bytes, tally.peak_bytes)
        whole.slowest_seconds = max(whole.slowest_seconds, tally.slowest_seconds)
    return whole


def row(name: str, tally: Tally) -> str:
    """One line of the table."""
    counts = tally.counts
    figures = (sum(counts.values()), counts["refused"], counts["read"], counts["crash"])
    figures += (counts["raw"] + counts["sentence"], counts["hang"], counts["memory"])
    numbers = "".join(f"{figure:10}" for figure in figures)
    return f"{name:20}{numbers}{tally.peak_bytes >> 20:10}{tally.slowest_seconds:10.2f}"


def saved(target: Target, number: int) -> Path:
    """The input, kept to be looked at."""
    FAILURES.mkdir(exist_ok=True)
    path = FAILURES / f"{target.name}-{number}"
    given = input_of(target, number)
    path.write_bytes(given if isinstance(given, bytes) else given.encode("utf-8", "surrogatepass"))
    return path


def again(target: Target, number: int) -> int:
    """One input in this process, with all that it raises."""
    print(saved(target, number))
    try:
        print(target.read(input_of(target, number), Path(mkdtemp())))
    except Exception:
        traceback.print_exc()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
