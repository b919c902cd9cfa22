import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from ema_files import ALPHA, DOWN, UP, adapter, average_of, checkpoints, finish, save, write_run
from full_disk import NO_ROOM, files_below, largest_file

from comfyui_braid.engine.checkpoints import find_checkpoints
from comfyui_braid.engine.ema import merge as merge_module
from comfyui_braid.engine.ema.merge import merged_tensors, prepare_merge, write_merged
from comfyui_braid.engine.ema.schedule import BetaRamp, MusubiPower, Power
from comfyui_braid.engine.files import (
    DTYPES,
    header_bytes,
    read_header,
    saved_layout,
)
from comfyui_braid.engine.hashes import SshsHasher, sshs_hashes
from comfyui_braid.engine.writing import NotWrittenError

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


def _pair(tmp_path, one, other):
    return [save(tmp_path / "one.safetensors", one), save(tmp_path / "other.safetensors", other)]


HALF = BetaRamp(beta=0.5, beta2=0.5)


def test_files_without_metadata_get_hashes_as_musubi_gives(tmp_path):
    paths = _pair(tmp_path, adapter(0), adapter(1))
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
    merged = average_of(checkpoints(_pair(tmp_path / "a", one, other)), HALF, sort="given").lora
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
        merged = average_of(checkpoints(_pair(folder, *pair)), HALF, sort="given").lora
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
    merged = average_of(checkpoints(_pair(tmp_path, one, other)), HALF, sort="given").lora
    assert merged[ALPHA].dtype == torch.int64 and int(merged[ALPHA]) == 4
    other[ALPHA] = torch.tensor(4.0)  # one file converted, one not
    merged = average_of(checkpoints(_pair(tmp_path, one, other)), HALF, sort="given").lora
    assert merged[ALPHA].dtype == torch.int64
    assert torch.allclose(merged[UP], (one[UP] + other[UP]) / 2)


def test_integer_tensors_come_from_the_first_file_as_in_musubi_and_else_from_the_last(tmp_path):
    one, other = adapter(0) | {"n": torch.tensor([1])}, adapter(0) | {"n": torch.tensor([2])}
    run = checkpoints(_pair(tmp_path, one, other), [1, 2])
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


def test_layout_and_header_are_those_of_safetensors_for_every_dtype():
    tensors = {
        f"{name}é{i}": torch.zeros(i + 1, 2).to(dtype)
        for i, (name, dtype) in enumerate(reversed(DTYPES.items()))
    }
    names = {dtype: name for name, dtype in DTYPES.items()}
    layout = saved_layout({k: (names[v.dtype], tuple(v.shape)) for k, v in tensors.items()})
    for metadata in ({}, {"ss_text": 'quote " back \\ line \n tab \t bell \x07 ünï 💡'}):
        theirs = safetensors.torch.save(tensors, metadata)
        ours = header_bytes(layout, metadata)
        assert theirs[: len(ours)] == ours
        assert int.from_bytes(theirs[:8], "little") == len(ours) - 8


def test_streamed_hashes_are_those_of_the_golden():
    golden = GOLDEN["hashes"]["hash_big"]
    values = torch.arange(600000, dtype=torch.float32)
    hasher = SshsHasher(saved_layout({"w": ("F32", (600000,))}), {"ss_x": "1", "other": "y"})
    for chunk in values.split(7777):
        hasher.update(memoryview(chunk.numpy()).cast("B"))
    assert hasher.hashes() == {
        "sshs_model_hash": golden["model_hash"],
        "sshs_legacy_hash": golden["legacy_hash"],
    }


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
    paths = _pair(tmp_path, adapter(0), spoil(adapter(0)))
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


def test_huge_but_finite_values_are_merged(tmp_path):
    huge = {DOWN: torch.full((4, 100), 3e38), UP: torch.full((100, 4), 3e38)}
    merged = average_of(checkpoints(_pair(tmp_path, huge, huge)), HALF, sort="given").lora
    assert torch.equal(merged[UP], huge[UP])


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


