"""A process whose memory is watched while it says, line by line, how far it is."""

import json
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PHASES = ("loading", "training", "sampling")
"""Each ends with a line of JSON from the process."""
EVERY_SECONDS = 0.05


@dataclass(slots=True)
class Watched:
    """What a process said, and took."""

    said: dict = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    """Bytes of memory of its own (anonymous: not mapped from a file) at most, by phase."""
    ended: str = ""
    """Why it ended before its last line; empty where it did not."""


def watched(script: Path, *arguments: str) -> Watched:
    """Run a script to its end."""
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True
    )
    result, over = Watched(), threading.Event()
    lines = 0

    def watch() -> None:
        seen = psutil.Process(process.pid)
        while not over.wait(EVERY_SECONDS):
            try:
                memory = seen.memory_info()
            except psutil.Error:
                return
            phase = PHASES[min(lines, len(PHASES) - 1)]
            own = memory.rss - memory.shared
            result.peaks[phase] = max(result.peaks.get(phase, 0), own)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        for line in process.stdout:
            if line.startswith("{"):
                result.said |= json.loads(line)
                lines += 1
    finally:
        over.set()
        thread.join()
        process.kill()
        code = process.wait()
    if lines < len(PHASES):
        result.ended = f"it ended with {code} while {PHASES[lines]}"
    return result
