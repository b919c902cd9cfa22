"""Files of a run: which are kept, what a damaged or foreign state is answered with, full disks."""

import contextlib
import dataclasses
import json
import logging
import math
import re
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from full_disk import NO_ROOM, files_below, largest_file
from training_runs import PLAN, assert_equal_states, make_run, train

from comfyui_braid.engine.disk.writing import NotWrittenError
from comfyui_braid.engine.files import write_safetensors
from comfyui_braid.engine.network.attach import attached
from comfyui_braid.engine.network.spec import NetworkSpec
from comfyui_braid.engine.training.history import ValidationRecord
from comfyui_braid.engine.training.optimizers.optimizer import OptimizerSpec
from comfyui_braid.engine.training.options import Checkpointing
from comfyui_braid.engine.training.states.identity import Identity, fingerprint
from comfyui_braid.engine.training.states.resume import resumed
from comfyui_braid.engine.training.states.saving import (
    Saver,
    find_state,
    free_folder,
    run_folder,
    saved,
)
from comfyui_braid.engine.training.states.state import read_state, write_state

OURS, ANY = Identity(named={"seed": 7}), Identity(named={})
EVERY_STEP = Checkpointing(save_every_n_steps=1, save_state=True)


def saver_of(run, folder, checkpointing=EVERY_STEP, identity=None, name="lora"):
    def write(path, metadata):
        write_safetensors(path, run.network.state_dict(), metadata)

    return Saver(folder, name, checkpointing, write, identity or OURS)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def run_and_save(folder, steps=3, checkpointing=EVERY_STEP, **options):
    run, model = make_run(dataclasses.replace(PLAN, steps=steps))
    saver = saver_of(run, folder, checkpointing, **options)
    with attached(model, run.network):
        for _ in saved(run.steps(), run, saver):
            pass
    saver.save_final(run)
    return run, saver


def test_the_last_n_by_count_are_kept_with_their_states(tmp_path):
    checkpointing = dataclasses.replace(EVERY_STEP, save_last_n=2)
    _, saver = run_and_save(tmp_path, 4, checkpointing)
    assert names(tmp_path) == [
        "lora-step00000003.safetensors",
        "lora-step00000003.state",
        "lora-step00000004.safetensors",
        "lora-step00000004.state",
        "lora.safetensors",
    ]
    assert [file.step for file in saver.checkpoints().files] == [3, 4]


def test_the_final_file_ends_the_checkpoints_when_its_step_has_no_file_of_its_own(tmp_path):
    _, saver = run_and_save(tmp_path, 3, Checkpointing(save_every_n_steps=2))
    listed = [(file.step, file.path.name) for file in saver.checkpoints().files]
    assert listed == [(2, "lora-step00000002.safetensors"), (3, "lora.safetensors")]


def test_files_tell_their_step_epoch_loss_and_validation(tmp_path):
    run, model = make_run(dataclasses.replace(PLAN, steps=3, batch_size=5))
    saver = saver_of(run, tmp_path, Checkpointing(save_every_n_steps=1, save_last_n=1))
    with attached(model, run.network):
        for step, loss in zip(run.steps(), (0.5, 0.3, 0.4), strict=True):
            bins = (loss,) * 10
            run.history.validations.append(ValidationRecord(step=step.step, loss=loss, bins=bins))
            saver.save_step(run)
    saver.save_final(run)
    assert names(tmp_path)[:2] == ["lora-step00000002.safetensors", "lora-step00000003.safetensors"]
    with safetensors.safe_open(tmp_path / "lora-step00000002.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_steps"] == metadata["ss_epoch"] == "2"
    assert float(metadata["braid_loss"]) == run.history.records[1].loss
    assert metadata["braid_validation_loss"] == "0.3"
    assert metadata["braid_best_so_far"] == "true"
    with safetensors.safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert "braid_best_so_far" not in file.metadata()


