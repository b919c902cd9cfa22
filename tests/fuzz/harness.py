"""Reads inputs in a child process under limits, and says which were not answered as they should.

An input may be read, or refused by a ValueError of one readable sentence. Everything else is a
failure: another exception, a sentence that is none, more than MOST_SECONDS, more than MOST_BYTES,
the end of the process. The next child goes on behind it.
"""

import contextlib
import gc
import json
import logging
import os
import re
import resource
import select
import shutil
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import mkdtemp

import torch

from .target import Input, Target

MOST_SECONDS = 5.0
"""Of processor time for one input."""
PATIENCE_SECONDS = 60.0
"""Without a word of a child, on a machine that is busy with other things too."""
MOST_BYTES = 1 << 30
"""By which reading one input may make a process larger."""
LONGEST_SENTENCE = 1000
ALL_SAID = 77
"""Exit code of a child that has answered for every input it read."""
_RAW = re.compile(
    r"Traceback|\b[A-Z]\w+(Error|Exception)\b|<class |object at 0x|b'\\x|\bNoneType\b"
)
_BARE = (UnicodeError, json.JSONDecodeError)  # of Python itself, although they are ValueErrors


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An input that was not answered as it should."""

    target: str
    number: int
    kind: str
    """raw, sentence, hang, memory or crash."""
    detail: str


@dataclass(slots=True)
class Tally:
    """What became of the inputs of one target."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    peak_bytes: int = 0
    """By which a child grew at most."""
    slowest_seconds: float = 0.0


def input_of(target: Target, number: int) -> Input:
    """The input with that number; the same on every machine."""
    return target.make(Random(f"{target.name} {number}"))


def fuzz(target: Target, numbers: Sequence[int], folder: Path) -> Tally:
    """Read the inputs with these numbers, below `folder`."""
    tally, position = Tally(), 0
    target.make(Random(0))  # makes the well-formed files once, for all children
    while position < len(numbers):
        position += _read_in_a_child(target, numbers[position:], folder, tally)
    return tally


def _read_in_a_child(target: Target, numbers: Sequence[int], folder: Path, tally: Tally) -> int:
    """Start a child on the inputs; returns how many were done when it ended."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        _work(target, numbers, folder, sending)
    os.close(sending)
    done = 0
    try:
        with os.fdopen(receiving, "rb") as pipe:
            for line in _lines(pipe):
                _note(json.loads(line), tally, target)
                done += 1
        kind = "crash"
    except TimeoutError:
        os.kill(child, signal.SIGKILL)
        kind = "hang"
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != ALL_SAID:
        detail = f"the process ended with {code}"
        failure = {"number": numbers[done], "kind": kind, "detail": detail}
        _note(failure | {"seconds": 0.0, "bytes": 0}, tally, target)
        done += 1
    return done


def _lines(pipe) -> Iterator[bytes]:
    """What a child says, as it says it; TimeoutError when it says nothing for too long."""
    rest = b""
    while True:
        ready, _, _ = select.select([pipe], [], [], PATIENCE_SECONDS)
        if not ready:
            raise TimeoutError
        more = os.read(pipe.fileno(), 1 << 16)
        if not more:
            return
        *whole, rest = (rest + more).split(b"\n")
        yield from whole


def _note(answer: dict, tally: Tally, target: Target) -> None:
    kind = answer["kind"]
    tally.counts[kind] += 1
    tally.peak_bytes = max(tally.peak_bytes, answer["bytes"])
    tally.slowest_seconds = max(tally.slowest_seconds, answer["seconds"])
    if kind not in ("read", "refused"):
        tally.failures.append(
            Failure(target=target.name, number=answer["number"], kind=kind, detail=answer["detail"])
        )


def _work(target: Target, numbers: Sequence[int], folder: Path, sending: int) -> None:
    """The child: one line for each input, and its end after one that failed."""
    code = 1
    try:
        torch.set_num_threads(1)
        logging.disable()
        warnings.simplefilter("ignore")
        _limit_address_space()
        gc.freeze()  # garbage of the parent, freed while an input is read, would hide its growth
        at_start = _peak_bytes()
        for number in numbers:
            answer = {"number": number} | answered(target, input_of(target, number), folder)
            answer["bytes"] = _peak_bytes() - at_start
            if answer["kind"] in ("read", "refused") and answer["bytes"] > MOST_BYTES:
                answer |= {"kind": "memory", "detail": f"{answer['bytes'] >> 20} MiB more"}
            os.write(sending, json.dumps(answer).encode() + b"\n")
            if answer["kind"] not in ("read", "refused"):
                break
        code = ALL_SAID
    finally:
        os._exit(code)


def answered(target: Target, given: Input, folder: Path) -> dict:
    """How `target` answers one input: kind, detail and seconds of processor time."""
    place = Path(mkdtemp(dir=folder))
    started = time.process_time()
    try:
        target.read(given, place)
        kind, detail = "read", ""
    except ValueError as error:
        kind = "refused" if is_sentence(error, target) else "sentence"
        detail = "" if kind == "refused" else _last_of(error)
    except BaseException as error:
        kind, detail = "raw", _last_of(error)
    finally:
        seconds = time.process_time() - started
        with contextlib.suppress(OSError, RecursionError):
            shutil.rmtree(place)
    if seconds > MOST_SECONDS:
        kind, detail = "hang", f"{seconds:.1f} s, then {kind} {detail}"
    return {"kind": kind, "detail": detail, "seconds": seconds}


def is_sentence(error: ValueError, target: Target) -> bool:
    """Whether a user can read it: one line, not long, nothing of Python's, with the file's name."""
    text = str(error)
    if not text.strip() or len(text) >= LONGEST_SENTENCE or not text.isprintable():
        return False
    if _RAW.search(text) or isinstance(error, _BARE):
        return False
    return not target.is_file or "damaged" in text


def _last_of(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {where}: {str(error)[:300]!r}"


def _limit_address_space() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 * MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
