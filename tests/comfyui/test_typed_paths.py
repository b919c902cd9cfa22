"""Whatever is typed where a path belongs, nothing is written outside ComfyUI's output folder, and
nothing outside ComfyUI's folders is read before somebody queues the graph."""

import os
import re
import sys
from pathlib import Path

import folder_paths
import matplotlib.font_manager  # noqa: F401  writes its list of fonts now, not in a test's HOME
import pytest
import torch
from comfy_api.latest import io
from live_questions import answer_of
from tiny_models import build, conditioning, latent

from comfyui_braid.engine.checkpoints import AdapterStateDict, Checkpoint, Checkpoints
from comfyui_braid.engine.files import write_safetensors
from comfyui_braid.engine.magcache.presets import preset_named
from comfyui_braid.engine.network.spec import NetworkSpec
from comfyui_braid.engine.training.states.saving import find_state
from comfyui_braid.engine.training.states.state import read_state
from comfyui_braid.nodes import fp8
from comfyui_braid.nodes.ema.nodes import BraidPostHocEma
from comfyui_braid.nodes.magcache.calibration import (
    BraidLoadCalibration,
    BraidMagCacheCalibration,
)
from comfyui_braid.nodes.network import BraidSaveLora
from comfyui_braid.nodes.training import checkpoints
from comfyui_braid.nodes.training.checkpoints import BraidLoadCheckpoints
from comfyui_braid.nodes.training.log import BraidTrainingLog
from comfyui_braid.nodes.training.saving import BraidCheckpointing
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
ELSEWHERE = "The files lie outside ComfyUI's folders: run the graph to see them here."
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


def ema_behind(**loader):
    """Post-Hoc EMA behind Load Checkpoints, as the browser describes an opened workflow."""
    typed = {"folder": ".", "pattern": "*.safetensors", "path": ""} | loader
    linked = {"node_id": "BraidLoadCheckpoints", "values": typed, "inputs": {}}
    values = {"method": "beta", "method.beta": 0.9, "sort": "step", "first": 1, "last": 0}
    return {"node_id": "BraidPostHocEma", "values": values, "inputs": {"checkpoints": linked}}


ANYWHERE = [*TYPED.values(), "/", "/etc", "..", "~", "~nobody_of_that_name", "/root/" + "x" * 300]


@pytest.mark.parametrize("typed", ANYWHERE)
@pytest.mark.parametrize("widget", ["folder", "path"])
def test_a_live_chart_answers_any_folder_with_a_sentence(widget, typed, world):
    assert set(answer_of("ema", ema_behind(**{widget: typed}))) <= {"error", "message"}


class Reads:
    """What Python opens and lists, heard from its own audit events while it listens."""

    def __init__(self):
        self.paths, self.listening = [], False
        sys.addaudithook(self.hear)  # for good: there is no taking it off

    def hear(self, event, arguments):
        if self.listening and event in ("open", "os.scandir", "os.listdir", "glob.glob"):
            self.paths.append(os.fsdecode(arguments[0]) if arguments[0] is not None else ".")

    def during(self, call):
        self.paths, self.listening = [], True
        try:
            call()
        finally:
            self.listening = False
        return {path for path in self.paths if not path.endswith((".py", ".pyc"))}


@pytest.fixture(scope="module")
def reads():
    return Reads()


@pytest.mark.parametrize("typed", ANYWHERE)
@pytest.mark.parametrize("pattern", ["*.safetensors", "**/*.safetensors", "*/*", "../*"])
def test_an_opened_workflow_reads_nothing_outside_comfyuis_folders(typed, pattern, world, reads):
    write_safetensors(world / "outside" / "x-step00000001.safetensors", LORA, {"ss_steps": "1"})
    question = ema_behind(path=typed, pattern=pattern)
    answer_of("ema", question)  # what a first call loads
    seen = reads.during(lambda: answer_of("ema", question))
    assert not [path for path in seen if not Path(path).is_relative_to(output())]


def test_the_reads_are_heard(world, reads):
    write_safetensors(output() / "loras" / "run" / "x-step00000001.safetensors", LORA, {})
    seen = reads.during(lambda: answer_of("ema", ema_behind(path=str(output()), pattern="**/*")))
    assert str(output() / "loras") in seen
    assert any(path.endswith("x-step00000001.safetensors") for path in seen)


@pytest.mark.parametrize("pattern", ["*.safetensors", "*/*.safetensors"])
def test_a_link_that_leads_elsewhere_is_followed_by_a_run_only(pattern, world):
    file = world / "outside" / "x-step00000001.safetensors"
    write_safetensors(file, LORA, {"ss_steps": "1"})
    (output() / "loras" / "linked.safetensors").symlink_to(file)
    answer = answer_of("ema", ema_behind(pattern=pattern))
    assert answer == {"message": ELSEWHERE}
    found = BraidLoadCheckpoints.execute(folder=".", pattern=pattern).result[0]
    assert [checkpoint.step for checkpoint in found.files] == [1]


