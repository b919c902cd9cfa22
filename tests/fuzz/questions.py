"""Questions to the live route, as a browser asks them, changed at random."""

import json
from pathlib import Path
from random import Random
from typing import Any

from host.texts import english

from comfyui_braid.nodes import LIVE, kinds, live

from .mutate import mutated_json, mutated_text
from .places import output_in

SAMPLING = {
    "min_timestep": 0,
    "max_timestep": 1000,
    "preserve_distribution_shape": True,
    "num_timestep_buckets": 4,
}
SAMPLING_NODE = {
    "node_id": "BraidTimestepSampling",
    "values": {
        "timestep_sampling": "shift",
        "timestep_sampling.discrete_flow_shift": 3.0,
        "timestep_sampling.sigmoid_scale": 1.0,
        "timestep_sampling.weighting_scheme": "none",
        **SAMPLING,
    },
    "inputs": {},
}
QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("timesteps", SAMPLING_NODE),
    (
        "timesteps",
        {
            "node_id": "BraidTimestepPreview",
            "values": {"width": 64, "height": 64, "bins": 10, "samples": 1000, "seed": 0},
            "inputs": {"timesteps": SAMPLING_NODE},
        },
    ),
    (
        "ema",
        {
            "node_id": "BraidPostHocEma",
            "values": {
                "method": "sigma_rel",
                "method.sigma_rel": 0.2,
                "sort": "step",
                "first": 1,
                "last": 0,
            },
            "inputs": {
                "checkpoints": {
                    "node_id": "BraidTrainLora",
                    "values": {"steps": 100},
                    "inputs": {
                        "options": {
                            "node_id": "BraidCheckpointing",
                            "values": {"save_every_n_steps": 10, "save_last_n": 0},
                            "inputs": {},
                        }
                    },
                }
            },
        },
    ),
    (
        "magcache",
        {
            "node_id": "BraidMagCachePlan",
            "values": {
                "preset": "FLUX.1-dev",
                "mag_ratios": "0",
                "steps": 20,
                "rule": "magcache",
                "rule.threshold": 0.24,
                "rule.retention_ratio": 0.2,
                "rule.k": 6,
                "rule.interpolation": "cumulative",
            },
            "inputs": {},
        },
    ),
]


def mutated_question(rng: Random) -> str:
    """noun, then the body of a question to the live route."""
    noun, body = rng.choice(QUESTIONS)
    document = mutated_json(rng, body)
    return f"{noun} {mutated_text(rng, [document]) if rng.random() < 0.1 else document}"


def ask(question: str, folder: Path) -> None:
    """As the route answers it; a sentence in the answer counts as a refusal."""
    noun, _, body = question.partition(" ")
    with output_in(folder):
        answer = answer_live(noun, body)
    json.dumps(answer, allow_nan=False)
    if sentence := answer.get("error") or answer.get("message"):
        raise ValueError(english(sentence))


def answer_live(noun: str, body: str) -> dict[str, Any]:
    _, answer = live.answer_to(LIVE[noun], noun, kinds(), body.encode(errors="surrogatepass"))
    return json.loads(answer)