def test_a_held_out_loss_that_is_no_number_is_never_the_best(tmp_path):
    run, model = make_run(dataclasses.replace(PLAN, steps=4))
    saver = saver_of(run, tmp_path, Checkpointing(save_every_n_steps=1, save_last_n=1))
    with attached(model, run.network):
        for step, loss in zip(run.steps(), (math.nan, 0.3, math.nan, math.inf), strict=True):
            run.history.validations.append(ValidationRecord(step=step.step, loss=loss, bins=()))
            path = saver.save_step(run)
            with safetensors.safe_open(path, "pt") as file:
                assert ("braid_best_so_far" in file.metadata()) == (step.step == 2)
    assert [file.step for file in saver.checkpoints().files] == [2, 4]


def test_the_best_is_marked_in_the_step_file_and_in_the_final_file_of_the_same_step(tmp_path):
    run, _ = make_run()
    run.history.validations.append(ValidationRecord(step=0, loss=0.1, bins=()))
    saver = saver_of(run, tmp_path)
    for path in (saver.save_step(run), saver.save_final(run)):
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata()["braid_best_so_far"] == "true"


@pytest.mark.parametrize("room", [1000, 120_000], ids=["for nothing", "for no state"])
def test_a_full_disk_costs_a_checkpoint_and_never_the_run_or_an_older_file(room, tmp_path, caplog):
    run, model = make_run(dataclasses.replace(PLAN, steps=4))
    whole = train(*make_run(dataclasses.replace(PLAN, steps=4)))
    saver = saver_of(run, tmp_path, dataclasses.replace(EVERY_STEP, save_last_n=1))
    disk = contextlib.ExitStack()
    with attached(model, run.network), caplog.at_level(logging.WARNING, "comfyui_braid"), disk:
        for step in saved(run.steps(), run, saver):
            if step.step == 1:
                before = files_below(tmp_path)
                disk.enter_context(largest_file(room))
            elif step.step == 3:
                after = files_below(tmp_path)
                assert before.items() <= after.items()
                assert not [name for name in after if name.endswith((".partial", "3.state"))]
                disk.close()
    assert re.search(NO_ROOM, caplog.text) and "training goes on" in caplog.text
    assert names(tmp_path) == ["lora-step00000004.safetensors", "lora-step00000004.state"]
    assert_equal_states(run.network.state_dict(), whole)


def test_a_finished_adapter_is_saved_though_its_state_finds_no_room(tmp_path):
    run, model = make_run()
    train(run, model, until=1)
    said = []
    with largest_file(120_000):
        final = saver_of(run, tmp_path).save_final(run, said.append)
    assert names(tmp_path) == [final.name]
    (sentence,) = said
    assert re.match(rf"the finished LoRA is saved, but not its state \(.*{NO_ROOM}", sentence)


def test_a_state_that_finds_no_room_is_one_sentence_and_no_file(tmp_path):
    with (
        largest_file(1000),
        pytest.raises(NotWrittenError, match=f"x.state could not be written: {NO_ROOM}"),
    ):
        write_state(tmp_path / "x.state", {"a": torch.zeros(10_000)})
    assert names(tmp_path) == []


