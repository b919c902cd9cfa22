"""What an adapter file says about itself: kohya's `ss_…`, and `modelspec.…`.

All values are strings, as safetensors demands and musubi writes them (`str()`, so None is "None").
modelspec: https://github.com/Stability-AI/ModelSpec, version 1.0.0.
"""

import json
from collections.abc import Mapping
from datetime import datetime

from ..disk.reading import is_unicode, parse_json, shown
from ..refusals import quoted
from .architectures import Architecture
from .spec import NetworkSpec, network_args_of

DEEPEST = 50
"""Brackets in each other in metadata that is typed."""


def adapter_metadata(
    spec: NetworkSpec,
    architecture: Architecture,
    *,
    title: str,
    created: datetime,
    training: Mapping[str, object] | None = None,
    timestep_range: tuple[int, int] | None = None,
) -> dict[str, str]:
    """Metadata of one adapter file, without the hashes (`write_adapter` adds those).

    `training` holds the run's fields without their `ss_` (learning_rate, seed, min_timestep,
    num_timestep_buckets …); `timestep_range` is (min, max) of 0 … 1000.
    """
    modelspec = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{architecture.modelspec}/{spec.kind}",
        "implementation": architecture.implementation,
        "title": title,
        "resolution": architecture.resolution,
        "date": created.replace(microsecond=0).isoformat(),
        "timestep_range": "" if timestep_range is None else "{},{}".format(*timestep_range),
    }
    return (
        {f"ss_{key}": as_text(value) for key, value in (training or {}).items()}
        | network_metadata(spec, architecture)
        | {f"modelspec.{key}": value for key, value in modelspec.items() if value}
    )


def network_metadata(spec: NetworkSpec, architecture: Architecture) -> dict[str, str]:
    """The `ss_` fields that describe the network."""
    rank, alpha = spec.rank_and_alpha(large_kernel=False)
    arguments = network_args_of(spec)
    return {
        "ss_base_model_version": architecture.base_model_version,
        "ss_network_module": f"networks.{spec.kind}",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_network_dropout": str(spec.neuron_dropout or None),
    } | ({"ss_network_args": json.dumps(arguments)} if arguments else {})


def parse_metadata(text: str) -> dict[str, str]:
    """A JSON object as metadata ("" is none); ValueError says where the JSON breaks."""
    if not text.strip():
        return {}
    example = '{"modelspec.author": "me"}'
    try:
        fields = parse_json(text, DEEPEST)
    except ValueError as error:
        raise ValueError(f"metadata: {error}; write an object such as {example}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"metadata: {quoted(text.strip())} is not a JSON object such as {example}")
    metadata = {key: as_text(value) for key, value in fields.items()}
    for key, value in metadata.items():
        if key.startswith("sshs_"):
            raise ValueError(f"metadata: {key[:80]} is computed from the tensors; leave it out")
        if not is_unicode(key + value):
            raise ValueError(f"metadata: {shown(key)} holds half of a character; leave it out")
    return metadata


def as_text(value: object) -> str:
    """`str(value)`, and JSON for lists and objects (ss_datasets, ss_network_args)."""
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
