"""A workflow while it is being described: columns of nodes, written as the front end's own file.

Widgets without a given value have their defaults; `tests/host/workflows.py` reads the same files.
"""

import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from host.workflows import BYPASSED, DYNAMIC_COMBO, declared, default, is_widget

AUTOGROW = "COMFY_AUTOGROW_V3"
TITLE_HEIGHT, GAP = 30, 20
ROW_GAP = 160
"""From the last node of a row of groups to the first of the next."""
MOST_COLUMNS = 5
BLUE, GREEN, PURPLE, BROWN = "#3f5f8a", "#4a7a4a", "#6a4a8a", "#8a6a3a"
"""Of groups."""
NOTE = {"color": "#432", "bgcolor": "#3a2f1e"}
"""Of notes: dark enough for the grey in which newer front ends write them."""


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
        """Stack the nodes of each column, in rows of at most MOST_COLUMNS columns of much the same
        number; `measured` is the (width, height) of each node by id."""
        for node in self.nodes:
            given, (width, height) = node["size"], measured[node["id"]]
            node["size"] = [max(given[0], width), max(given[1], height)]
        rows = -(-len(self.columns) // MOST_COLUMNS)
        in_a_row = -(-len(self.columns) // rows)
        top = 0.0
        for start in range(0, len(self.columns), in_a_row):
            top = _lay_out_row(self.columns[start : start + in_a_row], top) + ROW_GAP

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

        def visit(inputs, prefix: str) -> None:
            for name, kind, options in inputs:
                full = prefix + name
                names.add(full)
                if kind == AUTOGROW:
                    grown = [each for each in given if each.startswith(f"{full}.")]
                    (type_, *_), *_ = options["template"]["input"]["required"].values()
                    sockets.extend({"name": each, "type": type_, "link": None} for each in grown)
                    names.update(grown)
                    continue
                if not is_widget(kind, options):
                    sockets.append({"name": full, "type": kind, "link": None})
                    continue
                values.append(given[full] if full in given else default(kind, options))
                if options.get("control_after_generate"):
                    values.append("fixed")
                if kind == DYNAMIC_COMBO:
                    chosen = next(o for o in options["options"] if o["key"] == values[-1])
                    visit(declared(chosen["inputs"]), f"{full}.")

        visit(declared(info["input"], info.get("input_order")), "")
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


def _lay_out_row(columns: list[Column], top: float) -> float:
    """Columns beside one another, the nodes of each stacked from `top` on; where the last ends."""
    x, bottom = 0.0, top
    for column in columns:
        y, width = top, max(node["size"][0] for node in column.nodes)
        for node in column.nodes:
            node["pos"], node["size"][0] = [x, y], width
            y += node["size"][1] + TITLE_HEIGHT + GAP
        x += width + 3 * GAP
        bottom = max(bottom, y - TITLE_HEIGHT - GAP)
    return bottom


def _group(number: int, column: Column) -> dict:
    """The coloured frame around a laid-out column."""
    first, last = column.nodes[0], column.nodes[-1]
    left, top = first["pos"]
    height = last["pos"][1] + last["size"][1] - top
    above = TITLE_HEIGHT + 3 * GAP
    return {
        "id": number,
        "title": column.title,
        "bounding": [left - GAP, top - above, first["size"][0] + 2 * GAP, height + above + GAP],
        "color": column.color,
        "font_size": 24,
        "flags": {},
    }
