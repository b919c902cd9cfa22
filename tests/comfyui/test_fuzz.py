"""As tests/engine/test_fuzz.py, for what is read inside ComfyUI."""

import pytest

harness = pytest.importorskip("fuzz.harness", reason="children are made by fork")
from fuzz.host_targets import HOST_FILES, HOST_TEXTS  # noqa: E402

READY = {"save_lora"}
"""Texts whose parsers are mended here; all others are on branches that are not merged."""


@pytest.mark.parametrize("target", HOST_FILES, ids=lambda target: target.name)
def test_a_damaged_model_or_lora_is_loaded_or_refused_in_one_sentence_with_its_name(
    target, tmp_path
):
    tally = harness.fuzz(target, range(150), tmp_path)
    assert tally.failures == []
    assert tally.counts["refused"] > 40 and tally.counts["read"] > 10


@pytest.mark.parametrize(
    "target", [t for t in HOST_TEXTS if t.name in READY], ids=lambda target: target.name
)
def test_a_typed_text_is_taken_or_refused_in_one_sentence(target, tmp_path):
    assert harness.fuzz(target, range(200), tmp_path).failures == []
