"""Whatever is typed where a path belongs, nothing is written outside ComfyUI's output folder."""

import os
import re
from pathlib import Path

import folder_paths
import matplotlib.font_manager  # noqa: F401  writes its list of fonts now, not in a test's HOME
import pytest
import torch
from comfy_api.latest import io
from tiny_models import build, conditioning, latent

from comfyui_braid.engine.checkpoints import AdapterStateDict, Checkpoint, Checkpoints
from comfyui_braid.engine.files import write_safetensors
from comfyui_braid.engine.magcache.presets import preset_named
from comfyui_braid.engine.network.spec import NetworkSpec
from comfyui_braid.nodes import fp8
from comfyui_braid.nodes.ema import BraidPostHocEma
from comfyui_braid.nodes.live import LIVE, _computed, parse_live_node
from comfyui_braid.nodes.magcache.nodes import BraidLoadCalibration, BraidMagCacheCalibration
from comfyui_braid.nodes.network import BraidSaveLora
from comfyui_braid.nodes.training.saving import BraidTrainingLog
from comfyui_braid.nodes.training.train import BraidTrainLora

UNUSABLE = {
    "out": "../../../x",
    "zero": "a\0b",
    "newline": "a\nb",
    "surrogate": "a\ud800b",
    "long": "x" * 300,
    "long in UTF-8": "あ" * 100,
}
TYPED = UNUSABLE | {
    "parent": "../x",
    "down and out": "loras/../../x",
    "absolute": "/tmp/braid_escaped/x",
    "link": "way_out/x",
    "link below loras": "loras/way_out/x",
    "date": "%year%/../../x",
    "drive": "C:\\x",
    "share": "\\\\server\\share\\x",
    "dots": "a..b/.x",
    "home": "~/x",
    "unicode": "日本語/絵 ñ",
}
ALWAYS, WITH_AN_ENDING = "refused as it is", "taken where a number or a date follows"
NOT_EVERYWHERE = {
    "con": ("device", WITH_AN_ENDING),
    "NUL": ("device", WITH_AN_ENDING),
    "COM1": ("device", WITH_AN_ENDING),
    "lpt²": ("device", WITH_AN_ENDING),
    "CONIN$": ("device", WITH_AN_ENDING),
    "clock$": ("device", WITH_AN_ENDING),
    "aux.txt": ("device", ALWAYS),
    "Prn .tar.gz": ("device", ALWAYS),
    "my lora.": ("dot or a blank", WITH_AN_ENDING),
    "my lora ": ("dot or a blank", WITH_AN_ENDING),
    "...": ("dot or a blank", WITH_AN_ENDING),
    "a<b": ("cannot hold any of", ALWAYS),
    "a>b": ("cannot hold any of", ALWAYS),
    "a:b": ("cannot hold any of", ALWAYS),
    'a"b': ("cannot hold any of", ALWAYS),
    "a|b": ("cannot hold any of", ALWAYS),
    "a?b": ("cannot hold any of", ALWAYS),
    "a*b": ("cannot hold any of", ALWAYS),
    "gpj\u202eexe": (r"U\+202E \(RIGHT-TO-LEFT OVERRIDE\)", ALWAYS),
    "\u2066a\u2069": (r"U\+2066", ALWAYS),
    "a\u200bb": (r"U\+200B \(ZERO WIDTH SPACE\)", ALWAYS),
    "a\u200db": (r"U\+200D", ALWAYS),  # joins nothing
    "\ufeffa": (r"U\+FEFF", ALWAYS),
    "a\u00adb": (r"U\+00AD", ALWAYS),
    "a\u2028b": (r"U\+2028", ALWAYS),
    "a\u3164b": (r"U\+3164", ALWAYS),
    "a\x85b": (r"U\+0085", ALWAYS),
    "a\U000e0041b": (r"U\+E0041", ALWAYS),
}
"""What is typed: what the sentence says, and where."""
NOT_A_FOLDER = {
    "con/x": "device",
    "a/nul.b/x": "device",
    "a./x": "dot or a blank",
    "a /x": "dot or a blank",
    "a\u202eb/x": r"U\+202E",
    "/".join(["x" * 100] * 11): "at most 1,000",
}
ORDINARY = [
    "console",
    "com10",
    "nullify.v2",
    "lora v1.5 (final) [x] + y = z, 100%!",
    "犬と猫　写真",
    "絵ñ",
    "小猫_测试",
    "고양이",
    "кошка",
    "قطة جميلة",
    "می\u200cخواهم",
    "क्\u200dष",
    "🐈\u200d⬛ ❤️\u200d🔥 👩🏽\u200d🚀",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
]
LORA = {
    "diffusion_model.x.lora_up.weight": torch.ones(4, 2),
    "diffusion_model.x.lora_down.weight": torch.ones(2, 4),
}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with ComfyUI's output folder in it, from which two links lead out."""
    output = tmp_path / "a" / "b" / "output"
    (output / "loras").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for place in (output, output / "loras"):
        (place / "way_out").symlink_to(tmp_path / "outside")
    monkeypatch.setattr(folder_paths, "output_directory", str(output))
    monkeypatch.setattr(folder_paths, "temp_directory", str(output / "temp"))
    monkeypatch.setattr(fp8, "save_fp8", lambda model, path: path.write_bytes(b""))
    monkeypatch.setattr(BraidTrainLora, "hidden", io.HiddenHolder.from_dict({}))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def output() -> Path:
    return Path(folder_paths.get_output_directory())


