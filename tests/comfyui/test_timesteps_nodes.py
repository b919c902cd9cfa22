"""The timestep nodes in the host: widgets to engine, outputs, and the live answer."""

import json

import pytest
import torch
from live_questions import chart_of, node_of

from comfyui_braid.engine.texts import told
from comfyui_braid.engine.timesteps.sampling import MODES, TimestepSampling
from comfyui_braid.engine.timesteps.stream import TimestepStream
from comfyui_braid.nodes.live_node import DecidedByTheRunError
from comfyui_braid.nodes.timesteps.nodes import NODES, BraidTimestepPreview, BraidTimestepSampling

RANGE = dict(
    min_timestep=0, max_timestep=1000, preserve_distribution_shape=False, num_timestep_buckets=0
)
PREVIEW = dict(width=1024, height=768, bins=40, samples=3000, seed=2)


def options() -> dict[str, dict]:
    """Mode -> its fields' defaults, as the browser reads them from the schema."""
    combo = BraidTimestepSampling.define_schema().inputs[0]
    return {
        option.key: {field.id: field.default for field in option.inputs} for option in combo.options
    }


def sampling_of(mode: str, **fields) -> TimestepSampling:
    combo = {"timestep_sampling": mode} | options()[mode] | fields
    return BraidTimestepSampling.execute(timestep_sampling=combo, **RANGE).result[0]


def browser_node(mode: str, **changes) -> dict:
    """A preview linked to a sampling node, as web/live/graph.js describes it."""
    fields = {f"timestep_sampling.{name}": value for name, value in options()[mode].items()}
    sampling = {"timestep_sampling": mode} | fields | RANGE | changes
    linked = {"node_id": "BraidTimestepSampling", "values": sampling, "inputs": {}}
    return {"node_id": "BraidTimestepPreview", "values": PREVIEW, "inputs": {"timesteps": linked}}


def test_the_modes_of_the_node_are_the_modes_of_the_engine_in_order():
    assert tuple(options()) == MODES


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_builds_from_its_own_fields_alone(mode):
    sampling = sampling_of(mode)
    assert sampling.mode == mode
    for name, value in options()[mode].items():
        assert getattr(sampling, name) == value


def test_a_mode_that_is_none_is_refused_with_all_that_are():
    """The host leaves a dynamic combo out when the API sent a key that it does not have."""
    with pytest.raises(ValueError, match="timestep_sampling is ''; choose one of sigma, unif"):
        BraidTimestepSampling.execute(**RANGE)


def test_every_field_and_output_has_a_tooltip():
    for node in NODES:
        schema = node.define_schema()
        combos = [i for i in schema.inputs if hasattr(i, "options") and hasattr(i, "get_all")]
        fields = [*schema.inputs, *(f for combo in combos for f in combo.get_all())]
        assert all(each.tooltip for each in [*fields, *schema.outputs])


@pytest.mark.parametrize("mode", ["sigma", "flux2_shift", "qinglong_flux"])
def test_a_preview_shows_what_the_trainer_draws_with_that_seed(mode):
    sampling = sampling_of(mode)
    image, histogram, statistics = BraidTimestepPreview.execute(sampling, **PREVIEW).result
    cells = (48, 64) if mode == "flux2_shift" else (96, 128)
    drawn = TimestepStream(sampling, 3000, 2).draw(range(3000), *cells)
    assert histogram == torch.histc(drawn, 40, 0.0, 1.0).int().tolist()
    numbers = json.loads(statistics)
    assert numbers["counts"] == histogram and len(numbers["bins"]) == 41
    assert numbers["mean"] == drawn.mean().item()
    assert image.ndim == 4 and image.shape[-1] == 3


@pytest.mark.parametrize("mode", MODES)
def test_the_live_answer_is_the_nodes_statistics_after_a_run(mode):
    answer = chart_of("timesteps", browser_node(mode, num_timestep_buckets=4))
    chosen = {"timestep_sampling": mode} | options()[mode]
    settings = RANGE | dict(num_timestep_buckets=4)
    sampling = BraidTimestepSampling.execute(timestep_sampling=chosen, **settings).result[0]
    output = BraidTimestepPreview.execute(sampling, **PREVIEW)
    assert json.loads(output.result[2]) == json.loads(json.dumps(answer["statistics"]))
    assert output.ui["braid_live"] == [told(answer)]
    json.dumps(told(answer), allow_nan=False)


def test_a_broken_setting_is_the_same_sentence_live_and_in_the_node():
    body = browser_node("shift", min_timestep=900, max_timestep=100)
    with pytest.raises(ValueError) as live:
        chart_of("timesteps", body)
    with pytest.raises(ValueError) as run:
        BraidTimestepSampling.execute(**node_of(body).inputs["timesteps"].values)
    assert str(live.value) == str(run.value)


def test_an_unlinked_preview_says_what_to_connect():
    node = browser_node("shift") | {"inputs": {}}
    assert "Connect a Timestep Sampling node" in chart_of("timesteps", node)["message"]


def test_a_runs_loss_map_is_overlaid_and_reported_per_bin():
    loss_map = {
        "loss": [torch.tensor(0.5)],
        "timesteps": [0.51, 0.52, 0.97],
        "timestep_losses": [1.0, 3.0, 4.0],
    }
    output = BraidTimestepPreview.execute(
        sampling_of("flux_shift"), **PREVIEW | dict(bins=10), loss_map=loss_map
    )
    run = json.loads(output.result[2])["run"]
    assert run["counts"] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 1]
    assert run["loss"][5] == 2.0 and run["loss"][9] == 4.0 and run["loss"][0] is None
    plain = BraidTimestepPreview.execute(sampling_of("flux_shift"), **PREVIEW | dict(bins=10))
    assert output.result[0].shape[1] > plain.result[0].shape[1]


def test_a_loss_map_of_another_trainer_is_refused():
    with pytest.raises(ValueError, match="loss_map carries no timesteps"):
        BraidTimestepPreview.execute(sampling_of("sigma"), **PREVIEW, loss_map={"loss": [0.1]})


def test_a_size_that_a_linked_node_decides_is_said_and_not_guessed():
    node = browser_node("shift") | {"values": PREVIEW | {"width": None}}
    with pytest.raises(DecidedByTheRunError, match="width comes from a linked node"):
        chart_of("timesteps", node)
