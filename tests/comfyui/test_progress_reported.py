import comfy.model_management as mm
import comfy.utils
import numpy as np
import pytest

from comfyui_braid.engine.comfyui.progress import reported


@pytest.fixture
def shown(monkeypatch):
    """What the host was told: (value, total, preview)."""
    calls = []

    def hook(value, total, preview, node_id=None):
        calls.append((value, total, preview))

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    return calls


@pytest.fixture
def interrupt():
    yield lambda: mm.interrupt_current_processing(True)
    mm.interrupt_current_processing(False)


def test_every_step_passes_through_and_the_bar_ends_full(shown):
    assert list(reported(iter("abc"), total=3)) == ["a", "b", "c"]
    assert shown[-1] == (3, 3, None)


def test_a_picture_is_shown_for_the_first_and_the_last_step_and_not_for_each(shown):
    drawn = []

    def picture(step):
        drawn.append(step)
        return np.full((4, 6, 3), 7, dtype=np.uint8)

    list(reported(range(50), total=50, picture=picture, picture_every_s=1e6))
    assert drawn == [0, 49]
    form, image, limit = shown[-1][2]
    assert (form, image.mode, image.size, limit) == ("PNG", "RGB", (6, 4), None)


def test_cancel_rises_after_the_step_it_interrupts_was_seen_and_closes_the_steps(interrupt):
    closed, seen = [], []

    def steps():
        try:
            yield from range(10)
        finally:
            closed.append(True)

    with pytest.raises(mm.InterruptProcessingException):
        for step in reported(steps(), total=10):
            seen.append(step)
            if step == 2:
                interrupt()
    assert seen == [0, 1, 2]
    assert closed == [True]


def test_cancel_before_the_first_step_does_no_work(interrupt):
    interrupt()
    started = []
    with pytest.raises(mm.InterruptProcessingException):
        list(reported((started.append(n) for n in range(3)), total=3))
    assert started == []


def test_leaving_the_loop_early_closes_the_steps():
    closed = []

    def steps():
        try:
            yield from range(10)
        finally:
            closed.append(True)

    loop = reported(steps(), total=10)
    next(loop)
    loop.close()
    assert closed == [True]
