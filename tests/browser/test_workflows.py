"""Every example workflow in a real browser: it opens whole, quietly, and runs as the API does."""

import pytest
from host.browse import MISPLACED, SETTLED
from host.workflows import EXAMPLES, read_workflow, to_prompt

WORKFLOWS = sorted(EXAMPLES.glob("*.json"))
LOAD = """async (workflow) => {
    await app.loadGraphData(workflow);
    const types = LiteGraph.registered_node_types;
    const missing = app.graph.nodes.filter((n) => !types[n.type]).map((n) => n.type);
    return { missing, prompt: (await app.graphToPrompt()).output };
}"""


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
@pytest.mark.parametrize("vue_nodes", [False, True], ids=["litegraph", "nodes2"])
def test_every_workflow_opens_without_missing_nodes_or_console_errors(
    vue_nodes, path, example, open_page, console_errors, server, without_todays_front_end
):
    workflow = example(path)
    page = open_page({"Comfy.VueNodes.Enabled": vue_nodes})
    loaded = page.evaluate(LOAD, workflow)
    assert loaded["missing"] == []
    assert console_errors == []
    if vue_nodes:
        without_todays_front_end("its Nodes 2.0 are taller and stand out of their groups")
    else:
        assert _prompt(loaded) == to_prompt(workflow, server.object_info())
    page.evaluate(SETTLED)
    assert page.evaluate(MISPLACED) == []


AS_TEMPLATE = """async ([workflow, name]) => {
    await app.loadGraphData(workflow, true, true, name, { openSource: "template" });
    await new Promise((done) => setTimeout(done, 1500));
    return app.canvas.low_quality;
}"""


def test_the_first_workflow_opens_so_large_that_the_canvas_writes_its_texts(open_page, example):
    page = open_page({"Comfy.VueNodes.Enabled": False})
    page.set_viewport_size({"width": 1600, "height": 1000})
    (first,) = EXAMPLES.glob("01_*.json")
    assert page.evaluate(AS_TEMPLATE, [example(first), first.stem]) is False


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_groups_stand_in_rows_of_at_most_five(path):
    tops = [group["bounding"][1] for group in read_workflow(path)["groups"]]
    assert max(tops.count(top) for top in tops) <= 5


def _prompt(loaded: dict) -> dict:
    """The front end's prompt, without what it adds for itself."""
    return {
        number: {"class_type": node["class_type"], "inputs": node["inputs"]}
        for number, node in loaded["prompt"].items()
    }
