"""A stranger's workflow with a regular expression that never ends, in a real server."""

import json
import statistics
import time
import uuid

import pytest

BOMB = r"(?:.|.)*[!?]"


def prompt(server, exclude):
    """Preview LoRA Targets of the playground's model."""
    network = server.object_info()["BraidNetwork"]["input"]["required"]
    defaults = {key: spec[1]["default"] for key, spec in network.items()}
    return {
        "1": {"class_type": "BraidPlaygroundModel", "inputs": {}},
        "2": {"class_type": "BraidNetwork", "inputs": defaults | {"exclude_patterns": exclude}},
        "3": {
            "class_type": "BraidPreviewTargets",
            "inputs": {"model": ["1", 0], "network": ["2", 0]},
        },
    }


def fp8_prompt(exclude):
    return {
        "1": {
            "class_type": "BraidFp8Loader",
            "inputs": {
                "unet_name": "braid_playground.safetensors",
                "granularity": "tensor",
                "fp8_format": "e4m3fn",
                "scale_search": "amax",
                "include_patterns": "",
                "exclude_patterns": exclude,
            },
        },
        "2": {"class_type": "BraidSaveFp8", "inputs": {"model": ["1", 0], "filename_prefix": "x"}},
    }


def queued(server, prompt) -> str:
    """The id of a prompt that is queued or runs."""
    answer = server.post("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})
    assert not answer.get("node_errors"), json.dumps(answer)
    return answer["prompt_id"]


def error_of(entry) -> dict:
    (error,) = [said for kind, said in entry["status"]["messages"] if kind == "execution_error"]
    return error


def ended(server, prompt_id) -> tuple[dict, list[float]]:
    """Its history entry, and how long each request took that was made meanwhile."""
    waited, deadline = [], time.monotonic() + 120
    while True:
        begun = time.monotonic()
        history = server.get(f"/history/{prompt_id}")
        waited.append(time.monotonic() - begun)
        if history:
            return history[prompt_id], waited
        assert time.monotonic() < deadline, server.log()[-3000:]
        time.sleep(0.05)


def test_requests_are_answered_at_once_beside_a_pattern_that_never_ends_and_it_is_refused(server):
    entry, waited = ended(server, queued(server, prompt(server, BOMB)))
    assert len(waited) > 5 and statistics.median(waited) < 1.0
    error = error_of(entry)
    assert error["node_type"] == "BraidPreviewTargets"
    assert error["exception_message"].startswith("exclude_patterns: the patterns took over 3 s")


def test_an_interrupt_beside_a_pattern_that_never_ends_frees_the_server_for_the_next_prompt(server):
    prompt_id = queued(server, fp8_prompt(BOMB))
    while not server.get("/queue")["queue_running"]:
        time.sleep(0.05)
    server.post("/interrupt", {})
    entry, _ = ended(server, prompt_id)
    assert entry["status"]["status_str"] == "error"
    report = server.queue(prompt(server, ".*qkv"))["outputs"]["3"]["text"][0]
    assert "exclude_patterns" in report and "layers adapted" in report


@pytest.mark.parametrize("bomb", ["(" * 5000 + ")" * 5000, "a{99999999999}", "a{4294967294}"])
def test_a_pattern_that_cannot_be_built_is_one_sentence_at_its_node(server, bomb):
    error = error_of(ended(server, queued(server, prompt(server, bomb)))[0])
    assert error["node_type"] == "BraidNetwork" and error["exception_type"] == "ValueError"
    assert error["exception_message"].startswith("exclude_patterns: '")
