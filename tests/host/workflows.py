"""Workflow files: written from short descriptions, read back as the prompts that the API takes.

A workflow file lists the values of a node's widgets without their names, in the order in which the
front end makes them: the node's inputs in order, the fields of a DynamicCombo right after it, and
one more value after a seed with `control_after_generate`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .find import PACK

EXAMPLES = PACK / "example_workflows"
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC_COMBO}
NOTES = {"Note", "MarkdownNote"}
SLOT_HEIGHT, WIDGET_HEIGHT, TITLE_HEIGHT = 20, 24, 30


def read_workflow(path: Path) -> dict:
    return json.loads(path.read_text())


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """The API-format prompt of a workflow, as the front end would queue it."""
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        inputs = dict(_named_widgets(node, object_info[node["type"]]))
        for slot in node.get("inputs", []):
            if slot.get("link") is not None:
                _, source, source_slot, *_ = links[slot["link"]]
                inputs[slot["name"]] = [str(source), source_slot]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _named_widgets(node: dict, info: dict) -> Iterator[tuple[str, Any]]:
    values = iter(node.get("widgets_values", []))
    yield from _take(_declared(info["input"], info.get("input_order")), values, "")


def _declared(inputs: dict, order: dict | None = None) -> Iterator[tuple[str, Any, dict]]:
    """(name, type, options) of every declared input, required before optional."""
    for part in ("required", "optional"):
        declared = inputs.get(part, {})
        for name in (order or {}).get(part, declared):
            kind, *rest = declared[name]
            yield name, kind, rest[0] if rest else {}


def _take(declared, values: Iterator, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, kind, options in declared:
        if not _is_widget(kind, options):
            continue
        value = next(values)
        yield prefix + name, value
        if options.get("control_after_generate"):
            next(values)
        if kind == DYNAMIC_COMBO:
            chosen = next(o for o in options["options"] if o["key"] == value)
            yield from _take(_declared(chosen["inputs"]), values, f"{prefix}{name}.")


def _is_widget(kind: Any, options: dict) -> bool:
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")


@dataclass
class Graph:
    """A workflow while it is being described."""

    object_info: dict
    nodes: list[dict] = field(default_factory=list)
    links: list[list] = field(default_factory=list)
    groups: list[dict] = field(default_factory=list)

    def add(
        self, kind: str, x: int, y: int, width: int = 320, height: int = 0, /, *, title="", **given
    ) -> "Node":
        """A node of type `kind` at (x, y); `given` are widget values or (Node, output) links.

        A field of a DynamicCombo is written with two underscores: rule__threshold=0.1.
        """
        info = self.object_info[kind]
        given = {name.replace("__", "."): value for name, value in given.items()}
        names, values, sockets = self._fill(info, given)
        unknown = set(given) - names
        if unknown:
            raise ValueError(f"{kind} has no input {sorted(unknown)}; it has {sorted(names)}")
        rows = max(len(sockets), len(info["output"])) * SLOT_HEIGHT + len(values) * WIDGET_HEIGHT
        node = {
            "id": len(self.nodes) + 1,
            "type": kind,
            "pos": [x, y],
            "size": [width, height or rows + TITLE_HEIGHT],
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": sockets,
            "outputs": [
                {"name": name, "type": kind_, "links": []}
                for name, kind_ in zip(info["output_name"], info["output"], strict=True)
            ],
            "properties": {"Node name for S&R": kind},
            "widgets_values": values,
        }
        if title:
            node["title"] = title
        self.nodes.append(node)
        for slot, socket in enumerate(sockets):
            source = given.get(socket["name"])
            if source is not None:
                self._link(*source, node, slot)
        return Node(node)

    def note(self, text: str, x: int, y: int, width: int = 320, height: int = 160) -> None:
        self.nodes.append(
            {
                "id": len(self.nodes) + 1,
                "type": "MarkdownNote",
                "pos": [x, y],
                "size": [width, height],
                "flags": {},
                "order": len(self.nodes),
                "mode": 0,
                "inputs": [],
                "outputs": [],
                "properties": {},
                "widgets_values": [text],
                "color": "#432",
                "bgcolor": "#653",
            }
        )

    def group(self, title: str, x: int, y: int, width: int, height: int, color: str) -> None:
        self.groups.append(
            {
                "id": len(self.groups) + 1,
                "title": title,
                "bounding": [x, y, width, height],
                "color": color,
                "font_size": 24,
                "flags": {},
            }
        )

    def write(self, path: Path) -> None:
        workflow = {
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": {"ds": {"scale": 0.7, "offset": [80, 80]}},
            "version": 0.4,
        }
        path.write_text(json.dumps(workflow, indent=1) + "\n")

    def _fill(self, info: dict, given: dict) -> tuple[set[str], list, list[dict]]:
        """(all input names, widget values in order, sockets)."""
        names, values, sockets = set(), [], []

        def visit(declared, prefix: str) -> None:
            for name, kind, options in declared:
                full = prefix + name
                names.add(full)
                if not _is_widget(kind, options):
                    sockets.append({"name": full, "type": kind, "link": None})
                    continue
                values.append(given.get(full, _default(kind, options)))
                if options.get("control_after_generate"):
                    values.append("fixed")
                if kind == DYNAMIC_COMBO:
                    chosen = next(o for o in options["options"] if o["key"] == values[-1])
                    visit(_declared(chosen["inputs"]), f"{full}.")

        visit(_declared(info["input"], info.get("input_order")), "")
        return names, values, sockets

    def _link(self, source: "Node", output: str, node: dict, slot: int) -> None:
        outputs = source.json["outputs"]
        index = next(i for i, out in enumerate(outputs) if out["name"] == output)
        number = len(self.links) + 1
        self.links.append(
            [number, source.json["id"], index, node["id"], slot, outputs[index]["type"]]
        )
        outputs[index]["links"].append(number)
        node["inputs"][slot]["link"] = number


@dataclass
class Node:
    """A described node; node["name"] is its output of that name, for `Graph.add`."""

    json: dict

    def __getitem__(self, output: str) -> tuple["Node", str]:
        return self, output


def _default(kind: Any, options: dict) -> Any:
    if "default" in options:
        return options["default"]
    if isinstance(kind, list):
        return kind[0]
    if kind == DYNAMIC_COMBO:
        return options["options"][0]["key"]
    if kind == "COMBO":
        return options["options"][0]
    return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}[kind]
