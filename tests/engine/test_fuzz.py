"""Damaged files and hostile texts, the short way; `make fuzz` is the long one."""

import os
import time

import pytest

harness = pytest.importorskip("fuzz.harness", reason="children are made by fork")
from fuzz.target import Target  # noqa: E402
from fuzz.targets import FILES, TEXTS  # noqa: E402

INPUTS = 160


@pytest.mark.parametrize("target", FILES, ids=lambda target: target.name)
def test_a_damaged_file_is_read_or_refused_in_one_sentence_with_its_name(target, tmp_path):
    tally = harness.fuzz(target, range(INPUTS), tmp_path)
    assert tally.failures == []
    assert tally.counts["refused"] > INPUTS // 4 and tally.counts["read"] > INPUTS // 20


@pytest.mark.parametrize("target", TEXTS, ids=lambda target: target.name)
def test_a_typed_text_is_taken_or_refused_in_one_sentence(target, tmp_path):
    tally = harness.fuzz(target, range(INPUTS), tmp_path)
    assert tally.failures == []
    assert tally.counts["refused"] > 0 and tally.counts["read"] > 0


def _raises(error):
    def read(given, folder):
        raise error

    return read


def _grows(given, folder):
    given[0] = b"1" * (64 << 20)  # so much is never taken from what the process has freed


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (_raises(KeyError("step")), "raw"),
        (_raises(SystemExit(0)), "raw"),
        (_raises(ValueError("damaged\nTraceback")), "sentence"),
        (_raises(ValueError("damaged: " + "a" * 1000)), "sentence"),
        (_raises(ValueError("damaged: KeyError 'step'")), "sentence"),
        (_raises(ValueError("a sentence without the name of the file")), "sentence"),
        (lambda given, folder: b"\xff".decode(), "sentence"),
        (lambda given, folder: time.sleep(60), "hang"),
        (lambda given, folder: sum(range(10**8)), "hang"),
        (_grows, "memory"),
        (lambda given, folder: os._exit(0), "crash"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_other_answer_is_found_and_the_next_input_is_read(read, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "MOST_SECONDS", 0.2)
    monkeypatch.setattr(harness, "PATIENCE_SECONDS", 3.0)
    monkeypatch.setattr(harness, "MOST_BYTES", 32 << 20)

    def second_fails(given, folder):
        if given[1] == 1:
            read(given, folder)

    target = Target(name="bad", make=lambda rng: None, read=second_fails, is_file=True)
    monkeypatch.setattr(harness, "input_of", lambda target, number: [None, number])
    tally = harness.fuzz(target, range(3), tmp_path)
    assert [(failure.number, failure.kind) for failure in tally.failures] == [(1, kind)]
    assert tally.counts["read"] == 2
