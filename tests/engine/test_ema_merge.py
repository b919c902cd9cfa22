"""A merge of checkpoints: musubi's bit for bit, and ours by what the report says."""

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from ema_files import (
    ALPHA,
    DOWN,
    HALF,
    UP,
    adapter,
    average_of,
    checkpoints,
    save,
    save_pair,
    write_run,
)

from comfyui_braid.engine.disk.hashes import sshs_hashes
from comfyui_braid.engine.ema import merge as merge_module
from comfyui_braid.engine.ema.schedule import BetaRamp, MusubiPower, Power
from comfyui_braid.engine.files import (
    read_header,
)

TESTS = Path(__file__).parent.parent
GOLDEN = json.loads((TESTS / "goldens" / "ema_musubi.json").read_text())
GOLDEN_DTYPES = {
    f"torch.{name}": getattr(torch, name) for name in ("float32", "float16", "bfloat16")
}


def _schedule(settings):
    if settings["sigma_rel"] is not None:
        return MusubiPower(sigma_rel=settings["sigma_rel"])
    return BetaRamp(beta=settings["beta"], beta2=settings["beta2"])


@pytest.mark.parametrize("in_memory", [False, True], ids=["file", "memory"])
@pytest.mark.parametrize(
    "case", GOLDEN["merged_tensors"]["cases"], ids=lambda c: str(c["settings"])
)
def test_merge_is_musubis_bit_for_bit_with_metadata_and_hashes(case, in_memory, tmp_path):
    dtype, paths = GOLDEN_DTYPES[case["dtype"]], []
    for index, values in enumerate(case["inputs"]):
        tensors = {
            key: torch.tensor(value, dtype=torch.float64).reshape(case["shapes"][key])
            for key, value in values.items()
        }
        tensors = {k: v.to(torch.int64 if k == "counter" else dtype) for k, v in tensors.items()}
        metadata = {"modelspec.title": "t", "ss_output_name": "run"}
        if index == 0:
            metadata = case["first_input_metadata"]
        elif index == len(case["inputs"]) - 1:
            metadata |= case["last_input_metadata_kept"] | {"sshs_model_hash": "old"}
        paths.append(save(tmp_path / f"{index}.safetensors", tensors, **metadata))
    output = tmp_path / "out.safetensors"
    average = average_of(
        checkpoints(paths), _schedule(case["settings"]), None if in_memory else output, sort="given"
    )
    for key, expected in case["output"].items():
        got = average.lora[key]
        assert str(got.dtype) == expected["dtype"]
        assert got.double().flatten().tolist() == expected["values"]
    assert average.lora.keys() == case["output"].keys()
    if not in_memory:
        assert read_header(output).metadata == case["output_metadata"]


def test_files_without_metadata_get_hashes_as_musubi_gives(tmp_path):
    paths = save_pair(tmp_path, adapter(0), adapter(1))
    output = tmp_path / "out.safetensors"
    average_of(checkpoints(paths), HALF, output, sort="given")
    assert set(read_header(output).metadata) == set(
        GOLDEN["inputs_without_metadata"]["output_metadata"]
    )


def test_one_file_is_copied_through(tmp_path):
    path = save(tmp_path / "one.safetensors", adapter(dtype=torch.float16), ss_steps="5")
    for schedule in (HALF, Power(sigma_rel=0.2), MusubiPower(sigma_rel=0.2)):
        merged = average_of(checkpoints([path]), schedule, sort="given").lora
        assert all(torch.equal(merged[k], v) for k, v in safetensors.torch.load_file(path).items())


def test_nearly_equal_alphas_keep_the_first_and_other_dtypes_mix_as_in_musubi(tmp_path):
    expected = {
        c["case"]: c["output"] for c in GOLDEN["mismatch_behaviour_beta_0.5_two_files"] if c["ok"]
    }
    one, other = adapter(0), adapter(1)
    one[ALPHA], other[ALPHA] = torch.tensor(8.0), torch.tensor(8.00001)
    (tmp_path / "a").mkdir()
    merged = average_of(checkpoints(save_pair(tmp_path / "a", one, other)), HALF, sort="given").lora
    assert merged[ALPHA].tolist() == expected["alpha almost equal (8 vs 8.00001)"]["m.alpha"][1][0]
    for dtypes, name in (
        ((torch.float32, torch.float16), "later file has other dtype (fp32 first, fp16 later)"),
        ((torch.float16, torch.float32), "first fp16, later fp32"),
    ):
        folder = tmp_path / str(dtypes[0])
        folder.mkdir()
        pair = [
            {DOWN: torch.tensor([value]).to(d)} for value, d in zip((1.0, 0.1), dtypes, strict=True)
        ]
        merged = average_of(checkpoints(save_pair(folder, *pair)), HALF, sort="given").lora
        assert [str(merged[DOWN].dtype), merged[DOWN].tolist()] == expected[name]["a"]


def test_our_own_method_says_what_it_was_merged_from_and_follows_the_last_file(tmp_path):
    paths = write_run(tmp_path, 3)
    tensors = safetensors.torch.load_file(paths[-1])
    save(paths[-1], {k: v.half() for k, v in tensors.items()}, ss_steps="300", ss_tag='é\n"x"')
    output = tmp_path / "out.safetensors"
    merged = average_of(checkpoints(paths, [100, 200, 300]), Power(sigma_rel=0.2), output).lora
    metadata = read_header(output).metadata
    assert metadata["modelspec.merged_from"] == ", ".join(path.stem for path in paths)
    assert metadata["ss_steps"] == "300" and metadata["ss_tag"] == 'é\n"x"'
    assert {v.dtype for v in merged.values()} == {torch.float16}
    loaded = safetensors.torch.load_file(output)
    assert {k: metadata[k] for k in ("sshs_model_hash", "sshs_legacy_hash")} == sshs_hashes(
        loaded, metadata
    )
    assert merged.metadata == {k: v for k, v in metadata.items() if not k.startswith("sshs_")}


