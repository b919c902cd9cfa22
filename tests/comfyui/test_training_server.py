"""A run in a real ComfyUI over its API: cancelled in the middle, resumed from the node."""

import json
import time
import uuid

import pytest
import safetensors
import safetensors.torch
import torch
from host.prompts import prompt_nodes
from host.serve import Server

STEPS = 30


@pytest.fixture(scope="module")
def server():
    with Server.start(absent=()) as running:  # it logs to TensorBoard
        yield running


def prompt(server, name, resume):
    """Playground training with checkpoints, TensorBoard and previews; the rest are defaults."""
    node = prompt_nodes(server.object_info())
    return {
        "1": node("BraidPlaygroundModel"),
        "2": node("BraidPlaygroundDataset", count=4),
        "3": node("BraidNetwork", network_dim=4),
        "4": node("BraidCheckpointing", save_every_n_steps=4, ema_shadows=True, resume=resume),
        "5": node("BraidTrainingLog", options=["4", 0]),
        "6": node("EmptySD3LatentImage", width=128, height=128),
        "7": node(
            "BraidTrainingPreview",
            sample_every_n_steps=10,
            latent=["6", 0],
            steps=2,
            options=["5", 0],
        ),
        "8": node(
            "BraidTrainLora",
            model=["1", 0],
            latents=["2", 0],
            positive=["2", 1],
            network=["3", 0],
            options=["7", 0],
            steps=STEPS,
            output_name=name,
            mixed_precision="no",
        ),
    }


def folder(server, name):
    return server.base / "output" / "loras" / name


def tensors(path):
    return safetensors.torch.load_file(path)


def assert_equal_files(one, other):
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def cancelled(server, name):
    """Queue a run, cancel it once its first checkpoint is there; its history entry."""
    body = {"prompt": prompt(server, name, resume=""), "client_id": uuid.uuid4().hex}
    answer = server.post("/prompt", body)
    assert "prompt_id" in answer, json.dumps(answer)
    deadline = time.monotonic() + 240
    while not list(folder(server, name).glob("*-step*.safetensors")):
        assert time.monotonic() < deadline, server.log()[-3000:]
        time.sleep(0.02)
    server.post("/interrupt", {})
    while not (entry := server.get(f"/history/{answer['prompt_id']}")):
        assert time.monotonic() < deadline, server.log()[-3000:]
        time.sleep(0.1)
    return entry[answer["prompt_id"]]


def test_cancel_over_the_api_and_resume_from_the_node_equal_an_uninterrupted_run(server):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    entry = cancelled(server, "part")
    assert "execution_interrupted" in json.dumps(entry["status"])
    states = sorted(folder(server, "part").glob("*.state"))
    stopped_at = int(states[-1].stem[-8:])
    assert 4 <= stopped_at < STEPS and not (folder(server, "part") / "part.safetensors").exists()
    assert "cancelled at step" in server.log() and "resume = latest" in server.log()

    server.queue(prompt(server, "part", resume="latest"))
    server.queue(prompt(server, "whole", resume=""))
    assert not folder(server, "part_2").exists()
    for name in ("{}.safetensors", "{}-shadows.safetensors", "{}-step00000028.safetensors"):
        assert_equal_files(
            folder(server, "part") / name.format("part"),
            folder(server, "whole") / name.format("whole"),
        )
    previews = [path.name for path in sorted((folder(server, "part") / "preview").iterdir())]
    assert previews == [f"step{step:08d}.png" for step in (10, 20, 30)]

    logged = []
    for run in sorted((server.base / "output" / "logs").iterdir()):
        events = accumulator.EventAccumulator(str(run / "network_train"), {"scalars": 0})
        events.Reload()
        logged.append([event.step for event in events.Scalars("loss/current")])
    first, second, whole = logged
    assert first == list(range(1, stopped_at + 1))
    assert second == list(range(stopped_at + 1, STEPS + 1))
    assert whole == list(range(1, STEPS + 1))
