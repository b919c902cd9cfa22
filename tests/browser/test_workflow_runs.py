"""Every workflow that needs no download, run by a real server over its API, with few steps."""

import pytest
from host.workflows import EXAMPLES, read_workflow, to_prompt

WORKFLOWS = sorted(EXAMPLES.glob("0*.json"))
FEWER = {
    "BraidTrainLora": {"steps": 6, "batch_size": 2},
    "BraidCheckpointing": {"save_every_n_steps": 2},
    "BraidValidation": {"every_n_steps": 3, "timesteps_per_item": 2},
    "BraidTrainingPreview": {"sample_every_n_steps": 3, "steps": 2},
}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_playground_workflow_runs_to_its_end(path, server):
    prompt = to_prompt(read_workflow(path), server.object_info())
    for node in prompt.values():
        for name, value in FEWER.get(node["class_type"], {}).items():
            node["inputs"][name] = value
    outputs = server.queue(prompt, timeout=300)["outputs"]
    shown = [image for node in outputs.values() for image in node.get("images", [])]
    assert shown
    assert all((server.base / image["type"] / image["filename"]).exists() for image in shown)