def outside(world: Path) -> set[Path]:
    return {path for path in world.rglob("*") if not path.is_relative_to(output())} | {
        path for path in (Path("/tmp/braid_escaped"), Path("/x")) if os.path.lexists(path)
    }


def save_lora(typed):
    BraidSaveLora.execute(AdapterStateDict(LORA, {}), typed, "comfyui", "keep")


def save_average(typed):
    path = output() / "loras" / "run" / "run-step00000001.safetensors"
    write_safetensors(path, LORA, {"ss_steps": "1"})
    run = Checkpoints(files=(Checkpoint(path=path, step=1),))
    BraidPostHocEma.execute(run, {"method": "beta", "beta": 0.9}, "step", 1, 0, "factors", typed)


def save_fp8(typed):
    fp8.BraidSaveFp8.execute(None, typed)


def save_calibration(typed):
    class Measured:
        def result(self):
            return preset_named("FLUX.1-dev")

    BraidMagCacheCalibration.execute(Measured(), {}, typed)


def train(typed):
    widgets = {
        "steps": 1,
        "batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "seed": 0,
        "output_name": typed,
        "mixed_precision": "no",
        "gradient_checkpointing": False,
    }
    with torch.inference_mode():
        BraidTrainLora.execute(
            model=[build("flux")],
            latents=[{"samples": latent("flux")}],
            positive=[conditioning("flux")],
            network=[NetworkSpec(rank=1)],
            **{name: [value] for name, value in widgets.items()},
        )


def log(**typed):
    given = {
        "log_with": "tensorboard",
        "logging_dir": "logs",
        "log_prefix": "",
        "log_tracker_name": "",
    }
    opened = BraidTrainingLog.execute(**given | typed).result[0].log
    folder = opened.logging_dir / f"{opened.log_prefix}20260101" / opened.log_tracker_name
    folder.mkdir(parents=True)
    (folder / "events").touch()


WRITERS = {
    "filename_prefix of Save LoRA": save_lora,
    "filename_prefix of Post-Hoc EMA": save_average,
    "filename_prefix of Save FP8 Model": save_fp8,
    "filename_prefix of MagCache Calibration": save_calibration,
    "output_name of Train LoRA": train,
    "logging_dir of Training Log": lambda typed: log(logging_dir=typed),
    "log_prefix of Training Log": lambda typed: log(log_prefix=typed),
    "log_tracker_name of Training Log": lambda typed: log(log_tracker_name=typed),
}
PREFIXES = [where for where in WRITERS if "prefix" in where]
PATHS = [where for where in WRITERS if not where.startswith(("log_prefix", "log_tracker_name"))]
of_each_writer = pytest.mark.parametrize("where", WRITERS)


