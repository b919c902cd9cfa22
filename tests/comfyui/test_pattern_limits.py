"""What a stranger's workflow writes as a pattern, through the nodes that take patterns."""

import pytest
import torch
from tiny_models import build

from comfyui_braid.engine import patterns
from comfyui_braid.nodes.fp8 import BraidFp8Loader
from comfyui_braid.nodes.network import BraidNetwork, BraidPreviewTargets

BOMB = r"(?:.|.)*[!?]"


def network(**inputs):
    defaults = {i.id: i.default for i in BraidNetwork.define_schema().inputs}
    return BraidNetwork.execute(**defaults | inputs).result[0]


def previewed(**inputs):
    return BraidPreviewTargets.execute(build("flux"), network(**inputs)).result


def quantised(path, **inputs):
    granularity = {"granularity": "tensor"}
    return BraidFp8Loader.execute(path.name, granularity, "e4m3fn", **inputs).result


@pytest.fixture
def place(flux_file, monkeypatch):
    """Where each pattern may be written: what runs the nodes with it."""
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    monkeypatch.setattr("folder_paths.get_full_path_or_raise", lambda kind, name: str(flux_file))
    return {
        "exclude": lambda text: previewed(exclude_patterns=text),
        "include": lambda text: previewed(include_patterns=text, target_mode="whitelist"),
        "network_args": lambda text: previewed(network_args=f"exclude_patterns=[r'{text}']"),
        "FP8 exclude": lambda text: quantised(flux_file, exclude_patterns=text),
        "FP8 include": lambda text: quantised(flux_file, include_patterns=text),
    }


WHERE = ["exclude", "include", "network_args", "FP8 exclude", "FP8 include"]


@pytest.mark.parametrize("where", WHERE)
def test_a_pattern_that_never_ends_is_one_sentence_at_the_node(where, place):
    with torch.inference_mode(), pytest.raises(ValueError) as refusal:
        place[where](BOMB)
    option = "include_patterns" if "include" in where else "exclude_patterns"
    assert str(refusal.value).startswith(f"{option}: the patterns took over 0.3 s, up to '(?:.|.)*")


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    "text, sentence",
    [
        ("a{99999999999}", "is not a regular expression .the repetition number is too large"),
        ("a{4294967294}", "is too large a regular expression"),
        ("(?:a{50000}){50000}", "is too large a regular expression"),
        ("(" * 450 + ")" * 450, "is too deep a regular expression"),
        ("(" * 5000 + ")" * 5000, "is one pattern of 10,000 characters"),
        ("(?<=a*)b", "is not a regular expression .look-behind"),
    ],
)
def test_a_pattern_that_cannot_be_built_is_one_sentence_at_the_node(where, text, sentence, place):
    with torch.inference_mode(), pytest.raises(ValueError, match=f"{sentence}") as refusal:
        place[where](text)
    assert "_patterns: '" in str(refusal.value) and len(str(refusal.value)) < 300


@pytest.mark.parametrize("where", WHERE)
def test_an_ordinary_pattern_is_taken_everywhere(where, place):
    with torch.inference_mode():
        assert place[where](r".*\.0\.img_attn\.(qkv|proj)")
