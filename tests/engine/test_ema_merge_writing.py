"""How a merge writes: whole or not at all, in chunks, whatever happens to the disk or to it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ema_files import HALF, average_of, checkpoints, finish, write_run
from full_disk import NO_ROOM, files_below, largest_file

from comfyui_braid.engine.disk.writing import NotWrittenError
from comfyui_braid.engine.ema import merge as merge_module
from comfyui_braid.engine.ema.merge import merged_tensors, prepare_merge, write_merged

TESTS = Path(__file__).parent.parent


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