def test_folders_of_models_are_comfyuis_too(world, monkeypatch):
    models = world / "models" / "loras"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(models)], set()))
    write_safetensors(models / "x-step00000001.safetensors", LORA, {"ss_steps": "1"})
    assert answer_of("ema", ema_behind(path=str(models)))["count"] == 1
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "custom_nodes", ([str(world)], set()))
    assert answer_of("ema", ema_behind(path=str(world)))["message"] == ELSEWHERE


def test_a_folder_of_very_many_files_waits_for_the_run(world, monkeypatch):
    monkeypatch.setattr(checkpoints, "LIVE_ENTRIES", 50)
    crowded = output() / "loras" / "crowded"
    crowded.mkdir()
    for index in range(51):
        (crowded / f"{index}.txt").touch()
    assert "run the graph" in answer_of("ema", ema_behind(folder="crowded"))["message"]


NEVER_READ = [
    "//host/share",
    "\\\\host\\share",
    "/\\host",
    " //host",
    "\\\\?\\C:\\x",
    "\\\\.\\pipe\\x",
    "\\??\\UNC\\host\\share",
]
DEVICES = ["/dev", "/dev/stdin", "/proc/self", "/sys", "/x/../dev/fd", "../" * 40 + "dev"]


@pytest.mark.parametrize("typed", NEVER_READ + DEVICES)
def test_another_machine_and_a_device_are_refused_by_the_queue_and_by_the_run(typed, world, reads):
    for refuse in (
        lambda: BraidLoadCheckpoints.execute(folder=".", pattern="*", path=typed),
        lambda: BraidLoadCheckpoints.fingerprint_inputs(folder=typed, pattern="*"),
        lambda: checkpointing(typed),
    ):
        with pytest.raises(ValueError, match="another machine or a device|leads to .* a device"):
            refuse()
    for said in (
        BraidLoadCheckpoints.validate_inputs(folder=typed, path=""),
        BraidLoadCheckpoints.validate_inputs(folder=".", path=typed),
        BraidCheckpointing.validate_inputs(resume=typed),
    ):
        assert "device" in said
    assert not reads.during(lambda: BraidLoadCheckpoints.validate_inputs(folder=typed, path=typed))


def test_a_link_to_a_device_is_refused_by_the_run(world):
    (output() / "loras" / "way").symlink_to("/dev")
    (output() / "loras" / "x.state").symlink_to("/proc/self/environ")
    with pytest.raises(ValueError, match="folder leads to /dev, a device"):
        BraidLoadCheckpoints.execute(folder="way", pattern="*")
    with pytest.raises(ValueError, match="resume leads to /proc/.*, a device"):
        checkpointing("x.state")


@pytest.mark.parametrize("typed", ["", "latest", "run/x.state", "/elsewhere/x.state", None])
def test_a_state_of_this_machine_may_be_typed(typed, world):
    assert BraidCheckpointing.validate_inputs(resume=typed) is True
    assert typed is None or checkpointing(typed).resume == typed


def test_a_number_for_a_path_is_one_sentence_at_the_queue(world):
    assert BraidLoadCheckpoints.validate_inputs(folder=5) == "folder is 5; it must be text"


def checkpointing(resume):
    widgets = dict(save_every_n_steps=1, save_last_n=0, save_state=True, ema_shadows=False)
    return BraidCheckpointing.execute(**widgets, resume=resume).result[0].checkpointing


SECRET = b"root:x:0:0:secret:/root:/bin/sh\n"
FOREIGN = {
    "text": SECRET * 40,
    "a header of text": len(SECRET).to_bytes(8, "little") + SECRET,
    "a header of JSON": (23).to_bytes(8, "little") + b'{"secret": {"secret":1}}',
    "a header of bytes": (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_no_word_of_a_foreign_file_is_in_a_refusal(kind, world):
    path = world / "outside" / "passwd.safetensors"
    path.write_bytes(FOREIGN[kind])
    refusals = []
    for read in (
        lambda: read_state(path),
        lambda: BraidLoadCheckpoints.execute(folder=".", pattern="*", path=str(path.parent)),
    ):
        with pytest.raises(ValueError, match="not a ") as refusal:
            read()
        refusals.append(str(refusal.value))
        assert refusal.value.__suppress_context__ or refusal.value.__context__ is None
    first_bytes = str(int.from_bytes(SECRET[:8], "little"))
    for refusal in refusals:
        assert not any(word in refusal for word in ("secret", first_bytes, "root:", "0xff"))
    assert refusals[0].startswith(f"{path}: not a safetensors file")


def test_a_pipe_for_a_state_stops_nothing(world):
    os.mkfifo(output() / "loras" / "pipe.state")
    with pytest.raises(ValueError, match="there is no file"):
        find_state(output() / "loras", "x", "pipe.state")
