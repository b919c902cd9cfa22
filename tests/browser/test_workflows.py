"""Every example workflow in a real browser: it opens whole, quietly, and means what the API runs."""

import pytest
from host.workflows import EXAMPLES, read_workflow, to_prompt

WORKFLOWS = sorted(EXAMPLES.glob("*.json"))
NEEDS_DOWNLOADS = ("10_", "11_", "12_")
"""Workflows for real models: they open, but the models are not here to run them."""

HOST_ERRORS = (
    "Failed to load resource",  # a fresh installation lacks the user's own css and settings
    "ComfyApp graph accessed before initialization",  # the fixture waits for the graph
    "Content Security Policy",  # the template shown at first start asks for its models' sizes
)


def _is_the_host_s(error: str) -> bool:
    return any(known in error for known in HOST_ERRORS)


LOAD = """async (workflow) => {
    await app.loadGraphData(workflow);
    const nodes = app.graph.nodes ?? app.graph._nodes;
    const missing = nodes.filter((n) => !LiteGraph.registered_node_types[n.type]).map((n) => n.type);
    const overlapping = [];
    for (const a of nodes) for (const b of nodes) {
        if (a.id < b.id
            && a.pos[0] < b.pos[0] + b.size[0] && b.pos[0] < a.pos[0] + a.size[0]
            && a.pos[1] - 30 < b.pos[1] + b.size[1] && b.pos[1] - 30 < a.pos[1] + a.size[1])
            overlapping.push(`${a.id} ${a.type} and ${b.id} ${b.type}`);
    }
    const prompt = (await app.graphToPrompt()).output;
    return { missing, overlapping, prompt };
}"""


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["litegraph", "nodes2"])
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_opens_without_missing_nodes_or_console_errors(
    path, vue_nodes, open_page, console_errors, server
):
    page = open_page({"Comfy.VueNodes.Enabled": vue_nodes})
    workflow = read_workflow(path)
    loaded = page.evaluate(LOAD, workflow)
    assert loaded["missing"] == []
    assert [error for error in console_errors if not _is_the_host_s(error)] == []
    if vue_nodes:
        return
    assert loaded["overlapping"] == []
    ours = to_prompt(workflow, server.object_info())
    theirs = {
        number: {"class_type": node["class_type"], "inputs": node["inputs"]}
        for number, node in loaded["prompt"].items()
    }
    assert ours == theirs
