"""What the owner of a server allows beyond the lists, and who else can write it there: nobody."""

import json
from pathlib import Path

import folder_paths
import pytest

from comfyui_braid.nodes.owner import allowed_optimizers, settings_file
from comfyui_braid.nodes.training.optimizer import BraidOptimizer


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    """ComfyUI's folders, the way they lie by default, in a temporary place."""
    for name in ("user", "input", "output", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path / "user"


def write(content: str) -> Path:
    path = settings_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def custom(optimizer_class: str):
    return BraidOptimizer.execute(
        optimizer_type="custom",
        optimizer_args="",
        lr_scheduler="constant",
        lr_warmup_steps=0.0,
        lr_scheduler_args="",
        optimizer_class=optimizer_class,
    ).result[0]


def test_without_a_file_nothing_is_allowed_beyond_the_list(user_folder):
    assert allowed_optimizers() == ()
    assert settings_file() == user_folder / "__braid" / "settings.json"


def test_a_class_in_the_file_is_found_and_only_that_one(user_folder):
    """transformers has a second optimizer, which the list does not hold."""
    pytest.importorskip("transformers")
    path = "transformers.optimization.LayerWiseDummyOptimizer"
    with pytest.raises(ValueError, match="user/__braid/settings.json"):
        custom(path)
    write(json.dumps({"optimizers": [path]}))
    spec = custom(path)
    assert spec.optimizer_class.__name__ == "LayerWiseDummyOptimizer"
    assert BraidOptimizer.fingerprint_inputs(optimizer_type="custom") == (path,)
    with pytest.raises(ValueError, match="not an optimizer class"):
        custom("transformers.trainer.Trainer")


def test_the_file_may_begin_with_the_mark_that_windows_editors_write(user_folder):
    write('\ufeff{"optimizers": ["a.B"]}')
    assert allowed_optimizers() == ("a.B",)


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("{", r"not JSON \(Expecting"),
        ("[" * 100_000, "JSON with more than 4 brackets in each other"),
        ('{"optimizers": [], "optimizers": ["a.B"]}', "twice"),
        ("[]", "must hold a JSON object"),
        ('{"optimisers": []}', "did you mean optimizers"),
        ('{"optimizers": "a.B"}', "must be a list of classes"),
        ('{"optimizers": [1]}', "must be a list of classes"),
    ],
)
def test_a_damaged_file_is_told_with_its_path_and_allows_nothing(content, sentence, user_folder):
    path = write(content)
    with pytest.raises(ValueError, match=sentence) as told:
        allowed_optimizers()
    assert str(path) in str(told.value)


@pytest.mark.parametrize("place", ["input", "output/x", "temp", "user/default/__braid", "models"])
def test_a_file_where_clients_of_the_server_can_write_allows_nothing(
    place, user_folder, monkeypatch
):
    """Through a link, or because the folders lie in one another."""
    root = user_folder.parent
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "loras", ([str(root / "models")], set())
    )
    (root / place).mkdir(parents=True, exist_ok=True)
    (root / place / "settings.json").write_text('{"optimizers": ["a.B"]}')
    (user_folder / "__braid").symlink_to(root / place, target_is_directory=True)
    with pytest.raises(ValueError, match="everyone who reaches this server can write"):
        allowed_optimizers()


def test_an_output_folder_around_the_user_folder_is_told(user_folder, monkeypatch):
    write('{"optimizers": ["a.B"]}')
    monkeypatch.setattr(folder_paths, "output_directory", str(user_folder.parent))
    with pytest.raises(ValueError, match="keep these folders apart"):
        allowed_optimizers()
