"""The routes that the live charts ask while a widget moves; the only file that imports `server`.

POST /braid/live/<noun> with the widget values of a node answers the numbers to draw, or
{"error": sentence} where the node itself would raise that sentence.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web

LIVE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""noun -> function from widget values to the JSON that `web/<noun>/` draws."""


def add_routes() -> None:
    """Register the live routes with the running ComfyUI server, if there is one."""
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
        return web.json_response(
            {"error": f"unknown chart {request.match_info['noun']!r}"}, status=404
        )
    values = await request.json()
    try:
        return web.json_response(await asyncio.to_thread(compute, values))
    except (ValueError, KeyError, TypeError) as error:
        return web.json_response({"error": str(error)})
