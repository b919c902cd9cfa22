"""The workflows for real models, over the API: whole but for the files that a user brings."""

import pytest
from host.workflows import EXAMPLES, read_workflow, to_prompt

NAMES = ["10_flux_train_lora", "11_wan_train_lora", "12_qwen_image_train_lora"]
BROUGHT = {"unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name", "folder"}
"""Combos of model files, and of the folder with the training pictures."""


@pytest.mark.parametrize("name", NAMES)
def test_only_the_files_a_user_brings_are_missing(name, server, example):
    workflow = example(EXAMPLES / f"{name}.json")
    prompt = to_prompt(workflow, server.object_info())
    answer = server.post("/prompt", {"prompt": prompt, "client_id": "nobody"})
    errors = [e for node in answer["node_errors"].values() for e in node["errors"]]
    assert {error["type"] for error in errors} == {"value_not_in_list"}
    missing = {error["extra_info"]["input_name"] for error in errors}
    assert {"unet_name", "vae_name", "folder"} <= missing <= BROUGHT


@pytest.mark.parametrize("name", NAMES)
def test_every_loader_says_where_its_files_come_from(name):
    for node in read_workflow(EXAMPLES / f"{name}.json")["nodes"]:
        if not node["type"].endswith("Loader") or node["type"].startswith("Lora"):
            continue
        for file in node["properties"]["models"]:
            assert file["name"] in node["widgets_values"]
            assert file["url"].endswith(file["name"]) and file["directory"]