def test_a_disk_that_fills_up_in_the_middle_ends_the_merge_and_leaves_no_file(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(merge_module, "CHUNK_ELEMENTS", 20)
    merge = prepare_merge(write_run(tmp_path / "run", 2), [0.5], like_musubi=False)
    finish(write_merged(merge, tmp_path / "whole.safetensors"))
    size = (tmp_path / "whole.safetensors").stat().st_size
    steps = write_merged(merge, tmp_path / "out" / "ema.safetensors")
    with largest_file(size - 100), pytest.raises(NotWrittenError, match=f"ema.*{NO_ROOM}"):
        finish(steps)
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_ends_a_product_average_and_leaves_no_file(tmp_path):
    run = checkpoints(write_run(tmp_path / "run", 2), [100, 200])
    output = tmp_path / "out" / "ema.safetensors"
    with largest_file(500), pytest.raises(NotWrittenError, match=f"ema.*{NO_ROOM}"):
        average_of(run, HALF, output, space="product")
    assert files_below(output.parent) == {}


def test_a_file_is_opened_a_few_times_however_many_alphas_it_has(tmp_path, monkeypatch):
    opened, open_ = [], Path.open

    def counted(path, *args, **kwargs):
        opened.append(path)
        return open_(path, *args, **kwargs)

    few, many = (write_run(tmp_path / str(n), 2, modules=n) for n in (2, 20))
    monkeypatch.setattr(Path, "open", counted)
    counts = []
    for index, paths in enumerate((few, many)):
        opened.clear()
        merge = prepare_merge(paths, [0.5], like_musubi=True)
        finish(write_merged(merge, tmp_path / f"{index}.safetensors"))
        counts.append(len(opened))
    assert counts[0] == counts[1]


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


def test_closing_the_merge_half_way_leaves_no_file_and_keeps_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setattr(merge_module, "CHUNK_ELEMENTS", 5)
    merge = prepare_merge(write_run(tmp_path, 2), [0.5], like_musubi=False)
    output = tmp_path / "out" / "ema.safetensors"
    output.parent.mkdir()
    for old in (None, b"the old one"):
        if old:
            output.write_bytes(old)
        steps = write_merged(merge, output)
        assert 0 < next(steps).done < next(steps).done
        steps.close()
        assert [p.read_bytes() for p in output.parent.iterdir()] == ([old] if old else [])


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {tests!r} + "/engine"]
import conftest
from comfyui_braid.engine.ema import merge
merge.CHUNK_ELEMENTS = 5
steps = merge.write_merged(
    merge.prepare_merge([Path(p) for p in {paths!r}], [0.5], like_musubi=False), Path({output!r})
)
next(steps), next(steps)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_killed_process_leaves_no_file_that_could_be_taken_for_an_adapter(tmp_path):
    paths = [str(path) for path in write_run(tmp_path, 2)]
    output = tmp_path / "out" / "ema.safetensors"
    script = KILLED.format(tests=str(TESTS), paths=paths, output=str(output))
    killed = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -signal.SIGKILL
    assert list(output.parent.iterdir()) and not list(output.parent.glob("*.safetensors"))


def test_progress_goes_up_to_all_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(merge_module, "CHUNK_ELEMENTS", 20)
    merge = prepare_merge(write_run(tmp_path, 3), [0.5, 0.5], like_musubi=True)
    _, seen = finish(merged_tensors(merge))
    assert [p.done for p in seen] == sorted(p.done for p in seen) and len(seen) > 3
    assert seen[-1].done == seen[-1].total


def test_the_number_of_threads_is_given_back(tmp_path):
    before = torch.get_num_threads()
    average_of(checkpoints(write_run(tmp_path, 2), [1, 2]), HALF)
    assert torch.get_num_threads() == before


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
