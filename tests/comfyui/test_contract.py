"""The public interface: node ids, inputs and outputs that shared workflows rely on."""

import json
from pathlib import Path

import pytest
from host.awaiting import awaited

import comfyui_braid

ROOT = Path(__file__).resolve().parent.parent.parent
CONTRACT = json.loads((ROOT / "tests" / "goldens" / "contract.json").read_text())


@pytest.fixture(scope="module")
def nodes():
    extension = awaited(comfyui_braid.comfy_entrypoint())
    return {node.GET_SCHEMA().node_id: node for node in awaited(extension.get_node_list())}


def inputs_of(node) -> set[str]:
    found = set()

    def visit(inputs: dict, prefix: str) -> None:
        for part in ("required", "optional"):
            for name, (kind, *rest) in inputs.get(part, {}).items():
                found.add(prefix + name)
                if kind == "COMFY_DYNAMICCOMBO_V3":
                    for option in rest[0]["options"]:
                        visit(option["inputs"], f"{prefix}{name}.")

    visit(node.INPUT_TYPES(), "")
    return found


def test_the_entry_point_lists_exactly_the_promised_nodes(nodes):
    assert set(nodes) == set(CONTRACT)


@pytest.mark.parametrize("node_id", CONTRACT)
def test_inputs_and_outputs_are_the_promised_ones(node_id, nodes):
    schema = nodes[node_id].GET_SCHEMA()
    assert set(CONTRACT[node_id]["inputs"]) <= inputs_of(nodes[node_id])
    assert [[o.id, o.io_type] for o in schema.outputs] == CONTRACT[node_id]["outputs"]


@pytest.mark.parametrize("node_id", CONTRACT)
def test_every_node_input_and_output_explains_itself(node_id, nodes):
    schema = nodes[node_id].GET_SCHEMA()
    assert schema.description and schema.category.startswith("Braid/")
    undocumented = [i.id for i in _all_inputs(schema) if not i.tooltip]
    undocumented += [o.id for o in schema.outputs if not o.tooltip]
    assert undocumented == []


@pytest.mark.parametrize("node_id", CONTRACT)
def test_every_node_has_a_help_page(node_id, nodes):
    page = ROOT / "web" / "docs" / f"{node_id}.md"
    assert len(page.read_text(encoding="utf-8")) > 300


@pytest.mark.parametrize("node_id", CONTRACT)
def test_every_help_page_names_every_input(node_id, nodes):
    text = (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    missing = [i.id for i in _all_inputs(nodes[node_id].GET_SCHEMA()) if i.id not in text]
    assert missing == []


def test_every_node_stands_in_an_example_workflow_or_a_blueprint():
    files = [*ROOT.glob("example_workflows/*.json"), *ROOT.glob("subgraphs/*.json")]
    shown = {kind for file in files for kind in _node_types(json.loads(file.read_text()))}
    assert set(CONTRACT) - shown == set()


@pytest.mark.parametrize(
    "workflow", sorted(ROOT.glob("example_workflows/*.json")), ids=lambda p: p.stem
)
def test_every_workflow_has_a_thumbnail(workflow):
    assert workflow.with_suffix(".jpg").stat().st_size < 150_000


def _node_types(workflow: dict):
    subgraphs = workflow.get("definitions", {}).get("subgraphs", [])
    for graph in (workflow, *subgraphs):
        yield from (node["type"] for node in graph["nodes"])


def _all_inputs(schema):
    for declared in schema.inputs:
        yield declared
        for option in getattr(declared, "options", None) or []:
            yield from getattr(option, "inputs", [])
