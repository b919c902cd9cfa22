"""The network nodes as ComfyUI calls them."""

import pytest
import torch
from tiny_models import ARCHITECTURES, build

from comfyui_braid.engine.comfyui.model import architecture_of, diffusion_model_of
from comfyui_braid.engine.network.spec import NetworkSpec, TargetPatterns
from comfyui_braid.engine.network.targets import select_targets
from comfyui_braid.nodes.network import NODES, BraidNetwork, BraidPreviewTargets

CONTRACT = {
    "BraidNetwork": (
        ["network_type", "network_dim", "network_alpha", "loraplus_lr_ratio", "exclude_patterns"]
        + ["include_patterns", "target_mode", "network_dropout", "rank_dropout", "module_dropout"]
        + ["network_args", "split_qkv"],
        ["BRAID_NETWORK"],
    ),
    "BraidPreviewTargets": (["model", "network"], ["STRING", "INT", "INT"]),
    "BraidSaveLora": (
        ["lora", "filename_prefix", "key_format", "save_precision", "metadata", "model"],
        ["STRING"],
    ),
}


def default_inputs(node) -> dict:
    """What the front end sends when nothing was changed."""
    return {i.id: i.default for i in node.define_schema().inputs if hasattr(i, "default")}


def test_ids_inputs_and_outputs_are_those_of_the_contract_and_all_explain_themselves():
    assert [node.define_schema().node_id for node in NODES] == list(CONTRACT)
    for node in NODES:
        schema = node.define_schema()
        inputs, outputs = CONTRACT[schema.node_id]
        assert [i.id for i in schema.inputs] == inputs
        assert [o.io_type for o in schema.outputs] == outputs
        assert all(i.tooltip for i in schema.inputs) and all(o.tooltip for o in schema.outputs)
        schema.finalize()
        schema.validate()


def test_untouched_widgets_are_a_plain_lora_of_rank_16():
    (spec,) = BraidNetwork.execute(**default_inputs(BraidNetwork)).args
    assert spec == NetworkSpec(rank=16, alpha=16.0)


def test_widgets_and_network_args_reach_the_spec():
    inputs = default_inputs(BraidNetwork) | {
        "network_type": "loha",
        "exclude_patterns": ".*txt_.*",
        "network_args": "\"include_patterns=[r'.*mod.*']\" conv_dim=4 rank_dropout=0.1",
    }
    (spec,) = BraidNetwork.execute(**inputs).args
    assert (spec.kind, spec.conv_rank, spec.rank_dropout) == ("loha", 4, 0.1)
    assert spec.targets == TargetPatterns(exclude=(".*txt_.*",), include=(".*mod.*",))


def test_split_qkv_reaches_the_spec_and_is_refused_for_what_cannot_be_split():
    inputs = default_inputs(BraidNetwork) | {"split_qkv": True}
    (spec,) = BraidNetwork.execute(**inputs).args
    assert spec == NetworkSpec(rank=16, alpha=16.0, split_qkv=True)
    with pytest.raises(ValueError, match="split_qkv=True: works on lora only, not on lokr; switch"):
        BraidNetwork.execute(**inputs | {"network_type": "lokr"})
    before = {key: value for key, value in inputs.items() if key != "split_qkv"}
    (spec,) = BraidNetwork.execute(**before).args  # a workflow from before it was there
    assert not spec.split_qkv


def test_a_typing_mistake_is_one_sentence_at_the_node():
    inputs = default_inputs(BraidNetwork) | {"network_args": "conv_dims=4"}
    with pytest.raises(ValueError, match="unknown key 'conv_dims' .did you mean conv_dim"):
        BraidNetwork.execute(**inputs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_preview_counts_and_shows_what_would_be_trained(name):
    patcher = build(name)
    with torch.inference_mode():
        output = BraidPreviewTargets.execute(patcher, NetworkSpec(rank=4))
    report, modules, parameters = output.args
    assert output.ui.as_dict()["text"] == (report,)
    assert f"{modules} of " in report and f"{parameters:,} parameters" in report
    assert parameters == sum(
        4 * (linear.in_features + linear.out_features)
        for layer, linear in patcher.model.diffusion_model.named_modules()
        if isinstance(linear, torch.nn.Linear) and layer in selected(patcher)
    )


def selected(patcher) -> set[str]:
    report = select_targets(diffusion_model_of(patcher), NetworkSpec(), architecture_of(patcher))
    return {candidate.name for candidate in report.selected}


def test_the_preview_warns_about_a_pattern_that_matches_nothing():
    spec = NetworkSpec(targets=TargetPatterns(exclude=("single_blocks",)))
    report = BraidPreviewTargets.execute(build("flux"), spec).args[0]
    assert "warning: exclude_patterns: 'single_blocks' matches no layer" in report
    assert "'.*single_blocks.*' would match 12" in report
