"""A file that is not what it should be: one sentence with its name, before it is used."""

import dataclasses
import json
import os
import struct

import pytest
import safetensors.torch
import torch
from ema_files import write_run
from training_runs import PLAN, make_run, train

from comfyui_braid.engine.checkpoints import find_checkpoints
from comfyui_braid.engine.disk.reading import MAX_JSON_BYTES, DamagedFileError, parse_json
from comfyui_braid.engine.ema.average import averaged, plan_average
from comfyui_braid.engine.ema.reconstruction import plan_reconstruction, reconstructed
from comfyui_braid.engine.ema.schedule import Power
from comfyui_braid.engine.ema.shadows import Shadows
from comfyui_braid.engine.files import mapped_tensors, read_header, read_tensors
from comfyui_braid.engine.fp8.source import map_tensors
from comfyui_braid.engine.magcache.plan import read_plan
from comfyui_braid.engine.network.adapter_file import read_adapter
from comfyui_braid.engine.network.architectures import DEFAULT
from comfyui_braid.engine.network.layers import LayerShape
from comfyui_braid.engine.training.states.identity import Identity
from comfyui_braid.engine.training.states.resume import resumed
from comfyui_braid.engine.training.states.state import read_state, write_state

LAYERS = {"layer": LayerShape(in_features=8, out_features=8)}
READERS = [
    read_header,
    read_tensors,
    mapped_tensors,
    read_state,
    map_tensors,
    read_plan,
    lambda path: read_adapter(path, LAYERS, DEFAULT),
]


