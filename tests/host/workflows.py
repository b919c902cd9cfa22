"""Workflow files: written from short descriptions, read back as the prompts that the API takes.

A workflow file lists the values of a node's widgets without their names, in the order in which the
front end makes them: the node's inputs in order, the fields of a DynamicCombo right after it, and
one more value after a seed with `control_after_generate`.
"""

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .find import PACK

EXAMPLES = PACK / "example_workflows"
DYNAMIC_COMBO, AUTOGROW = "COMFY_DYNAMICCOMBO_V3", "COMFY_AUTOGROW_V3"
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COLOR", "COMBO", DYNAMIC_COMBO}
NOTES = {"Note", "MarkdownNote"}
BYPASSED = 4
"""Mode of a node that does not run and passes on what it is given."""
TITLE_HEIGHT, GAP = 30, 20
BLUE, GREEN, PURPLE, BROWN = "#3f5f8a", "#4a7a4a", "#6a4a8a", "#8a6a3a"
"""Of groups."""
NOTE = {"color": "#432", "bgcolor": "#3a2f1e"}
"""Of notes: dark enough for the grey in which newer front ends write them."""


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
        inputs = dict(_named_widgets(node, object_info[node["type"]]))
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
class Column:
    """Nodes below one another in one coloured group."""

    title: str
    color: str
    width: int
    nodes: list[dict] = field(default_factory=list)


@dataclass
class Graph:
    """A workflow while it is being described: columns from left to right."""

    object_info: dict
    nodes: list[dict] = field(default_factory=list)
    links: list[list] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)

    def column(self, title: str, color: str, width: int = 360) -> None:
        """Begin a new column; what is added next goes into it."""
        self.columns.append(Column(title, color, width))

    def add(self, kind: str, height: int = 0, /, *, title: str = "", **given) -> "Node":
        """A node of type `kind`; `given` are widget values or links such as node["output"].

        A field of a DynamicCombo is written with two underscores, rule__threshold=0.1, and so is
        a slot of an input that grows: images__image0=node["IMAGE"].
        """
        info = self.object_info[kind]
        given = {name.replace("__", "."): value for name, value in given.items()}
        names, values, sockets = self._fill(info, given)
        unknown = set(given) - names
        if unknown:
            raise ValueError(f"{kind} has no input {sorted(unknown)}; it has {sorted(names)}")
        outputs = zip(info["output_name"], info["output"], strict=True)
        node = self._append(kind, height, values)
        node["inputs"] = sockets
        node["outputs"] = [{"name": name, "type": type_, "links": []} for name, type_ in outputs]
        node["properties"] = {"Node name for S&R": kind}
        if title:
            node["title"] = title
        for slot, socket in enumerate(sockets):
            source = given.get(socket["name"])
            if source is not None:
                self._link(*source, node, slot)
        return Node(node)

    def note(self, text: str, height: int = 160) -> None:
        """A note in Markdown; `code` in it comes out bold."""
        node = self._append("MarkdownNote", height, [_bold(text)])
        node |= NOTE

    def lay_out(self, measured: dict[int, tuple[float, float]]) -> None:
        """Stack the nodes of each column; `measured` is the (width, height) of each node by id."""
        x = 0.0
        for column in self.columns:
            y, width = 0.0, float(column.width)
            for node in column.nodes:
                width = max(width, measured[node["id"]][0])
            for node in column.nodes:
                height = max(node["size"][1], measured[node["id"]][1])
                node["pos"], node["size"] = [x, y], [width, height]
                y += height + TITLE_HEIGHT + GAP
            x += width + 3 * GAP

    def to_json(self) -> dict:
        return {
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [_group(i, column) for i, column in enumerate(self.columns, 1)],
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [120, 160]}},
            "version": 0.4,
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")

    def _append(self, kind: str, height: int, values: list) -> dict:
        node = {
            "id": len(self.nodes) + 1,
            "type": kind,
            "pos": [0, 0],
            "size": [self.columns[-1].width, height],
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": values,
        }
        self.nodes.append(node)
        self.columns[-1].nodes.append(node)
        return node

    def _fill(self, info: dict, given: dict) -> tuple[set[str], list, list[dict]]:
        """(all input names, widget values in order, sockets)."""
        names, values, sockets = set(), [], []

        def visit(declared, prefix: str) -> None:
            for name, kind, options in declared:
                full = prefix + name
                names.add(full)
                if kind == AUTOGROW:
                    grown = [each for each in given if each.startswith(f"{full}.")]
                    (type_, *_), *_ = options["template"]["input"]["required"].values()
                    sockets.extend({"name": each, "type": type_, "link": None} for each in grown)
                    names.update(grown)
                    continue
                if not _is_widget(kind, options):
                    sockets.append({"name": full, "type": kind, "link": None})
                    continue
                values.append(given[full] if full in given else _default(kind, options))
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

    def bypass(self) -> "Node":
        """The node itself, switched off: it does not run until someone presses Ctrl+B on it."""
        self.json["mode"] = BYPASSED
        return self


def _bold(text: str) -> str:
    """Markdown with its code in bold: Nodes 2.0 writes code in blue, unreadable on our brown."""
    escape = functools.partial(re.sub, r"([*\\<>\[\]])", r"\\\1")
    return re.sub("`([^`]+)`", lambda code: f"**{escape(code[1])}**", text)


def _group(number: int, column: Column) -> dict:
    """The coloured frame around a laid-out column."""
    left = min(node["pos"][0] for node in column.nodes)
    width = max(node["size"][0] for node in column.nodes)
    bottom = max(node["pos"][1] + node["size"][1] for node in column.nodes)
    top = -TITLE_HEIGHT - 3 * GAP
    return {
        "id": number,
        "title": column.title,
        "bounding": [left - GAP, top, width + 2 * GAP, bottom - top + GAP],
        "color": column.color,
        "font_size": 24,
        "flags": {},
    }


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
