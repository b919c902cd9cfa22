"""The fields that each method of Post-Hoc EMA shows, and what they say as a schedule."""

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ...engine.ema.schedule import BetaRamp, MusubiPower, Power, Schedule


def sigma_rel_input(default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        "sigma_rel",
        default=default,
        min=0.0,
        max=0.5,  # above 0.28868 the engine says why there is no such average
        step=0.005,
        round=0.0001,
        tooltip=tooltip,
    )


def _beta(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        name, default=default, min=0.0, max=1.0, step=0.01, round=0.0001, tooltip=tooltip
    )


METHODS = {
    "sigma_rel": [
        sigma_rel_input(
            0.2,
            "Width of the average: its standard deviation over training time, as a fraction of the "
            "run. Above 0, at most 0.28868 (all of the run alike). 0.05 follows the end, 0.2 is a "
            "good start, 0.25 is broad. Exact weights for these files at these steps.",
        )
    ],
    "beta": [
        _beta(
            "beta",
            0.95,
            "What is kept of the average at each further file, 0 to 1. Higher = more of the early "
            "files: 0.95 leaves 63 % on the first of 10.",
        )
    ],
    "beta_ramp": [
        _beta("beta", 0.9, "Decay at the first merge, 0 to 1."),
        _beta("beta2", 0.95, "Decay at the last merge, 0 to 1; linear in between."),
    ],
    "sigma_rel_musubi": [
        sigma_rel_input(
            0.2,
            "As musubi-tuner computes it, bit for bit: drops the oldest file, takes the files as "
            "equally spaced. Above 0, at most 0.28868. For comparison; sigma_rel is better.",
        )
    ],
}


def parse_schedule(method: Mapping[str, Any]) -> Schedule:
    """The `method` widgets as a schedule; ValueError says what is wrong."""
    match dict(method):
        case {"method": "sigma_rel", "sigma_rel": sigma_rel}:
            return Power(sigma_rel=sigma_rel)
        case {"method": "sigma_rel_musubi", "sigma_rel": sigma_rel}:
            return MusubiPower(sigma_rel=sigma_rel)
        case {"method": "beta_ramp", "beta": beta, "beta2": beta2}:
            return BetaRamp(beta=beta, beta2=beta2)
        case {"method": "beta", "beta": beta}:
            return BetaRamp(beta=beta, beta2=beta)
    raise ValueError(f"method {dict(method)}: choose one of {', '.join(METHODS)} with its values")
