"""Every example workflow in a real browser: it opens whole, quietly, and runs as the API does."""

import pytest
from host.browse import MISPLACED
from host.workflows import EXAMPLES, to_prompt

WORKFLOWS = sorted(EXAMPLES.glob("*.json"))
LOAD = """async (workflow) => {
    await app.loadGraphData(workflow);
    await new Promise((done) => setTimeout(done, 1500));  // Nodes 2.0 measures what it has drawn
    const types = LiteGraph.registered_node_types;
    const missing = app.graph.nodes.filter((n) => !types[n.type]).map((n) => n.type);
    return { missing, prompt: (await app.graphToPrompt()).output };
}"""


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
@pytest.mark.parametrize("vue_nodes", [False, True], ids=["litegraph", "nodes2"])
def test_every_workflow_opens_without_missing_nodes_or_console_errors(
    vue_nodes, path, example, open_page, console_errors, server
):
    workflow = example(path)
    page = open_page({"Comfy.VueNodes.Enabled": vue_nodes})
    loaded = page.evaluate(LOAD, workflow)
    assert loaded["missing"] == []
    assert console_errors == []
    assert page.evaluate(MISPLACED) == []
    if not vue_nodes:
        assert _prompt(loaded) == to_prompt(workflow, server.object_info())


def _prompt(loaded: dict) -> dict:
    """The front end's prompt, without what it adds for itself."""
    return {
        number: {"class_type": node["class_type"], "inputs": node["inputs"]}
        for number, node in loaded["prompt"].items()
    }