def damaged(path, how):
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    match how:
        case "cut short":
            data = data[: len(data) // 2]
        case "empty":
            data = data[:0]
        case "a flipped bit in a tensor":
            data[-3] ^= 1
        case "a changed number in the header":
            header = json.loads(data[8 : 8 + length])
            state = header["__metadata__"]["state"]
            header["__metadata__"]["state"] = state.replace('["step", 3]', '["step", 2]', 1)
            assert header["__metadata__"]["state"] != state
            text = json.dumps(header).encode()
            data = struct.pack("<Q", len(text)) + text + data[8 + length :]
        case "a picture":
            data = bytearray(b"\x89PNG\r\n\x1a\n" + b"\0" * 100)
        case "a LoRA":
            path.with_suffix(".safetensors").replace(path)
            return
    path.write_bytes(data)


@pytest.mark.parametrize(
    "how",
    [
        "cut short",
        "empty",
        "a flipped bit in a tensor",
        "a changed number in the header",
        "a picture",
        "a LoRA",
    ],
)
def test_a_damaged_state_is_refused_by_name_and_the_earlier_one_still_resumes(how, tmp_path):
    run_and_save(tmp_path / "lora")
    latest = find_state(tmp_path, "lora", "latest")
    assert latest.name == "lora-step00000003.state"
    damaged(latest, how)
    run, _ = make_run()
    with pytest.raises(ValueError, match="lora-step00000003.state: .*(damaged|not a|cut short)"):
        resumed(run, latest, OURS)
    resumed(run, find_state(tmp_path, "lora", "lora/lora-step00000002.state"), OURS)
    assert run.step == 2


def test_a_state_of_another_network_is_refused_even_where_its_settings_were_equal(tmp_path):
    run_and_save(tmp_path / "lora")
    other, _ = make_run(spec=NetworkSpec(rank=8, alpha=4))
    with pytest.raises(ValueError, match="lora-step00000003.state does not fit this run"):
        resumed(other, find_state(tmp_path, "lora", "latest"), OURS)


def test_a_state_of_another_optimizer_is_refused_even_where_its_settings_were_equal(tmp_path):
    run_and_save(tmp_path / "lora")
    spec = NetworkSpec(rank=4, alpha=4, neuron_dropout=0.1, loraplus_lr_ratio=4)
    other, _ = make_run(spec=spec, optimizer=OptimizerSpec())
    with pytest.raises(ValueError, match="does not fit this run|different number of parameter"):
        resumed(other, find_state(tmp_path, "lora", "latest"), OURS)


@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(0), torch.tensor(1), None])
def test_what_only_the_optimizer_sees_in_a_state_is_refused_at_its_first_step(value, tmp_path):
    """The file is whole, with its checksum; what is in it is not an AdamW's."""
    run_and_save(tmp_path / "lora", steps=4)
    path = find_state(tmp_path, "lora", "lora/lora-step00000003.state")
    state = read_state(path)
    state["run"]["optimizer"]["optimizer"]["state"][0]["exp_avg"] = value
    write_state(path, state)
    run, model = make_run(dataclasses.replace(PLAN, steps=6))
    resumed(run, path, OURS)
    with pytest.raises(ValueError, match="lora-step00000003.state does not fit this run"):
        train(run, model)
    assert run.step == 3


def test_a_difference_is_named_with_both_values(tmp_path):
    run_and_save(tmp_path / "lora")
    with pytest.raises(ValueError, match="seed 7, this run has 8"):
        resumed(make_run()[0], find_state(tmp_path, "lora", "latest"), Identity(named={"seed": 8}))


def test_a_run_that_is_done_says_how_to_train_on(tmp_path):
    run_and_save(tmp_path / "lora")
    run, _ = make_run(dataclasses.replace(PLAN, steps=3))
    with pytest.raises(ValueError, match="already at step 3 of 3; raise steps"):
        resumed(run, find_state(tmp_path, "lora", "latest"), OURS)


def test_a_run_that_was_stopped_between_its_last_step_and_its_final_file_can_be_ended(tmp_path):
    """A killed process, or a cancel while the last step is measured or shown."""
    folder = tmp_path / "lora"
    _, saver = run_and_save(folder, 3)
    whole = safetensors.torch.load_file(saver.final)
    saver.final.unlink()
    run, model = make_run(dataclasses.replace(PLAN, steps=3))
    resumed(run, find_state(tmp_path, "lora", "latest"), OURS)
    with attached(model, run.network):
        assert list(run.steps()) == []
    final = saver_of(run, folder).save_final(run)
    assert_equal_states(safetensors.torch.load_file(final), whole)
    # nor does the finished file of a shorter run count
    (folder / "lora-step00000002.safetensors").replace(final)
    resumed(
        make_run(dataclasses.replace(PLAN, steps=3))[0], folder / "lora-step00000003.state", ANY
    )


def test_resume_latest_without_a_state_starts_afresh_and_a_missing_file_is_named(tmp_path):
    assert find_state(tmp_path, "lora", "latest") is None
    assert find_state(tmp_path, "lora", "") is None
    with pytest.raises(ValueError, match="there is no file .*gone.state"):
        find_state(tmp_path, "lora", "gone.state")


def test_latest_is_of_this_name_only_and_of_its_newest_folder(tmp_path):
    for folder in ("lora", "lora_2", "lora_big", "lora[1]"):
        name = folder.removesuffix("_2")
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}-step00000005.state").write_bytes(b"")
    assert find_state(tmp_path, "lora", "latest").parent.name in ("lora", "lora_2")
    assert find_state(tmp_path, "lora[1]", "latest").parent.name == "lora[1]"
    assert find_state(tmp_path, "lora_big", "latest").parent.name == "lora_big"


