"""As tests/engine/test_fuzz.py, for what is read inside ComfyUI."""

import inspect

import pytest
from comfy_api.latest import io

from comfyui_braid.nodes import NODES

harness = pytest.importorskip("fuzz.harness", reason="children are made by fork")
from fuzz.host_targets import HOST_FILES, HOST_TEXTS  # noqa: E402
from fuzz.typed import TYPED  # noqa: E402
from fuzz.widgets import TYPED_COMBOS, USES  # noqa: E402

INPUTS = 100


@pytest.mark.parametrize("target", HOST_FILES, ids=lambda target: target.name)
def test_a_damaged_file_is_loaded_or_refused_in_one_sentence_with_its_name(target, tmp_path):
    tally = harness.fuzz(target, range(INPUTS), tmp_path)
    assert tally.failures == []
    assert tally.counts["refused"] > INPUTS // 4 and tally.counts["read"] > INPUTS // 20


@pytest.mark.parametrize("target", HOST_TEXTS, ids=lambda target: target.name)
def test_a_typed_text_is_taken_or_refused_in_one_sentence(target, tmp_path):
    tally = harness.fuzz(target, range(INPUTS), tmp_path)
    assert tally.failures == []
    assert tally.counts["refused"] > 0 and tally.counts["read"] > 0


def _widgets(inputs):
    """All of them, those that a choice of a menu brings along too."""
    for each in inputs:
        yield each
        for option in each.options if isinstance(each, io.DynamicCombo.Input) else ():
            yield from _widgets(option.inputs)


def test_every_text_widget_is_fuzzed_and_every_node_that_takes_a_number_or_a_text():
    texts, fuzzed = set(), set()
    for node in NODES:
        widgets = list(_widgets(node.define_schema().inputs))
        own = inspect.signature(node.validate_inputs).parameters
        free = {each.id for each in widgets if each.id in own}
        typed = free | {each.id for each in widgets if isinstance(each, io.String.Input)}
        texts |= typed
        if typed or any(isinstance(each, io.Int.Input | io.Float.Input) for each in widgets):
            fuzzed.add(node.define_schema().node_id)
    assert texts == TYPED.keys() and set(TYPED_COMBOS) < texts
    assert fuzzed <= USES.keys()
