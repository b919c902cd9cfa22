"""Every example workflow in a real browser: it opens whole, quietly, and runs as the API does."""

import pytest
from host.workflows import EXAMPLES, read_workflow, to_prompt

WORKFLOWS = sorted(EXAMPLES.glob("*.json"))
LOAD = """async (workflow) => {
    await app.loadGraphData(workflow);
    await new Promise((done) => setTimeout(done, 1500));  // Nodes 2.0 measures what it has drawn
    const types = LiteGraph.registered_node_types;
    const missing = app.graph.nodes.filter((n) => !types[n.type]).map((n) => n.type);
    const overlapping = [];
    for (const a of app.graph.nodes) for (const b of app.graph.nodes) {
        if (a.id < b.id
            && a.pos[0] < b.pos[0] + b.size[0] && b.pos[0] < a.pos[0] + a.size[0]
            && a.pos[1] - 30 < b.pos[1] + b.size[1] && b.pos[1] - 30 < a.pos[1] + a.size[1])
            overlapping.push(`${a.id} ${a.type} and ${b.id} ${b.type}`);
    }
    return { missing, overlapping, prompt: (await app.graphToPrompt()).output };
}"""


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["litegraph", "nodes2"])
def test_every_workflow_opens_without_missing_nodes_or_console_errors(
    vue_nodes, open_page, console_errors, server
):
    page = open_page({"Comfy.VueNodes.Enabled": vue_nodes})
    object_info = server.object_info()
    for path in WORKFLOWS:
        workflow = read_workflow(path)
        loaded = page.evaluate(LOAD, workflow)
        assert loaded["missing"] == [], path.name
        assert console_errors == [], path.name
        assert loaded["overlapping"] == [], path.name
        if not vue_nodes:
            assert _prompt(loaded) == to_prompt(workflow, object_info), path.name


def _prompt(loaded: dict) -> dict:
    """The front end's prompt, without what it adds for itself."""
    return {
        number: {"class_type": node["class_type"], "inputs": node["inputs"]}
        for number, node in loaded["prompt"].items()
    }
