"""What a merge refuses, by file and key, with nothing written."""

import json

import pytest
import safetensors.torch
import torch
from ema_files import ALPHA, HALF, UP, adapter, average_of, checkpoints, save, save_pair, write_run

from comfyui_braid.engine.checkpoints import find_checkpoints
from comfyui_braid.engine.ema.schedule import MusubiPower, Power


def _without(key):
    return lambda tensors: {k: v for k, v in tensors.items() if k != key}


def _with(key, value):
    return lambda tensors: tensors | {key: value}


NAN = torch.full((10, 4), float("nan"))


REFUSALS = {
    "a key that the other file lacks": (_with("lora_unet_z.lora_up.weight", torch.ones(2)), "_z"),
    "a key that is missing": (_without(UP), UP),
    "an alpha that is missing": (_without(ALPHA), ALPHA),
    "another shape": (_with(UP, torch.ones(3, 4)), UP),
    "a shape that would broadcast": (_with(UP, torch.ones(10, 1)), UP),
    "another alpha": (_with(ALPHA, torch.tensor(8.0)), ALPHA),
    "NaN": (_with(UP, NAN), UP),
    "infinity": (_with(UP, torch.full((10, 4), float("-inf"))), UP),
    "integers where the other has numbers": (_with(UP, torch.ones(10, 4, dtype=torch.int32)), UP),
    "a dtype that is no number": (_with(UP, torch.ones(10, 4, dtype=torch.complex64)), UP),
}


@pytest.mark.parametrize("space", ["factors", "product"])
@pytest.mark.parametrize("name", REFUSALS)
def test_files_that_do_not_fit_are_refused_by_file_and_key_and_nothing_is_written(
    name, space, tmp_path
):
    spoil, key = REFUSALS[name]
    paths = save_pair(tmp_path, adapter(0), spoil(adapter(0)))
    output = tmp_path / "made" / "out.safetensors"
    for schedule in (HALF, Power(sigma_rel=0.2)):
        with pytest.raises(ValueError) as refusal:
            average_of(checkpoints(paths, [1, 2]), schedule, output, space=space)
        assert key in str(refusal.value)
        assert "one.safetensors" in str(refusal.value) or "other.safetensors" in str(refusal.value)
    assert not output.parent.exists() or not list(output.parent.iterdir())


def test_a_not_finite_value_is_found_in_the_file_that_holds_it_whatever_its_weight(tmp_path):
    paths = write_run(tmp_path, 4)
    bad = safetensors.torch.load_file(paths[0])
    bad[UP][9, 3] = float("inf")
    save(paths[0], bad)
    with pytest.raises(ValueError, match=r"step00000100.*lora_up.*inf"):
        average_of(checkpoints(paths, [1, 2, 3, 4]), MusubiPower(sigma_rel=0.2))


def test_a_truncated_file_and_a_file_of_something_else_are_refused(tmp_path):
    paths = write_run(tmp_path, 3)
    whole = paths[1].read_bytes()
    output = tmp_path / "out.safetensors"
    for spoiled in (whole[:-5], whole[:100], b"", b"not safetensors at all", b"\0" * 64):
        paths[1].write_bytes(spoiled)
        with pytest.raises(ValueError, match=paths[1].name):
            average_of(checkpoints(paths, [1, 2, 3]), HALF, output)
    save(paths[1], {"model.diffusion_model.input_blocks.0.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="not a LoRA file.*input_blocks"):
        average_of(checkpoints(paths, [1, 2, 3]), HALF, output)
    assert not output.exists()


def test_a_header_that_lies_about_a_size_is_refused(tmp_path):
    path = write_run(tmp_path, 1)[0]
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"shape":[10,4]', b'"shape":[10,3]', 1))
    with pytest.raises(ValueError, match=r"lora_up.*takes 160 bytes.*takes 120.*damaged"):
        average_of(checkpoints([path]), HALF, sort="given")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        [],
        None,
        {UP: [1]},
        {UP: {"shape": [2], "data_offsets": [0, 8]}},
        {UP: {"dtype": "F32", "shape": [2]}},
        {UP: ENTRY | {"data_offsets": [0, 8, 9]}},
        {UP: ENTRY | {"data_offsets": [-8, 0]}},
        {UP: ENTRY | {"data_offsets": [8, 0]}},
        {"__metadata__": [1], UP: ENTRY},
        {"__metadata__": {"ss_steps": 5}, UP: ENTRY},
    ],
    ids=json.dumps,
)
def test_a_file_with_a_header_that_is_none_is_refused_by_name(header, tmp_path):
    text = json.dumps(header).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match="odd.safetensors: not a safetensors file.*damaged"):
        find_checkpoints(tmp_path)


def test_a_file_that_was_deleted_since_is_named(tmp_path):
    paths = write_run(tmp_path, 2)
    paths[0].unlink()
    with pytest.raises(ValueError, match="step00000100.safetensors: is gone"):
        average_of(checkpoints(paths, [100, 200]), HALF)


def test_an_output_that_is_one_of_the_inputs_is_refused(tmp_path):
    paths = write_run(tmp_path, 2)
    before = paths[0].read_bytes()
    with pytest.raises(ValueError, match="one of the files to merge"):
        average_of(checkpoints(paths, [1, 2]), HALF, paths[0])
    assert paths[0].read_bytes() == before
