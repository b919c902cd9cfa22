"""`make test-hosts`: the comfyui and browser suites against other hosts than the one at hand.

The hosts are the ComfyUI that is found with the packages it pins, the same with the newest that the
registry has, and an older checkout (`make test-hosts OLDEST=path`) with those that it names. What a
host has of its own lies in a folder before the environment's packages, which stay as they are.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from .find import PACK, find_comfyui

PACKAGES = ("comfyui-frontend-package", "comfy-kitchen", "comfy-aimdo")
"""What a ComfyUI takes from the registry and a user may have newer than it pins."""
SUITES = (
    *("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"),
    *("tests/comfyui", "tests/browser"),
)
NO_OLDEST = "make test-hosts OLDEST=path of a checkout of the oldest ComfyUI in pyproject.toml"
COULD_NOT = "it could not be run"
VERSIONS = f"import importlib.metadata as m; print(*map(m.version, {PACKAGES!r}))"


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A ComfyUI and what it runs with."""

    name: str
    comfyui: Path
    """The root of its checkout."""
    wanted: tuple[str, ...]
    """Requirements that go before the environment's packages; none: as the environment is."""

    @property
    def core(self) -> str:
        """The version of the checkout."""
        text = (self.comfyui / "comfyui_version.py").read_text()
        return re.search(r'__version__ = "(.+?)"', text)[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of the suites on a host."""

    counts: dict[str, int]
    """Tests, by passed, failed and skipped."""
    reasons: tuple[str, ...]
    """Why tests were skipped."""
    minutes: float


def named(comfyui: Path) -> tuple[str, ...]:
    """The requirements of a checkout for PACKAGES, as it writes them."""
    lines = (comfyui / "requirements.txt").read_text().splitlines()
    return tuple(line.strip() for line in lines if re.split(r"[<>=~!\s]", line)[0] in PACKAGES)


def hosts(oldest: Path | None) -> list[Host]:
    """Every host there is a checkout for."""
    found = find_comfyui()
    if found is None:
        raise SystemExit("test-hosts needs a ComfyUI checkout: set COMFYUI_PATH")
    every = [
        Host(name="pinned", comfyui=found, wanted=named(found)),
        Host(name="newest", comfyui=found, wanted=PACKAGES),
    ]
    if oldest:
        every.append(Host(name="oldest", comfyui=oldest, wanted=named(oldest)))
    return every


def environment(host: Host, folder: Path) -> dict[str, str]:
    """The variables of a process that runs on the host; installs its packages into `folder`."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-deps"]
    subprocess.run([*command, "--target", str(folder), *host.wanted], check=True)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "COMFYUI_PATH": str(host.comfyui),
        "OMP_NUM_THREADS": "1",
    }


def run(host: Host, folder: Path, arguments: list[str]) -> Outcome:
    """Run the suites on the host, before the reader's eyes."""
    variables = environment(host, folder)
    versions = subprocess.check_output([sys.executable, "-c", VERSIONS], env=variables, text=True)
    using = zip(PACKAGES, versions.split(), strict=True)
    say(f"{host.name}: core {host.core}, " + ", ".join(" ".join(each) for each in using))
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *(arguments or SUITES)]
    report.unlink(missing_ok=True)
    started = time.monotonic()
    ended = subprocess.run(command, cwd=PACK, env=variables, check=False)
    if not report.exists():
        raise OSError(f"pytest ended with {ended.returncode} and without a report")
    return outcome(report, (time.monotonic() - started) / 60)


def outcome(report: Path, minutes: float) -> Outcome:
    """What pytest has noted in its report."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    failed = int(suite.get("failures")) + int(suite.get("errors"))
    skipped = int(suite.get("skipped"))
    counts = {
        "passed": int(suite.get("tests")) - failed - skipped,
        "failed": failed,
        "skipped": skipped,
    }
    reasons = {each.get("message") for each in suite.iter("skipped")}
    return Outcome(counts=counts, reasons=tuple(sorted(reasons)), minutes=minutes)


def say(text: str) -> None:
    sys.stdout.write(f"\n=== {text} ===\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--oldest", type=Path, help="checkout of the oldest ComfyUI")
    parser.add_argument("--folder", type=Path, required=True, help="of the hosts' packages")
    parser.add_argument("--only", help="one host: pinned, newest or oldest")
    parser.add_argument("arguments", nargs="*", help="for pytest, instead of both suites")
    given = parser.parse_args()
    outcomes: dict[str, Outcome] = {}
    left_out = {"pinned": "not asked for", "newest": "not asked for", "oldest": NO_OLDEST}
    for host in hosts(given.oldest):
        if given.only not in (None, host.name):
            continue
        try:
            outcomes[host.name] = run(host, given.folder.resolve() / host.name, given.arguments)
        except (subprocess.CalledProcessError, OSError) as error:
            left_out[host.name] = f"{COULD_NOT}: {error}"
    for name, seen in outcomes.items():
        counts = ", ".join(f"{count} {what}" for what, count in seen.counts.items())
        say(f"{name}: {counts} in {seen.minutes:.1f} minutes")
        sys.stdout.writelines(f"    skipped: {reason}\n" for reason in seen.reasons)
    missing = [name for name in left_out if name not in outcomes]
    for name in missing:
        say(f"NOT TESTED {name}: {left_out[name]}")
    failed = any(seen.counts["failed"] for seen in outcomes.values())
    return int(failed or any(left_out[name].startswith(COULD_NOT) for name in missing))


if __name__ == "__main__":
    sys.exit(main())
