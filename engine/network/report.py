"""A TargetReport as text for people."""

import re
from collections import Counter
from collections.abc import Iterable

from .targets import DEFAULT_EXCLUDE, Candidate, TargetReport

_KIND_NAMES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}


def report_text(report: TargetReport) -> str:
    """What is adapted, what is skipped and why, what each pattern did; one fact a line."""
    spec, selected = report.spec, report.selected
    rank, alpha = spec.rank_and_alpha(large_kernel=False)
    lines = [
        f"{report.architecture.title}: {_KIND_NAMES[spec.kind]}, rank {rank}, alpha {alpha:g}",
        f"{len(selected)} of {len(report.candidates)} layers adapted, "
        f"{report.parameters:,} parameters ({report.parameters * 4 / 2**20:.1f} MiB in float32)",
    ]
    lines += [f"warning: {warning}" for warning in report.warnings]
    lines += ["", *_pattern_lines(report), "adapted", *_grouped(selected)]
    skipped = [candidate for candidate in report.candidates if not candidate.selected]
    for reason, count in Counter(candidate.reason for candidate in skipped).most_common():
        lines += ["", f"skipped, {count} × {reason}"]
        lines += _grouped(candidate for candidate in skipped if candidate.reason == reason)
    return "\n".join(lines)


def _pattern_lines(report: TargetReport) -> list[str]:
    """What each pattern matches; defaults for layers that this model lacks are left out."""
    counts = [c for c in report.patterns if c.matches or c.origin != DEFAULT_EXCLUDE]
    if not counts:
        return []
    width = max(len(count.pattern) for count in counts)
    return [
        "patterns",
        *(f"  {c.origin:<16}  {c.pattern:<{width}}  matches {c.matches}" for c in counts),
        "",
    ]


def _grouped(candidates: Iterable[Candidate]) -> list[str]:
    """Layers that differ only in the number of their block, one line for all of them."""
    groups: dict[tuple[str, str], list[str]] = {}
    for candidate in candidates:
        found = re.search(r"(?<=\.)\d+(?=\.)", candidate.name)
        number = found.group() if found else ""
        name = candidate.name.replace(f".{number}.", ".{}.", 1) if found else candidate.name
        parts = f", {len(candidate.rows)} adapters" if candidate.rows else ""
        groups.setdefault((name, f"{candidate.shape}{parts}"), []).append(number)
    width = max((len(_ranged(name, numbers)) for (name, _), numbers in groups.items()), default=0)
    return [
        f"  {_ranged(name, numbers):<{width}}  {len(numbers):>3} × {shape}"
        for (name, shape), numbers in groups.items()
    ]


def _ranged(name: str, numbers: list[str]) -> str:
    """`blocks.{}.q` with numbers 0 1 2 4 → `blocks.0-2,4.q`."""
    if numbers == [""]:
        return name
    runs: list[list[int]] = []
    for number in map(int, numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return name.replace("{}", text)
