"""Workflow files, read as the prompts that the API takes; `tools/graph.py` writes them.

A workflow file lists the values of a node's widgets without their names, in the order in which the
front end makes them: the node's inputs in order, the fields of a DynamicCombo right after it, and
one more value after a seed with `control_after_generate`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .find import PACK

EXAMPLES = PACK / "example_workflows"
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COLOR", "COMBO", DYNAMIC_COMBO}
NOTES = {"Note", "MarkdownNote"}
BYPASSED = 4
"""Mode of a node that does not run and passes on what it is given."""


def read_workflow(path: Path) -> dict:
    return json.loads(path.read_text())


def lacking(workflow: dict, object_info: dict) -> list[str]:
    """Nodes of a workflow that a ComfyUI does not have: core nodes that came later."""
    kinds = {node["type"] for node in workflow["nodes"]} - NOTES
    return sorted(kinds - set(object_info))


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """The API-format prompt of a workflow, as the front end would queue it."""
    links = {link[0]: link for link in workflow["links"]}
    nodes = {node["id"]: node for node in workflow["nodes"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES or node["mode"] == BYPASSED:
            continue
        widgets = named_widgets(node, object_info[node["type"]])
        inputs = {name: value for name, _, _, value in widgets}
        for slot in node.get("inputs", []):
            source = _source(slot, links, nodes)
            if source is not None:
                inputs[slot["name"]] = source
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _source(slot: dict, links: dict, nodes: dict) -> list | None:
    """[node, output] that feeds an input slot; a bypassed node is its first input of that type."""
    if slot.get("link") is None:
        return None
    _, origin, origin_slot, _, _, kind = links[slot["link"]]
    node = nodes[origin]
    if node["mode"] != BYPASSED:
        return [str(origin), origin_slot]
    through = next((each for each in node["inputs"] if each["type"] == kind), {})
    return _source(through, links, nodes)


def named_widgets(node: dict, info: dict) -> list[tuple[str, Any, dict, Any]]:
    """(name, type, options, value) of every widget, as the front end gives a file's values out.

    Widgets that the file does not know yet have their defaults; ValueError when values are left.
    """
    values = iter(node.get("widgets_values", []))
    widgets = list(_take(declared(info["input"], info.get("input_order")), values, ""))
    left = list(values)
    if left:
        raise ValueError(f"{node['type']} has no widgets for {left}")
    return widgets


def declared(inputs: dict, order: dict | None = None) -> Iterator[tuple[str, Any, dict]]:
    """(name, type, options) of every declared input, required before optional."""
    for part in ("required", "optional"):
        declared = inputs.get(part, {})
        for name in (order or {}).get(part, declared):
            kind, *rest = declared[name]
            yield name, kind, rest[0] if rest else {}


def _take(inputs, values: Iterator, prefix: str) -> Iterator[tuple[str, Any, dict, Any]]:
    for name, kind, options in inputs:
        if not is_widget(kind, options):
            continue
        value = next(values, options.get("default"))
        yield prefix + name, kind, options, value
        if options.get("control_after_generate"):
            next(values, None)
        if kind == DYNAMIC_COMBO:
            chosen = next(o for o in options["options"] if o["key"] == value)
            yield from _take(declared(chosen["inputs"]), values, f"{prefix}{name}.")


def is_widget(kind: Any, options: dict) -> bool:
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")


def default(kind: Any, options: dict) -> Any:
    if "default" in options:
        return options["default"]
    if isinstance(kind, list):
        return kind[0]
    if kind == DYNAMIC_COMBO:
        return options["options"][0]["key"]
    if kind == "COMBO":
        return options["options"][0]
    return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}[kind]
