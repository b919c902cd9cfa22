"""The route that the live charts ask while a widget moves; the only file that imports `server`.

POST /braid/live/<noun> with a node as the browser sees it answers the numbers that
`web/<noun>/chart.js` draws, or {"error": sentence} where the node itself would raise it.
A second chart is one function in LIVE, one chart module, and one row in web/extension.js.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

logger = logging.getLogger("comfyui_braid.live")


class DecidedByTheRunError(ValueError):
    """A chart needs a widget whose value comes from a linked node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveNode:
    """A node of the open graph: its widgets, and the Braid nodes linked to its inputs."""

    node_id: str
    """The class of the node, as in the public contract."""
    widgets: dict[str, Any]
    """Widget values, dynamic combos nested; None where a linked node decides at run time."""
    inputs: dict[str, "LiveNode | None"] = field(default_factory=dict)
    """Linked node of each linked input; None for another pack's, whose output only a run knows."""

    @property
    def values(self) -> dict[str, Any]:
        """Widget values as `execute` would get them; DecidedByTheRunError where one is unknown."""
        return {name: self.value(name) for name in self.widgets}

    def value(self, name: str) -> Any:
        """One widget's value, for charts that need only some; DecidedByTheRunError likewise."""
        value = self.widgets[name]
        fields = value.items() if isinstance(value, dict) else [(name, value)]
        for field_name, known in fields:
            if known is None:
                raise _decided_by_the_run(field_name)
        return value

    def input(self, name: str) -> "LiveNode | None":
        """The node linked to an input, None without a link; DecidedByTheRunError likewise."""
        if self.inputs.get(name, self) is None:
            raise _decided_by_the_run(name)
        return self.inputs.get(name)


def _decided_by_the_run(name: str) -> DecidedByTheRunError:
    return DecidedByTheRunError(
        f"{name} comes from a linked node: run the graph to see its effect here."
    )


LIVE: dict[str, Callable[[LiveNode], dict[str, Any]]] = {}
"""noun -> function from a node to the JSON that `web/<noun>/chart.js` draws."""


def parse_live_node(body: Mapping[str, Any]) -> LiveNode:
    """The browser's JSON (node_id, values, inputs) as a LiveNode."""
    return LiveNode(
        node_id=body["node_id"],
        widgets=_nested(body["values"]),
        inputs={
            name: linked if linked is None else parse_live_node(linked)
            for name, linked in body["inputs"].items()
        },
    )


def _nested(widgets: Mapping[str, Any]) -> dict[str, Any]:
    """`combo` and `combo.field`, as a dynamic combo's widgets are called, as one dict."""
    values = {name: value for name, value in widgets.items() if "." not in name}
    for name, value in widgets.items():
        combo, _, inner = name.partition(".")
        if inner and not isinstance(values[combo], dict):
            values[combo] = {combo: values[combo]}
        if inner:
            values[combo][inner] = value
    return values


def add_routes() -> None:
    """Register the live route with the running ComfyUI server, if there is one."""
    from server import PromptServer

    if not hasattr(PromptServer, "instance"):
        return
    PromptServer.instance.routes.post("/braid/live/{noun}")(_answer)


def say(node_id: str | None, text: str) -> None:
    """Show one line of text at a running node."""
    from server import PromptServer

    if node_id is not None and hasattr(PromptServer, "instance"):
        PromptServer.instance.send_progress_text(text, node_id)


async def _answer(request: web.Request) -> web.Response:
    compute = LIVE.get(request.match_info["noun"])
    if compute is None:
        known = ", ".join(sorted(LIVE))
        error = f"unknown chart {request.match_info['noun']!r}; known: {known}"
        return web.json_response({"error": error}, status=404)
    try:
        node = parse_live_node(await request.json())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return web.json_response({"error": f"not a node: {error!r}"}, status=400)
    return web.json_response(await asyncio.to_thread(_computed, compute, node))


def _computed(compute: Callable[[LiveNode], dict[str, Any]], node: LiveNode) -> dict[str, Any]:
    try:
        return compute(node)
    except DecidedByTheRunError as message:
        return {"message": str(message)}
    except (ValueError, OSError) as error:
        return {"error": str(error)}
    except (KeyError, TypeError) as error:
        logger.debug("live chart of %s", node, exc_info=True)
        return {"error": f"{node.node_id} lacks a value or has one of the wrong kind: {error}"}
    except Exception as error:  # a damaged file, a full disk: the panel says so, not a lost reply
        logger.warning("live chart of %s", node.node_id, exc_info=True)
        return {"error": f"{type(error).__name__}: {error} (the server's log says where)"}