def test_a_run_saves_beside_its_own_state_and_never_beside_a_foreign_one(tmp_path):
    root, elsewhere = tmp_path / "loras", tmp_path / "elsewhere"
    own, foreign = root / "lora" / "lora-step00000002.state", elsewhere / "lora-step00000002.state"
    for path in (own, foreign):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    assert run_folder(root, "lora", own) == own.parent
    assert run_folder(root, "lora", foreign) == root / "lora_2"
    assert run_folder(root, "other", own) == root / "other"
    assert run_folder(root, "lora", None) == free_folder(root, "lora") == root / "lora_2"


def test_a_resume_takes_up_the_checkpoints_and_clears_what_a_killed_process_left(tmp_path):
    folder = tmp_path / "lora"
    run_and_save(folder, 3)
    leftover = folder / f".lora-step00000004.safetensors.{'0a' * 16}.partial"
    leftover.write_bytes(b"half")
    run, _ = make_run()
    resumed(run, folder / "lora-step00000002.state", OURS)
    saver = saver_of(run, folder)
    saver.continued(run)
    assert [file.step for file in saver.checkpoints().files] == [1, 2]
    assert not leftover.exists()


def test_states_hold_tensors_numbers_and_text_exactly(tmp_path):
    state = {
        "a": [1, 2.5, None, True, "text", {"b": torch.arange(3), 4: torch.tensor(1.5)}],
        "bf16": torch.randn(2, 3).bfloat16(),
        "empty": torch.zeros(0, 2),
        "nested": {"inf": float("inf"), "tiny": 5e-324, "version": (2, 0)},
    }
    write_state(tmp_path / "x.state", state)
    back = read_state(tmp_path / "x.state")
    assert back["a"][:5] == state["a"][:5] and back["nested"] == state["nested"]
    assert torch.equal(back["a"][5]["b"], torch.arange(3)) and 4 in back["a"][5]
    assert torch.equal(back["bf16"], state["bf16"]) and back["empty"].shape == (0, 2)


def test_a_tensor_in_several_places_is_written_once(tmp_path):
    """As the code book that all states of an 8-bit optimizer share; files have no aliases."""
    book = torch.randn(10_000)
    write_state(tmp_path / "x.state", {"a": {"book": book}, "b": [book]})
    assert (tmp_path / "x.state").stat().st_size < 60_000
    back = read_state(tmp_path / "x.state")
    assert torch.equal(back["a"]["book"], book) and torch.equal(back["b"][0], book)


class Packed(torch.Tensor):
    """As torchao's 8-bit states: values that are computed from tensors inside."""


@pytest.mark.parametrize("unsavable", [object(), torch.zeros(2).as_subclass(Packed)])
def test_an_optimizer_state_that_only_pickle_could_save_is_refused(unsavable, tmp_path):
    with pytest.raises(ValueError, match="optimizer/group is a (object|Packed); turn save_state"):
        write_state(tmp_path / "x.state", {"optimizer": {"group": unsavable}})
    assert names(tmp_path) == []


def test_the_fingerprint_of_data_sees_every_value_and_their_order():
    tensors = [torch.zeros(2, 3), torch.ones(2, 3)]
    data = [(tensors[0], [[tensors[1], {"pooled_output": tensors[0], "caption": "a"}]])]
    whole = fingerprint(data)
    assert whole == fingerprint([(torch.zeros(2, 3), data[0][1])])
    others = [
        [(tensors[1], data[0][1])],
        [(tensors[0].reshape(3, 2), data[0][1])],
        [(tensors[0].double(), data[0][1])],
        [(tensors[0], [[tensors[1], {"pooled_output": tensors[0], "caption": "b"}]])],
        [(tensors[0], [[tensors[1], {"pooled_output": tensors[1], "caption": "a"}]])],
        data * 2,
    ]
    assert len({whole, *map(fingerprint, others)}) == 1 + len(others)
    assert fingerprint(tensors) != fingerprint(tensors[::-1])
