"""Every workflow that needs no download, run by a real server over its API, with few steps."""

import contextlib
import functools
import json
import os
from pathlib import Path

import pytest
from host.browse import FIT, MISPLACED
from host.find import PACK, find_comfyui
from host.live_nodes import KINDS, PICTURED
from host.prompts import prompt_nodes
from host.workflows import EXAMPLES, read_workflow, to_prompt

WORKFLOWS = sorted(EXAMPLES.glob("0*.json"))
FEWER = {
    "BraidTrainLora": {"steps": 6, "batch_size": 2},
    "BraidCheckpointing": {"save_every_n_steps": 2},
    "BraidValidation": {"every_n_steps": 3, "timesteps_per_item": 2},
    "BraidTrainingPreview": {"sample_every_n_steps": 3, "steps": 2},
}

MAY_WRITE = ("server/output/", "server/temp/", "server/user/")
OTHERS_WRITE = (
    "server/server.log",  # the launcher
    "server/home/.cache/matplotlib/",  # its list of fonts, when the first picture is drawn
    "ComfyUI/output/",  # tests in another process
    "ComfyUI/temp/",
)
NO_PART = {".git", ".venv", ".pytest_cache", ".ruff_cache", "__pycache__", "demo_report"}
"""Of a checkout: where tests, linters, `make demo` and Python itself write."""


@pytest.fixture(scope="module")
def run(server, example):
    """run(path) -> the outputs of a workflow file; each is run once."""

    @functools.cache
    def run_once(path) -> dict:
        prompt = to_prompt(example(path), server.object_info())
        for node in prompt.values():
            for name, value in FEWER.get(node["class_type"], {}).items():
                node["inputs"][name] = value
        return server.queue(prompt, timeout=300)["outputs"]

    return run_once


@pytest.fixture(scope="module", autouse=True)
def before(server):
    """The files that there were before anything ran."""
    return files(server)


def files(server) -> set[str]:
    """Every file of the server's folders (its HOME and /tmp too), the pack and ComfyUI."""
    found = set()
    for name, root in (("server", server.base), ("pack", PACK), ("ComfyUI", find_comfyui())):
        for folder, folders, here in os.walk(root):
            folders[:] = [each for each in folders if each not in NO_PART]
            found |= {f"{name}/{Path(folder, file).relative_to(root).as_posix()}" for file in here}
    return found


RUN = """async ([workflow, fewer]) => {
    await app.loadGraphData(workflow);
    for (const { type, widgets } of app.graph.nodes)
        for (const [name, value] of Object.entries(fewer[type] ?? {}))
            widgets.find((widget) => widget.name === name).value = value;
    const ended = new Promise((done) => {
        app.api.addEventListener("execution_success", () => done("success"));
        app.api.addEventListener("execution_error", ({ detail }) => done(detail.exception_message));
    });
    await app.queuePrompt(0);
    return ended;
}"""


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes-2.0"])
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_after_a_run_the_nodes_with_their_pictures_are_in_their_groups(
    path, vue, run, open_page, console_errors, without_todays_front_end
):
    run(path)  # the same prompt, so that the one from the page is answered from the cache
    page = open_page({"Comfy.VueNodes.Enabled": vue})
    assert page.evaluate(RUN, [read_workflow(path), FEWER]) == "success"
    page.evaluate(FIT)
    page.wait_for_timeout(1500)
    assert console_errors == []
    if vue:
        without_todays_front_end("its Nodes 2.0 are taller and stand out of their groups")
    assert page.evaluate(MISPLACED) == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_playground_workflow_runs_to_its_end(path, run, server):
    shown = [image for node in run(path).values() for image in node.get("images", [])]
    assert shown
    assert all((server.base / image["type"] / image["filename"]).exists() for image in shown)


def training(server, **given) -> dict:
    """Prompt of a short run on the playground as node "run"; `given` are inputs of Train LoRA."""
    node = prompt_nodes(server.object_info())
    return {
        "model": node("BraidPlaygroundModel"),
        "data": node("BraidPlaygroundDataset", count=4),
        "network": node("BraidNetwork", network_dim=2),
        "run": node(
            "BraidTrainLora",
            model=["model", 0],
            latents=["data", 0],
            positive=["data", 1],
            network=["network", 0],
            mixed_precision="no",
            **given,
        ),
    }


def test_every_live_node_is_in_one_of_these_workflows():
    shown = {node["type"] for path in WORKFLOWS for node in read_workflow(path)["nodes"]}
    assert {*KINDS, *PICTURED} <= shown


def test_compile_and_load_checkpoints_run_though_workflows_show_them_switched_off(server):
    node = prompt_nodes(server.object_info())
    prompt = training(server, options=["kept", 0], steps=3, output_name="unshown") | {
        "compiled": node("BraidCompile", dynamo_backend="eager"),
        "kept": node("BraidCheckpointing", save_every_n_steps=1, options=["compiled", 0]),
        "save": node("BraidSaveLora", lora=["run", 0], filename_prefix="loras/unshown_saved"),
        "report": node("PreviewAny", source=["run", 3]),
    }
    entry = server.queue(prompt)
    report = json.loads(entry["outputs"]["report"]["text"][0])
    assert report["compiled"] == "6 blocks"
    assert list((server.base / "output" / "loras").glob("unshown_saved*.safetensors"))

    prompt = {
        "files": node("BraidLoadCheckpoints", folder="unshown"),
        "average": node("BraidPostHocEma", checkpoints=["files", 0]),
        "report": node("PreviewAny", source=["average", 2]),
    }
    entry = server.queue(prompt)
    assert json.loads(entry["outputs"]["report"]["text"][0])["steps"] == [1, 2, 3]


def test_a_log_says_which_package_it_lacks_before_anything_is_trained(server):
    node = prompt_nodes(server.object_info())
    prompt = training(server, options=["log", 0], output_name="unlogged")
    with pytest.raises(RuntimeError, match="pip install tensorboard"):
        server.queue(prompt | {"log": node("BraidTrainingLog")})
    assert not list((server.base / "output").rglob("unlogged*.safetensors"))


def test_nothing_was_written_outside_output_temp_and_user(run, server, before):
    for path in WORKFLOWS:
        with contextlib.suppress(pytest.skip.Exception):  # told where it is run by itself
            run(path)
    written = files(server) - before
    assert [path for path in written if not path.startswith(MAY_WRITE + OTHERS_WRITE)] == []
    assert any(path.startswith("server/output/loras/") for path in written)
