"""Every workflow that needs no download, run by a real server over its API, with few steps."""

import json

import pytest
from host.workflows import EXAMPLES, Graph, read_workflow, to_prompt

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


def test_compile_and_load_checkpoints_run_though_workflows_show_them_switched_off(server):
    graph = Graph(server.object_info())
    graph.column("", "#000")
    model = graph.add("BraidPlaygroundModel")
    data = graph.add("BraidPlaygroundDataset", count=4)
    network = graph.add("BraidNetwork", network_dim=2)
    compiled = graph.add("BraidCompile", dynamo_backend="eager")
    kept = graph.add("BraidCheckpointing", save_every_n_steps=1, options=compiled["options"])
    trained = graph.add(
        "BraidTrainLora",
        model=model["model"],
        latents=data["latents"],
        positive=data["positive"],
        network=network["network"],
        options=kept["options"],
        steps=3,
        mixed_precision="no",
        output_name="unshown",
    )
    graph.add("BraidSaveLora", lora=trained["lora"], filename_prefix="loras/unshown_saved")
    graph.add("PreviewAny", source=trained["report"])
    entry = server.queue(to_prompt(graph.to_json(), server.object_info()))
    report = next(
        o["text"][0] for o in entry["outputs"].values() if "text" in o and "plan" in str(o)
    )
    assert json.loads(report)["compiled"] == "6 blocks"
    assert list((server.base / "output" / "loras").glob("unshown_saved*.safetensors"))

    graph = Graph(server.object_info())
    graph.column("", "#000")
    checkpoints = graph.add("BraidLoadCheckpoints", folder="unshown")
    average = graph.add("BraidPostHocEma", checkpoints=checkpoints["checkpoints"])
    graph.add("PreviewAny", source=average["report"])
    entry = server.queue(to_prompt(graph.to_json(), server.object_info()))
    reports = [o["text"][0] for o in entry["outputs"].values() if "text" in o]
    assert json.loads(reports[0])["steps"] == [1, 2, 3]
