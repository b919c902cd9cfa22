"""The published lists, one JSON file each in `ratios/`: data, never code."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .plan import MagCachePlan

FOLDER = Path(__file__).parent / "ratios"


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A published list and the models it belongs to."""

    plan: MagCachePlan
    detect: tuple[Mapping[str, Any], ...]
    """Each entry: `model` (class name) and settings of its network that must be equal."""

    def fits(self, model: str, settings: Mapping[str, Any]) -> bool:
        """True when one entry of `detect` describes this model."""
        return any(
            entry["model"] == model
            and all(settings.get(key) == value for key, value in entry.items() if key != "model")
            for entry in self.detect
        )


@cache
def presets() -> dict[str, Preset]:
    """name -> preset, in alphabetical order."""
    found = {}
    for path in sorted(FOLDER.glob("*.json")):
        text = path.read_text(encoding="utf-8")
        plan = MagCachePlan.from_json(text)
        found[plan.name] = Preset(plan=plan, detect=tuple(json.loads(text)["detect"]))
    return dict(sorted(found.items()))


def preset_named(name: str) -> MagCachePlan:
    """The plan of a published list; ValueError names the known ones."""
    if name not in presets():
        raise ValueError(f"preset: unknown {name!r}; known are {', '.join(presets())}")
    return presets()[name].plan


def preset_for(model: str, settings: Mapping[str, Any]) -> MagCachePlan:
    """The published list of a model by its class name and network settings; ValueError if none."""
    for preset in presets().values():
        if preset.fits(model, settings):
            return preset.plan
    raise ValueError(
        f"preset 'auto': there are no published ratios for this {model} model. Run MagCache "
        "Calibrate once and connect its plan, choose a preset by name, or type mag_ratios"
    )
