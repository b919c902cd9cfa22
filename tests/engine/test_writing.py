"""Files are whole or absent, a failure is one sentence, and what a killed process leaves goes."""

import errno
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from full_disk import files_below, largest_file

from comfyui_braid.engine import files
from comfyui_braid.engine.disk.writing import (
    NotWrittenError,
    failures_said,
    in_bytes,
    remove_leftovers,
    replaced_when_whole,
)
from comfyui_braid.engine.files import read_header, write_safetensors

TENSORS = {"a": torch.arange(5000.0), "b": torch.ones(3)}
TESTS = Path(__file__).resolve().parent.parent


def test_a_full_disk_is_one_sentence_with_the_numbers_and_the_old_file_stays(tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"old")
    with largest_file(4096), pytest.raises(NotWrittenError) as refusal:
        write_safetensors(path, TENSORS, {})
    sentence = str(refusal.value)
    assert sentence.startswith(f"{path} could not be written: File too large (it takes 19.7 KiB, ")
    assert "4.0 KiB); save it where" in sentence and "\n" not in sentence
    assert isinstance(refusal.value, OSError)
    assert files_below(tmp_path) == {"lora.safetensors": b"old"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_no_space_left_says_what_it_takes_and_what_is_free(tmp_path):
    path = tmp_path / "model.safetensors"
    with (
        pytest.raises(NotWrittenError, match=r"No space left on device \(it takes 3.0 GiB and .*"),
        failures_said(path, 3 * 2**30),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")


def test_a_folder_that_takes_no_files_is_said_in_one_sentence(tmp_path):
    (tmp_path / "taken").write_bytes(b"a file")
    with (
        pytest.raises(NotWrittenError, match=r"taken/x could not be written: .*; look after"),
        replaced_when_whole(tmp_path / "taken" / "x"),
    ):
        pass


def test_what_fails_beside_the_writing_is_passed_on_as_it_is_and_leaves_nothing(tmp_path):
    for error in (ValueError("of the work"), FileNotFoundError(errno.ENOENT, "no source")):
        with pytest.raises(type(error)) as passed, replaced_when_whole(tmp_path / "x") as file:
            file.write(b"half")
            raise error
        assert passed.value is error
    assert files_below(tmp_path) == {}


def test_safetensors_itself_would_write_the_same_tensors_at_the_same_place(tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    tensors = {
        name: torch.arange(6).reshape(2, 3).to(torch.float32).to(dtype)
        for name, dtype in zip("mbzlaqwxhpcdrsyk", files.DTYPES.values(), strict=False)
    }
    assert len(tensors) == len(files.DTYPES)
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 4)}
    tensors |= {"transposed": TENSORS["a"].view(2, -1).T}
    write_safetensors(ours, tensors, {"é": "ü"})
    safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, theirs, {"é": "ü"})
    assert read_header(ours) == read_header(theirs)
    start = read_header(ours).data_start
    assert ours.read_bytes()[start:] == theirs.read_bytes()[start:]


def test_a_file_is_readable_for_whom_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_safetensors(tmp_path / "lora.safetensors", TENSORS, {})
    finally:
        os.umask(before)
    if os.name == "posix":
        assert (tmp_path / "lora.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_tensor_that_no_file_holds_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="a/b is torch.complex64"):
        write_safetensors(tmp_path / "x", {"a/b": torch.zeros(2, dtype=torch.complex64)}, {})
    assert files_below(tmp_path) == {}


WRITER = textwrap.dedent("""
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import conftest
    from comfyui_braid.engine.disk.writing import replaced_when_whole
    with replaced_when_whole(Path({path!r})) as file:
        file.write(b"half of it")
        print("written", flush=True)
        sys.stdin.readline()
""")


@pytest.fixture
def writing(tmp_path):
    """A process in the middle of writing `lora.safetensors`."""
    code = WRITER.format(tests=str(TESTS), path=str(tmp_path / "loras" / "lora.safetensors"))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "written\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def made_older(folder, seconds):
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.utime(path, (time.time() - seconds,) * 2)


def test_what_a_killed_process_left_goes_once_it_is_old_and_never_while_it_is_written(
    tmp_path, writing
):
    (name,) = files_below(tmp_path)
    made_older(tmp_path, 3600)
    assert remove_leftovers(tmp_path) == [], "it is still being written"
    writing.kill()
    writing.wait()
    assert list(files_below(tmp_path)) == [name]
    assert remove_leftovers(tmp_path, min_age_s=7200) == [], "it is too young"
    assert remove_leftovers(tmp_path, min_age_s=3600) == [tmp_path / name]
    assert files_below(tmp_path) == {}


def test_a_sweep_takes_nothing_that_is_not_ours(tmp_path):
    ours = f".lora.safetensors.{'0a' * 16}.partial"
    kept = [
        "lora.safetensors",
        ".tmpDYcnKL",
        f"{ours[1:]}",
        ".lora.safetensors.partial",
        f".lora.safetensors.{'0g' * 16}.partial",
        f".lora.safetensors.{'0a' * 16}.partial.txt",
    ]
    swept, elsewhere = tmp_path / "swept", tmp_path / "elsewhere"
    for folder in (swept / "deep", elsewhere):
        folder.mkdir(parents=True)
        (folder / ours).write_bytes(b"half")
    for name in kept:
        (swept / name).write_bytes(b"of someone else")
    (swept / "link").symlink_to(elsewhere)
    (swept / ours).symlink_to(elsewhere / ours)
    (swept / f".folder.{'0a' * 16}.partial").mkdir()
    made_older(tmp_path, 10)
    assert remove_leftovers(swept, 5) == [swept / "deep" / ours]
    assert (elsewhere / ours).exists() and all((swept / name).exists() for name in kept)
    assert remove_leftovers(tmp_path / "nowhere") == []


def test_sizes_are_said_as_people_say_them():
    said = [in_bytes(n) for n in (0, 1023, 1536, 5 * 2**20, 3 * 2**30)]
    assert said == ["0 bytes", "1023 bytes", "1.5 KiB", "5.0 MiB", "3.0 GiB"]


def test_no_writer_of_safetensors_leaves_a_name_that_is_not_ours(tmp_path, monkeypatch):
    """safetensors' own writer begins at `.tmp…`, which nobody can tell from another pack's."""
    seen = set()
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.update(os.listdir(tmp_path)), original(fd)))
    write_safetensors(tmp_path / "a.safetensors", TENSORS, {"k": json.dumps([1])})
    (name,) = seen
    assert name.startswith(".a.safetensors.") and name.endswith(".partial")
