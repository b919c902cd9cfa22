"""The room that a run will take: in bytes, against the disk that is there."""

import pytest

from comfyui_braid.engine.training.options import Checkpointing
from comfyui_braid.engine.training.states.room import refuse_without_room, room_needed, tight

MIB = 2**20
PARAMETERS = MIB // 4


def needed(steps=100, **checkpointing):
    return room_needed(PARAMETERS, Checkpointing(**checkpointing), steps, shadows=5)


@pytest.mark.parametrize(
    "checkpointing, mib",
    [
        ({}, 1),
        ({"save_every_n_steps": 10}, 10 + 1),
        ({"save_every_n_steps": 10, "save_last_n": 2}, 2 + 1 + 1),
        ({"save_every_n_steps": 60, "save_last_n": 2}, 1 + 1),
        ({"save_every_n_steps": 50, "save_state": True}, 3 * (1 + 3)),
        ({"ema_shadows": True}, 1 + 5),
        ({"save_every_n_steps": 50, "save_state": True, "ema_shadows": True}, 3 * (1 + 8) + 5),
    ],
    ids=str,
)
def test_every_file_that_is_kept_at_once_counts(checkpointing, mib):
    assert needed(**checkpointing).total == mib * MIB


def test_an_adapter_file_that_holds_more_numbers_than_are_trained_takes_more_room():
    checkpointing = Checkpointing(save_state=True, ema_shadows=True)
    given = (PARAMETERS, checkpointing, 100)
    room = room_needed(*given, shadows=5, filed_parameters=2 * PARAMETERS)
    assert room.total == (2 + (3 + 5) + 5 * 2) * MIB


def test_a_run_that_fits_is_silent_and_one_that_may_not_is_told_what_it_takes(tmp_path):
    folder = tmp_path / "to be made" / "run"
    assert tight(needed(), folder) == ""
    sentence = tight(needed(steps=10**12, save_every_n_steps=1), folder)
    assert "are free in" in sentence
    assert sentence.startswith("the files of this run may not fit: they take up to 976562500.0 GiB")


def test_only_a_run_whose_finished_lora_cannot_fit_is_refused(tmp_path):
    refuse_without_room(PARAMETERS, tmp_path)
    with pytest.raises(
        ValueError, match="the finished LoRA takes 3725290.3 GiB, and there is room"
    ):
        refuse_without_room(10**15, tmp_path)
    assert list(tmp_path.iterdir()) == []
