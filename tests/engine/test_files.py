import importlib.util
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from comfyui_braid.engine import files
from comfyui_braid.engine.disk.hashes import SshsHasher
from comfyui_braid.engine.disk.writing import replaced_when_whole
from comfyui_braid.engine.files import (
    DTYPES,
    header_bytes,
    read_tensors,
    saved_layout,
    write_safetensors,
)

GOLDEN = Path(__file__).parent.parent / "goldens" / "ema_musubi.json"


def test_a_file_is_flushed_through_a_handle_that_may_write_as_windows_demands(
    tmp_path, monkeypatch
):
    fcntl = pytest.importorskip("fcntl")  # Unix
    modes = []
    monkeypatch.setattr(os, "fsync", lambda fd: modes.append(fcntl.fcntl(fd, fcntl.F_GETFL)))
    with replaced_when_whole(tmp_path / "file") as file:
        file.write(b"whole")
    assert [mode & os.O_ACCMODE for mode in modes] == [os.O_RDWR]
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_tensors_that_were_read_stay_as_they_are_when_their_file_is_written_over(tmp_path):
    path = tmp_path / "lora.safetensors"
    write_safetensors(path, {"down": torch.ones(64, 64)}, {})
    read = read_tensors(path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\xff" * size)
    assert read["down"].eq(1).all()


def test_the_dtypes_are_those_that_an_older_torch_has_too(monkeypatch):
    monkeypatch.delattr(torch, "float8_e8m0fnu", raising=False)  # new in torch 2.7
    spec = importlib.util.spec_from_file_location("comfyui_braid.engine.older", files.__file__)
    older_files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(older_files)
    expected = {name: dtype for name, dtype in files.DTYPES.items() if name != "F8_E8M0"}
    assert older_files.DTYPES == expected


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
    golden = json.loads(GOLDEN.read_text())["hashes"]["hash_big"]
    values = torch.arange(600000, dtype=torch.float32)
    hasher = SshsHasher(saved_layout({"w": ("F32", (600000,))}), {"ss_x": "1", "other": "y"})
    for chunk in values.split(7777):
        hasher.update(memoryview(chunk.numpy()).cast("B"))
    assert hasher.hashes() == {
        "sshs_model_hash": golden["model_hash"],
        "sshs_legacy_hash": golden["legacy_hash"],
    }
