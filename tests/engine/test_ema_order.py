import os
import random
import shutil

import pytest
from ema_files import adapter, checkpoints, save, write_run

from comfyui_braid.engine.checkpoints import SHADOWS_SUFFIX, find_checkpoints, step_of
from comfyui_braid.engine.ema.order import selected, trained_order


def _names(order):
    return [path.name for path in order.files]


@pytest.mark.parametrize(
    "name,metadata,step",
    [
        ("run-step00000100.safetensors", {}, 100),
        ("ComfyUI_trained_lora_250_steps_00001_.safetensors", {}, 250),
        ("run-step00000100.safetensors", {"ss_steps": "120"}, 120),
        ("run.safetensors", {"ss_steps": "None"}, None),
        ("run-000012.safetensors", {}, None),
        ("my-step-by-step_lora.safetensors", {}, None),
    ],
)
def test_the_step_comes_from_metadata_else_from_the_name(name, metadata, step, tmp_path):
    assert step_of(tmp_path / name, metadata) == step


def test_a_folder_gives_its_checkpoints_in_training_order_whatever_the_files_dates(tmp_path):
    paths = write_run(tmp_path, 5)
    random.Random(0).shuffle(paths)
    for index, path in enumerate(paths):
        os.utime(path, (1e9 + index, 1e9 + index))
    found = find_checkpoints(tmp_path)
    assert [file.step for file in found.files] == [100, 200, 300, 400, 500]
    assert trained_order(found.files).times == (100, 200, 300, 400, 500)


def test_renamed_files_are_ordered_by_their_metadata(tmp_path):
    paths = write_run(tmp_path, 3)
    for path, name in zip(paths, "cab", strict=True):
        path.rename(tmp_path / f"{name}.safetensors")
    order = trained_order(find_checkpoints(tmp_path).files)
    assert _names(order) == ["c.safetensors", "a.safetensors", "b.safetensors"]
    assert order.unit == "steps"


def test_epochs_order_files_without_steps_and_the_name_wins_over_the_zero_based_metadata(tmp_path):
    for epoch in (2, 4, 6):
        save(tmp_path / f"run-{epoch:06d}.safetensors", adapter(), ss_epoch=str(epoch - 1))
    save(tmp_path / "run.safetensors", adapter(), ss_epoch="8")
    order = trained_order(find_checkpoints(tmp_path).files)
    assert order.times == (2, 4, 6, 8) and order.unit == "epochs"
    assert order.order_from == "epoch (name or metadata)"


def test_a_file_that_does_not_say_when_is_named(tmp_path):
    write_run(tmp_path, 2)
    save(tmp_path / "mystery.safetensors", adapter())
    with pytest.raises(ValueError, match=r"mystery\.safetensors.*ss_steps.*1 of 3.*mtime or given"):
        trained_order(find_checkpoints(tmp_path).files)


def test_a_checkpoint_saved_twice_counts_once(tmp_path):
    paths = write_run(tmp_path, 3)
    shutil.copy(paths[-1], tmp_path / "run.safetensors")
    order = trained_order(find_checkpoints(tmp_path).files)
    assert order.times == (100, 200, 300)
    assert [path.name for path in order.duplicates] == ["run.safetensors"]


def test_two_different_files_of_one_step_are_refused_by_name(tmp_path):
    write_run(tmp_path, 3)
    save(tmp_path / "other.safetensors", adapter(seed=9), ss_steps="200")
    with pytest.raises(ValueError, match=r"other.*run-step00000200.*step 200 but differ"):
        trained_order(find_checkpoints(tmp_path).files)


def test_mtime_and_given_order_on_request_and_say_so(tmp_path):
    paths = write_run(tmp_path, 3)
    for path, second in zip(paths, (3, 1, 2), strict=True):
        os.utime(path, (second, second))
    run = checkpoints(paths)
    by_time = trained_order(run.files, "mtime")
    assert by_time.files == (paths[1], paths[2], paths[0])
    assert (by_time.unit, by_time.order_from) == ("files", "modification time")
    given = trained_order(checkpoints(paths[::-1], [300, 200, 100]).files, "given")
    assert given.files == tuple(paths[::-1]) and given.times == (1, 2, 3)
    known = trained_order(checkpoints(paths, [100, 200, 700]).files, "given")
    assert known.times == (100, 200, 700) and known.unit == "steps"


def test_first_and_last_choose_a_range_and_say_that_the_beginning_was_left_out(tmp_path):
    order = trained_order(checkpoints(write_run(tmp_path, 5), [1, 2, 3, 4, 5]).files)
    assert selected(order, 2, 4).times == (2, 3, 4) and selected(order, 2, 4).windowed
    assert selected(order, 1, 0) == order and not selected(order, 1, 3).windowed
    for first, last in ((0, 0), (6, 0), (3, 2), (1, 6)):
        with pytest.raises(ValueError, match="1 <= first <= last <= 5"):
            selected(order, first, last)


def test_no_checkpoints_and_unknown_sorts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no checkpoints"):
        trained_order([])
    with pytest.raises(ValueError, match="choose one of step, mtime, given"):
        trained_order(checkpoints(write_run(tmp_path, 1)).files, "name")


def test_shadows_merged_files_and_half_written_files_are_not_checkpoints(tmp_path):
    paths = write_run(tmp_path, 2)
    save(tmp_path / f"run{SHADOWS_SUFFIX}", adapter())
    save(tmp_path / "merged.safetensors", adapter(), **{"modelspec.merged_from": "a, b"})
    (tmp_path / ".run.safetensors.x.partial").write_bytes(b"half")
    found = find_checkpoints(tmp_path)
    assert [file.path for file in found.files] == paths
    assert found.shadows == tmp_path / f"run{SHADOWS_SUFFIX}"


def test_a_pattern_takes_one_run_and_its_shadows_out_of_a_folder_of_several(tmp_path):
    write_run(tmp_path, 2)
    for step in (10, 20):
        save(tmp_path / f"cat-step{step:08d}.safetensors", adapter())
    save(tmp_path / f"run{SHADOWS_SUFFIX}", adapter())
    save(tmp_path / f"cat{SHADOWS_SUFFIX}", adapter())
    found = find_checkpoints(tmp_path, "cat-*")
    assert [file.step for file in found.files] == [10, 20]
    assert found.shadows == tmp_path / f"cat{SHADOWS_SUFFIX}"
    assert find_checkpoints(tmp_path).shadows is None


def test_a_missing_folder_an_empty_match_and_a_pattern_that_leaves_the_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        find_checkpoints(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no checkpoint matches '\*\.safetensors'"):
        find_checkpoints(tmp_path)
    for pattern in ("../*.safetensors", "/etc/*", ""):
        with pytest.raises(ValueError, match="glob of files in the folder"):
            find_checkpoints(tmp_path, pattern)