def container(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("what", ["a folder", "a pipe", "a device"])
def test_what_is_no_regular_file_is_refused_at_once_by_every_reader(read, what, tmp_path):
    path = tmp_path / "odd.safetensors"
    match what:
        case "a folder":
            path.mkdir()
        case "a pipe":
            os.mkfifo(path)
        case "a device":
            path.symlink_to("/dev/zero")
    with pytest.raises(DamagedFileError, match="odd.safetensors: not a file with contents"):
        read(path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ({"a": ENTRY | {"dtype": "F33"}}, "a has dtype 'F33', which Braid does not read"),
        ({"a": ENTRY | {"shape": [True, 2]}}, r"a has shape \[True, 2\]"),
        ({"a": ENTRY | {"shape": [-2]}}, r"a has shape \[-2\]"),
        ({"a": ENTRY | {"shape": [2.0]}}, r"a has shape \[2.0\]"),
        ({"a": ENTRY | {"shape": [2**62, 0, 2**62], "data_offsets": [0, 0]}}, "a has shape"),
        ({"a": ENTRY | {"shape": [1] * 1000 + [2]}}, "a has shape"),
        ({"a": ENTRY | {"shape": [3]}}, r"takes 8 bytes where F32 of shape \(3,\) takes 12"),
        ({"a": ENTRY, "b": ENTRY}, "b starts at byte .*, the one before ends at"),
        ({"a": ENTRY | {"data_offsets": [4, 12]}}, "a starts at byte"),
        ({"a\nb": ENTRY}, r"a tensor is called 'a\\nb'"),
        ({"a" * 600: ENTRY}, "a tensor is called 'aaa"),
        ({"a": ENTRY, "__metadata__": {"\ud800": ""}}, r"its metadata '\\ud800' is no text"),
        ({"a": ENTRY | {"shape": [10**50]}}, "a number of 51 digits"),
        (b'{"a":1,"a":1}', "JSON that says 'a' twice"),
        (b"[" * 100_000, "more than 3 brackets in each other"),
        (b'{"\xff":1}', "byte 2 is no UTF-8"),
        (b"{} x", "Extra data in line 1, column 4"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_header_that_lies_is_refused_with_the_reason(header, sentence, tmp_path):
    path = container(tmp_path / "odd.safetensors", header, bytes(8))
    with pytest.raises(DamagedFileError, match=f"odd.safetensors: .*{sentence}"):
        read_header(path)


def test_bytes_that_no_tensor_has_are_refused_and_so_are_missing_ones(tmp_path):
    for data, sentence in ((bytes(9), "1 bytes follow its last one"), (bytes(7), "cut short")):
        path = container(tmp_path / "odd.safetensors", {"a": ENTRY}, data)
        with pytest.raises(DamagedFileError, match=f"odd.safetensors: .*{sentence}"):
            read_header(path)


@pytest.mark.parametrize("piece", [b"[],", b'{"a":', b"1e1,"], ids=repr)
@pytest.mark.parametrize("size", [MAX_JSON_BYTES - 100, 100_000_000])
def test_a_header_of_a_hundred_megabytes_takes_no_more_memory_than_a_few_times_its_text(
    piece, size, tmp_path
):
    harness = pytest.importorskip("fuzz.harness", reason="children are made by fork")
    from fuzz.target import Target

    path = container(tmp_path / "damaged.safetensors", b'{"a":[' + piece * (size // len(piece)))
    target = Target(
        name="bomb", make=lambda rng: path, read=lambda path, _: read_header(path), is_file=True
    )
    tally = harness.fuzz(target, range(1), tmp_path)
    assert tally.failures == [] and tally.counts["refused"] == 1
    assert tally.peak_bytes < 300 << 20


def test_brackets_inside_texts_are_no_depth():
    document = {"a": "[[[[{{{{" * 100, 'b"\\': ['\\"[[[', "\\"]}
    assert parse_json(json.dumps(document), deepest=2) == document
    with pytest.raises(ValueError, match="more than 1 brackets"):
        parse_json(json.dumps(document), deepest=1)


RUN = dataclasses.replace(PLAN, steps=4)


@pytest.fixture(scope="module")
def saved_state():
    run, model = make_run(RUN)
    train(run, model, until=2)
    return {"identity": {"seed": 7}, "run": run.state_dict()}


def changed(state, path, value):
    """A copy of nested dicts in which one entry is another one, or, for KeyError, missing."""
    if not path:
        return value
    copy = dict(state)
    copy[path[0]] = changed(state[path[0]], path[1:], value)
    return {k: v for k, v in copy.items() if v is not KeyError}


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (["run"], KeyError, "damaged .it holds no run"),
        (["identity"], [1], "damaged .it holds no identity"),
        (["run", "step"], KeyError, "damaged .its step is None"),
        (["run", "step"], "2", "damaged .its step is '2'"),
        (["run", "step"], -1, "damaged .its step is -1"),
        (["run", "network"], KeyError, "does not fit this run .it holds no network"),
        (["run", "network"], {}, "network: '.*' is only in this run"),
        (["run", "history", "samples"], torch.zeros(3), "its samples are no table"),
        (["run", "history", "sample_counts"], torch.tensor([-1, 5]), "of different lengths"),
        (["run", "timesteps", "visits"], None, "hold no visits"),
        (["run", "timesteps", "visits"], torch.tensor([0, 10**12, 0, 0, 0]), "10+ visits"),
        (["run", "timesteps", "seed"], None, "seed None, this run has 7"),
        (["run", "optimizer", "optimizer"], [], "it holds no optimizer"),
        (["run", "optimizer", "optimizer", "state"], {10**6: {}}, "state of parameter 1000000"),
        (["run", "optimizer", "optimizer", "state"], {0: 1}, "state of parameter 0"),
        (["run", "optimizer", "optimizer", "param_groups"], [{}, {}], "it has others"),
        (["run", "optimizer", "schedule", "last_epoch"], 0.5, "last_epoch is 0.5"),
        (["run", "optimizer", "schedule", "base_lrs"], ["x"], "schedule/base_lrs/0 is 'x'"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_state_with_a_good_checksum_and_another_form_is_refused_in_one_sentence(
    path, value, sentence, saved_state, tmp_path
):
    file = tmp_path / "run-step00000002.state"
    write_state(file, changed(saved_state, path, value))
    run, _ = make_run(RUN)
    with pytest.raises(ValueError, match=rf"run-step00000002.state\b.*{sentence}") as refusal:
        resumed(run, file, Identity(named={"seed": 7}))
    assert str(refusal.value).isprintable()


def test_settings_of_an_optimizer_that_an_older_version_did_not_save_are_this_runs(
    saved_state, tmp_path
):
    """torch adds some with its versions; the schedule's fields are never taken from a file."""
    groups = saved_state["run"]["optimizer"]["optimizer"]["param_groups"]
    older = [{k: v for k, v in group.items() if k != "betas"} for group in groups]
    state = changed(saved_state, ["run", "optimizer", "optimizer", "param_groups"], older)
    schedule = state["run"]["optimizer"]["schedule"] | {"step": "not to be called", "new": 1}
    state = changed(state, ["run", "optimizer", "schedule"], schedule)
    write_state(tmp_path / "run.state", state)
    run, model = make_run(RUN)
    resumed(run, tmp_path / "run.state", Identity(named={"seed": 7}))
    assert run.optimization.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert set(train(run, model)) and run.step == 4


def test_of_two_long_settings_the_part_that_differs_is_shown(saved_state, tmp_path):
    was, now = (f"Spec({'a=1, ' * 200}rank={rank}, {'b=2, ' * 200})" for rank in (8, 16))
    write_state(tmp_path / "x.state", saved_state | {"identity": {"network": was}})
    with pytest.raises(ValueError, match=r"network …[ a=1,]*rank=8, .*has …[ a=1,]*rank=16, ") as r:
        resumed(make_run(RUN)[0], tmp_path / "x.state", Identity(named={"network": now}))
    assert len(str(r.value)) < 600


def save(path, tensors, **metadata):
    safetensors.torch.save_file(tensors, path, metadata or None)
    return path


DOWN, UP = torch.ones(2, 8), torch.ones(8, 2)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"lora_down.weight": DOWN, "lora_up.weight": torch.ones(8, 3)}, "ranks 3 and 2"),
        ({"lora_down.weight": torch.ones(8), "lora_up.weight": UP}, "no matrix of numbers"),
        ({"lora_down.weight": DOWN.int(), "lora_up.weight": UP}, "no matrix of numbers"),
        (
            {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.ones(2)},
            "not one number",
        ),
        (
            {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.tensor(torch.inf)},
            r"\[inf\], not one number",
        ),
        (
            {"lokr_w1_a": torch.ones(9000, 1), "lokr_w1_b": torch.ones(1, 9000)},
            "would be 9000 × 9000",
        ),
    ],
)
def test_an_adapter_whose_factors_do_not_fit_is_refused_with_the_files_name(
    tensors, sentence, tmp_path
):
    named = {f"lora_unet_layer.{key}": tensor for key, tensor in tensors.items()}
    path = save(tmp_path / "odd.safetensors", named)
    with pytest.raises(DamagedFileError, match=f"odd.safetensors: .*{sentence}"):
        read_adapter(path, LAYERS, DEFAULT)


def test_checkpoints_that_cannot_be_averaged_say_so_with_the_files_name(tmp_path):
    stem = "lora_unet_a"
    whole = {f"{stem}.lora_down.weight": DOWN, f"{stem}.lora_up.weight": UP}
    for other, sentence in (
        ({f"{stem}.alpha": torch.tensor([1.0, 2.0])}, "alpha has shape .2,., not that of one"),
        ({f"{stem}.alpha": torch.tensor(torch.nan)}, "alpha holds nan"),
        ({f"{stem}.lora_up.weight": torch.ones(8, 3)}, "no rank in common"),
    ):
        path = save(tmp_path / "odd.safetensors", whole | other, ss_steps="9" * 5000)
        plan = plan_average(find_checkpoints(tmp_path), Power(sigma_rel=0.2), sort="given")
        with pytest.raises(DamagedFileError, match=f"{path.name}: .*{sentence}"):
            list(averaged(plan, "product"))


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("step", "x", "says of itself"),
        ("step", 0, "says of itself"),
        ("sigma_rels", [0.1, 0.1], r"sigma_rels are \[0.1, 0.1\]"),
        ("sigma_rels", [0.1, None], "sigma_rels are"),
        ("sigma_rels", [0.4], "0.4 has no average"),
        ("sigma_rels", [0.1, 0.2], "not float32 of one shape in every width"),
        ("format", 2, "they are of format 2"),
    ],
)
def test_shadows_that_say_what_is_not_so_are_refused_by_name(field, value, sentence, tmp_path):
    write_run(tmp_path, 2)
    shadows, path = Shadows({"a": torch.ones(2, 3)}, (0.1,)), tmp_path / "run-shadows.safetensors"
    shadows.catch_up(10)
    shadows.write(path, {}, {})
    said = json.loads(read_header(path).metadata["braid.shadows"]) | {field: value}
    save(path, read_tensors(path), **{"braid.shadows": json.dumps(said)})
    run = find_checkpoints(tmp_path)
    with pytest.raises(DamagedFileError, match=f"run-shadows.safetensors: .*{sentence}"):
        list(reconstructed(run, plan_reconstruction(run, 0.1)))
