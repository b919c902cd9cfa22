"""A search by a typed glob: the same files as pathlib's, and an end to it."""

import os
import tracemalloc

import pytest
import safetensors.torch
import torch

from comfyui_braid.engine.checkpoints import find_checkpoints
from comfyui_braid.engine.disk.folders import Bounds, Search, SearchEndedError
from comfyui_braid.engine.ema.order import trained_order


@pytest.fixture
def tree(tmp_path):
    for name in (
        "a.safetensors",
        ".hidden.safetensors",
        "b.txt",
        "run/a.safetensors",
        "run/run-1.safetensors",
        "run/deep/er/run-2.safetensors",
        "other/a[1].safetensors",
        "other/run/run-3.safetensors",
    ):
        path = tmp_path / "top" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "top" / "folder.safetensors").mkdir()
    (tmp_path / "top" / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "top" / "circle").symlink_to(tmp_path / "top" / "circle")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "run-4.safetensors").touch()
    (tmp_path / "top" / "link").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "top"


@pytest.mark.parametrize(
    "pattern",
    [
        "*.safetensors",
        "*",
        "a.safetensors",
        "run/*.safetensors",
        "*/*.safetensors",
        "link/*",
        "**/*.safetensors",
        "**/run/*.safetensors",
        "**/run/**/*.safetensors",
        "run/**/run-?.safetensors",
        "**/**/*.txt",
        "*/a[[]1].safetensors",
        "[ab].*",
        "none/*",
        "./a.safetensors",
    ],
)
def test_a_search_finds_the_files_that_a_glob_of_pathlib_finds(tree, pattern):
    expected = {path for path in tree.glob(pattern) if path.is_file()}
    found = list(Search().files(tree, pattern))
    assert set(found) == expected and len(found) == len(expected)


def test_two_stars_at_the_end_mean_every_file_below(tree):
    assert set(Search().files(tree, "**")) == set(Search().files(tree, "**/*"))


@pytest.mark.parametrize("pattern", ["", "..", "../*", "run/../../*", "/etc/*", "x" * 2000])
def test_a_pattern_that_leads_out_of_the_folder_is_refused(tree, pattern):
    with pytest.raises(ValueError, match="glob of files in the folder"):
        list(Search().files(tree, pattern))


def test_a_search_ends_after_so_many_entries_and_says_where(tmp_path):
    for index in range(50):
        (tmp_path / f"{index}").touch()
    search, found = Search(Bounds(entries=20)), []
    with pytest.raises(SearchEndedError, match="after 20 files and folders: choose a folder that"):
        found.extend(search.files(tmp_path, "*"))
    assert len(list(Search(Bounds(entries=50)).files(tmp_path, "*"))) == 50


def test_a_search_ends_after_so_many_seconds(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(SearchEndedError):
        list(Search(Bounds(seconds=-1)).files(tmp_path, "*"))


def test_a_folder_of_links_to_itself_comes_to_an_end(tmp_path):
    for index in range(10):
        (tmp_path / f"{index}").symlink_to(tmp_path, target_is_directory=True)
    assert list(Search().files(tmp_path, "**/*")) == []
    with pytest.raises(SearchEndedError):
        list(Search(Bounds(entries=5_000)).files(tmp_path, "*/" * 30 + "*.safetensors"))


def test_every_folder_and_file_is_checked_before_it_is_opened(tree):
    def refuse_links(path):
        if path.is_symlink():
            raise PermissionError(path.name)

    assert list(Search(Bounds(check=refuse_links)).files(tree, "run/*.safetensors"))
    for pattern in ("link/*", "*/*.safetensors"):
        with pytest.raises(PermissionError, match="link"):
            list(Search(Bounds(check=refuse_links)).files(tree, pattern))


def test_a_pipe_is_no_checkpoint_and_stops_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ValueError, match="no checkpoint matches"):
        find_checkpoints(tmp_path)


def test_of_two_files_of_one_step_only_pieces_are_in_memory(tmp_path):
    for name in ("a", "b"):
        tensors = {"x.lora_up.weight": torch.zeros(8_000_000)}
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors", {"ss_steps": "5"})
    files = find_checkpoints(tmp_path).files
    tracemalloc.start()
    try:
        assert len(trained_order(files).duplicates) == 1
        assert tracemalloc.get_traced_memory()[1] < 8e6
        with pytest.raises(SearchEndedError):
            trained_order(files, search=Search(Bounds(entries=10)))
    finally:
        tracemalloc.stop()