@of_each_writer
@pytest.mark.parametrize("typed", TYPED.values(), ids=TYPED)
def test_nothing_is_written_outside_the_output_folder(where, typed, world):
    before = outside(world)
    try:
        WRITERS[where](typed)
    except ValueError as refusal:
        assert str(refusal).startswith(where.split()[0])
    assert outside(world) == before


@of_each_writer
@pytest.mark.parametrize("typed", UNUSABLE.values(), ids=UNUSABLE)
def test_a_name_that_no_file_can_have_is_refused_before_anything_is_written(where, typed, world):
    before = set(output().rglob("*.*"))
    with pytest.raises(ValueError, match=where.split()[0]):
        WRITERS[where](typed)
    assert {p for p in output().rglob("*.*") if "run" not in p.parts} == before


@pytest.mark.parametrize("typed", NOT_EVERYWHERE, ids=ascii)
@of_each_writer
def test_a_name_that_some_system_cannot_open_or_the_eye_cannot_read_is_refused(where, typed, world):
    said, is_made = NOT_EVERYWHERE[typed]
    if is_made is WITH_AN_ENDING and where in PREFIXES:
        WRITERS[where](typed)
        return
    before = set(output().rglob("*.*"))
    with pytest.raises(ValueError, match=f"^{where.split()[0]} .*{said}"):
        WRITERS[where](typed)
    assert {p for p in output().rglob("*.*") if "run" not in p.parts} == before


@pytest.mark.parametrize("typed", NOT_A_FOLDER, ids=lambda typed: ascii(typed[:20]))
@pytest.mark.parametrize("where", PATHS)
def test_a_folder_of_such_a_name_is_refused_too(where, typed, world):
    with pytest.raises(ValueError, match=f"^{where.split()[0]} .*{NOT_A_FOLDER[typed]}"):
        WRITERS[where](typed)


@of_each_writer
def test_ordinary_names_of_every_language_are_taken(where, world):
    for typed in ["/".join(ORDINARY)] if where in PATHS else ORDINARY:
        WRITERS[where](typed)
        assert [path for path in output().rglob("*") if typed in str(path) and path.is_file()]


@pytest.mark.parametrize("where", [where for where in WRITERS if "filename_prefix" in where])
def test_the_placeholders_of_comfyui_and_folders_of_windows_are_filled_in(where, world):
    WRITERS[where]("%year%-%month%\\%hour%%minute%%second%")
    made = ["/".join(path.parts[-2:]) for path in output().rglob("*_00001_*")]
    assert any(re.match(r"\d{4}-\d\d/\d{6}_00001_", path) for path in made)
    with pytest.raises(ValueError, match="write %year%-%month%-%day% here"):
        WRITERS[where]("%date:yyyy-MM-dd%/x")


@pytest.mark.parametrize("typed", [".", "./logs", "tests/../logs", ""])
def test_a_log_folder_may_be_the_output_folder_itself_or_a_way_round(typed, world):
    log(logging_dir=typed)
    assert list(output().rglob("events"))


@pytest.mark.parametrize("typed", TYPED.values(), ids=TYPED)
def test_only_a_calibration_below_its_folder_is_read(typed, world):
    for place in (world, output(), world / "outside"):
        (place / "x").write_text(preset_named("FLUX.1-dev").to_json())
    with pytest.raises(ValueError, match="^file "):
        BraidLoadCalibration.execute(typed)


@pytest.mark.parametrize("typed", [*TYPED.values(), "~nobody_of_that_name", "/root/" + "x" * 300])
def test_a_live_chart_answers_any_folder_with_a_sentence(typed, world):
    linked = {"node_id": "BraidLoadCheckpoints", "values": {}, "inputs": {}}
    linked["values"] = {"folder": typed, "pattern": "*.safetensors", "path": typed}
    values = {"method": "beta", "method.beta": 0.9, "sort": "step", "first": 1, "last": 0}
    node = {"node_id": "BraidPostHocEma", "values": values, "inputs": {"checkpoints": linked}}
    assert set(_computed(LIVE["ema"], parse_live_node(node))) == {"error"}
