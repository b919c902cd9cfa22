"""A node of the open graph as the browser describes it, its values checked as the queue would.

What is asked for is checked, when it is asked for: a stale file name in a node that a chart never
reads does not spoil the chart.
"""

import functools
import inspect
import itertools
import json
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy_api.latest import io

from ..engine.texts import Text

MOST_NODES = 256
DEEPEST = 32
"""Nodes behind one another; web/live/graph.js describes 18."""
LONGEST_TEXT = 100_000
WIDGETS = (
    io.Int.Input,
    io.Float.Input,
    io.Boolean.Input,
    io.String.Input,
    io.Combo.Input,
    io.DynamicCombo.Input,
)
Kinds = Mapping[str, type[io.ComfyNode]]
"""node id -> the pack's node."""


class DecidedByTheRunError(ValueError):
    """A chart needs what only a run can know, or may look at; says so in a Text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveNode:
    """A node of the open graph: its widgets, and the Braid nodes linked to its inputs."""

    kind: type[io.ComfyNode]
    """The class of the node."""
    node_id: str
    """Its id, as in the public contract."""
    widgets: Mapping[str, Any]
    """Values as the browser has them, unchecked, a dynamic combo's fields as combo.field; None
    where a linked node decides at run time."""
    inputs: Mapping[str, "LiveNode | None"] = field(default_factory=dict)
    """Linked node of each linked input; None for another pack's, whose output only a run knows."""

    @property
    def values(self) -> dict[str, Any]:
        """Widget values as `execute` would get them; ValueError for one that the queue refuses,
        DecidedByTheRunError where one is unknown."""
        given = _given(self._inputs().values(), self.widgets)
        return {each.id: checked(each, self.widgets) for each in given}

    def value(self, name: str) -> Any:
        """One widget's value, for charts that need only some; ValueError likewise."""
        widget = self._inputs().get(name)
        if widget is None:
            raise ValueError(f"{self.node_id} has no {name}")
        return checked(widget, self.widgets)

    def _inputs(self) -> dict[str, Any]:
        return _inputs_of(self.kind)  # type: ignore[arg-type]  # to mypy no class is Hashable

    def input(self, name: str) -> "LiveNode | None":
        """The node linked to an input, None without a link; DecidedByTheRunError likewise."""
        if self.inputs.get(name, self) is None:
            raise _decided_by_the_run(name)
        return self.inputs.get(name)


@functools.cache
def _inputs_of(kind: type[io.ComfyNode]) -> dict[str, Any]:
    """id -> widget of a node. What the node itself validates the queue takes as any text: those
    are the combos whose options lie on the disk, which is why all others can be kept."""
    inputs = {each.id: each for each in kind.define_schema().inputs if isinstance(each, WIDGETS)}
    own = vars(kind).get("validate_inputs")
    free = inspect.signature(own.__func__).parameters if own else ()
    return {name: io.String.Input(name) if name in free else inputs[name] for name in inputs}


def checked(widget: Any, widgets: Mapping[str, Any], prefix: str = "") -> Any:
    """The value of a widget of the schema among those the browser sent; ValueError where the queue
    would refuse it, DecidedByTheRunError where it comes from a linked node."""
    if prefix + widget.id not in widgets:
        raise ValueError(f"{widget.id} is missing")
    given = widgets[prefix + widget.id]
    if given is None:
        raise _decided_by_the_run(widget.id)
    match widget:
        case io.DynamicCombo.Input():
            keys = {option.key: option.inputs for option in widget.options}
            inside = f"{prefix}{widget.id}."
            fields = _given(keys[_one_of(widget.id, given, list(keys))], widgets, inside)
            return {widget.id: given} | {each.id: checked(each, widgets, inside) for each in fields}
        case io.Combo.Input():
            return _one_of(widget.id, given, widget.options)
        case io.Int.Input():
            return _number(widget, given, int, "a whole number")
        case io.Float.Input():
            return _number(widget, given, float, "a number")
        case io.Boolean.Input():
            return bool(given)
    return _text(widget.id, given)


def _given(inputs: Any, widgets: Mapping[str, Any], prefix: str = "") -> Iterator[Any]:
    """The inputs but for optional ones that were not sent."""
    return (each for each in inputs if not each.optional or prefix + each.id in widgets)


def _decided_by_the_run(name: str) -> DecidedByTheRunError:
    return DecidedByTheRunError(
        Text("{name} comes from a linked node: run the graph to see its effect here.", name=name)
    )


def _one_of(name: str, given: Any, options: list[Any]) -> Any:
    if given not in options:
        known = ", ".join(map(str, options[:20]))
        raise ValueError(f"{name} is {reprlib.repr(given)}; choose one of {known}")
    return given


def _number(widget: Any, given: Any, convert: type, what: str) -> Any:
    try:
        value = convert(given) if isinstance(given, int | float | str) else None
    except (ValueError, OverflowError):
        value = None
    if value is None or not widget.min <= value <= widget.max:  # what is not a number is neither
        raise ValueError(
            f"{widget.id} is {reprlib.repr(given)}; it must be {what} between {widget.min} and "
            f"{widget.max}"
        )
    return value


def _text(name: str, given: Any) -> str:
    if not isinstance(given, str | int | float) or len(str(given)) > LONGEST_TEXT:
        raise ValueError(f"{name} is {reprlib.repr(given)}; it must be text, not too long a one")
    return str(given)


def parse_live_node(body: Any, kinds: Kinds) -> LiveNode:
    """The browser's JSON (node_id, values, inputs) as a LiveNode; ValueError for what is none."""
    node = _parsed(body, kinds, itertools.count(1), 1)
    if node is None:
        raise ValueError(f"node_id {reprlib.repr(body['node_id'])} is no node of this pack")
    return node


def _parsed(body: Any, kinds: Kinds, count: Iterator[int], depth: int) -> LiveNode | None:
    """A node and what is linked to it; None for one of another pack."""
    if depth > DEEPEST or next(count) > MOST_NODES:
        raise ValueError(
            f"more than {MOST_NODES} linked nodes, or {DEEPEST} behind one another, are too many "
            "for a chart"
        )
    match body:
        case {"node_id": str(node_id), "values": dict(widgets), "inputs": dict(linked)}:
            inputs = {
                name: None if node is None else _parsed(node, kinds, count, depth + 1)
                for name, node in linked.items()
            }
        case _:
            raise ValueError("a node is an object with node_id, values and inputs")
    if node_id not in kinds:
        return None
    return LiveNode(kind=kinds[node_id], node_id=node_id, widgets=widgets, inputs=inputs)


def parse_json(body: bytes) -> Any:
    """Strict JSON in UTF-8: no key twice, no NaN or Infinity; ValueError in one sentence."""
    try:
        text = body.decode()
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_twins)
    except RecursionError:
        raise ValueError("the question is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("the question is not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"the question is not JSON: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    known = dict(pairs)
    if len(known) < len(pairs):
        raise ValueError("an object holds a key twice")
    return known