def test_weights_are_what_the_report_says(tmp_path):
    paths = write_run(tmp_path, 5)
    average = average_of(checkpoints(paths, [100, 200, 300, 400, 500]), Power(sigma_rel=0.15))
    expected = sum(
        w * safetensors.torch.load_file(p)[UP].double()
        for w, p in zip(average.report["weights"], paths, strict=True)
    )
    assert torch.allclose(average.lora[UP].double(), expected, atol=1e-6)
    assert average.report["files"] == [p.name for p in paths]


def test_integer_alphas_of_converted_files_are_kept(tmp_path):
    one, other = adapter(0), adapter(1)
    for tensors in (one, other):
        tensors[ALPHA] = torch.tensor(4, dtype=torch.int64)
    merged = average_of(checkpoints(save_pair(tmp_path, one, other)), HALF, sort="given").lora
    assert merged[ALPHA].dtype == torch.int64 and int(merged[ALPHA]) == 4
    other[ALPHA] = torch.tensor(4.0)  # one file converted, one not
    merged = average_of(checkpoints(save_pair(tmp_path, one, other)), HALF, sort="given").lora
    assert merged[ALPHA].dtype == torch.int64
    assert torch.allclose(merged[UP], (one[UP] + other[UP]) / 2)


def test_integer_tensors_come_from_the_first_file_as_in_musubi_and_else_from_the_last(tmp_path):
    one, other = adapter(0) | {"n": torch.tensor([1])}, adapter(0) | {"n": torch.tensor([2])}
    run = checkpoints(save_pair(tmp_path, one, other), [1, 2])
    assert int(average_of(run, HALF).lora["n"]) == 1
    assert int(average_of(run, Power(sigma_rel=0.2)).lora["n"]) == 2


@pytest.mark.parametrize("chunk", [1, 3, 7, 1 << 18])
def test_the_size_of_a_chunk_and_the_order_of_tensors_in_a_file_change_nothing(
    chunk, tmp_path, monkeypatch
):
    paths = write_run(tmp_path, 3, dtype=torch.bfloat16)
    expected = average_of(checkpoints(paths, [1, 2, 3]), HALF).lora
    shuffled = _with_tensors_reversed(paths[1], tmp_path / "shuffled.safetensors")
    monkeypatch.setattr(merge_module, "CHUNK_ELEMENTS", chunk)
    for middle in (paths[1], shuffled):
        merged = average_of(checkpoints([paths[0], middle, paths[2]], [1, 2, 3]), HALF).lora
        assert all(torch.equal(merged[key], expected[key]) for key in expected)


def _with_tensors_reversed(path, output):
    """The same file with its tensors in the opposite order, which safetensors allows."""
    header, raw = read_header(path), path.read_bytes()
    described, data = {"__metadata__": header.metadata}, b""
    for key, entry in reversed(header.tensors.items()):
        piece = raw[entry.start : entry.end]
        described[key] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [len(data), len(data) + len(piece)],
        }
        data += piece
    text = json.dumps(described).encode()
    output.write_bytes(struct.pack("<Q", len(text)) + text + data)
    assert safetensors.torch.load_file(output).keys() == header.tensors.keys()
    return output


def test_hashes_of_a_merged_file_are_those_of_a_whole_serialisation(tmp_path):
    big = {"w.lora_down.weight": torch.arange(600000, dtype=torch.float32)}
    path = save(tmp_path / "big.safetensors", big, ss_long="x" * 1234, other="y")
    output = tmp_path / "out.safetensors"
    average_of(checkpoints([path]), HALF, output, sort="given")
    metadata = read_header(output).metadata
    expected = sshs_hashes(big, {"ss_long": "x" * 1234})
    assert metadata["sshs_legacy_hash"] == expected["sshs_legacy_hash"] != "e3b0c442"
    assert metadata["sshs_model_hash"] == expected["sshs_model_hash"]
    data = output.read_bytes()[read_header(output).data_start :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()


def test_huge_but_finite_values_are_merged(tmp_path):
    huge = {DOWN: torch.full((4, 100), 3e38), UP: torch.full((100, 4), 3e38)}
    merged = average_of(checkpoints(save_pair(tmp_path, huge, huge)), HALF, sort="given").lora
    assert torch.equal(merged[UP], huge[UP])


def test_merging_copies_touched_or_shuffled_files_gives_the_same_file(tmp_path):
    paths = write_run(tmp_path / "run", 4)
    run = checkpoints(paths, [100, 200, 300, 400])
    average_of(run, Power(sigma_rel=0.2), tmp_path / "a.safetensors")
    copies = []
    for index, path in enumerate(reversed(paths)):
        copies.append(tmp_path / "copies" / path.name)
        copies[-1].parent.mkdir(exist_ok=True)
        shutil.copy(path, copies[-1])
        os.utime(copies[-1], (1e9 + index, 1e9 + index))
    average_of(
        checkpoints(copies, [400, 300, 200, 100]), Power(sigma_rel=0.2), tmp_path / "b.safetensors"
    )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
