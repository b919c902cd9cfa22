"""The route that the live charts ask while a widget moves; the only file that imports `server`.

POST /braid/live/<noun> with a node as the browser sees it answers the numbers that
`web/<noun>/chart.js` draws, or {"error": sentence} where the node itself would raise it, or
{"message": sentence} where only a run can know. What the page shows in the user's language goes as
{"text": English with {places}, "values": what stands there}. The header Braid-Panel says who asks.

Anyone who reaches the server may ask anything. Each answer takes a fraction of a second whatever
the numbers are: that is the charts' own duty. Here questions are bounded in size, computed two at a
time, and one after the other for each panel, of which only the newest counts.
"""

import asyncio
import json
import logging
import reprlib
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from ..engine.refusals import said
from ..engine.texts import Text, told
from .live_node import DecidedByTheRunError, Kinds, LiveNode, parse_json, parse_live_node

logger = logging.getLogger("comfyui_braid.live")
MOST_BYTES = 1 << 20
MOST_OPEN = 32
"""Questions that are computed or wait."""
AT_A_TIME = 2
SLOWEST_SECONDS = 10.0
"""For a question to arrive."""
LOOK_EVERY_SECONDS = 0.1
LONGEST_SENTENCE = 1000
BUSY = Text("The server answers many charts now; asking again soon.")
OVERTAKEN = Text("A newer question of this chart is being answered.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A live chart."""

    nodes: tuple[str, ...]
    """Ids of the nodes that show it."""
    compute: Callable[[LiveNode], dict[str, Any]]
    """From a node to the JSON that `web/<noun>/chart.js` draws, in a fraction of a second."""


Charts = Mapping[str, Chart]
"""noun -> its chart."""


def add_routes(charts: Charts, kinds: Kinds) -> None:
    """Register the live route with the running ComfyUI server, if there is one."""
    from server import PromptServer

    if hasattr(PromptServer, "instance"):
        PromptServer.instance.routes.post("/braid/live/{noun}")(LiveDesk(charts, kinds).answer)


def say(node_id: str | None, text: str) -> None:
    """Show one line of text at a running node."""
    from server import PromptServer

    if node_id is not None and hasattr(PromptServer, "instance"):
        PromptServer.instance.send_progress_text(text, node_id)


class _Panel:
    """Who asks: one chart of one browser."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.newest: object = None
        self.work: Future[tuple[int, str]] | None = None


class LiveDesk:
    """Takes questions in, has them computed, and drops what nobody waits for."""

    def __init__(self, charts: Charts, kinds: Kinds) -> None:
        self._charts = charts
        self._kinds = kinds
        self._workers = ThreadPoolExecutor(AT_A_TIME, "braid-live")
        self._panels: weakref.WeakValueDictionary[str, _Panel] = weakref.WeakValueDictionary()
        self._open = 0

    async def answer(self, request: web.Request) -> web.Response:
        """The handler of the route."""
        noun = request.match_info["noun"]
        if noun not in self._charts:
            known = ", ".join(sorted(self._charts))
            return _refusal(404, f"unknown chart {reprlib.repr(noun)}; known: {known}")
        if request.content_type != "application/json":
            return _refusal(415, "a question to a chart is application/json")
        try:
            body = await asyncio.wait_for(_read(request), SLOWEST_SECONDS)
        except asyncio.TimeoutError:
            return _refusal(408, f"the question did not arrive within {SLOWEST_SECONDS:g} s")
        except web.RequestPayloadError:
            return _refusal(400, "the question is not encoded as its headers say")
        if len(body) > MOST_BYTES:
            return _refusal(413, f"the question is longer than {MOST_BYTES} bytes")
        if self._open >= MOST_OPEN:
            return _reply(503, {"message": BUSY, "again": True})
        self._open += 1
        try:
            return await self._in_turn(request, noun, body)
        finally:
            self._open -= 1

    async def _in_turn(self, request: web.Request, noun: str, body: bytes) -> web.Response:
        """One computation of a panel at a time, and none for a question that it no longer asks."""
        name = request.headers.get("Braid-Panel") or f"request {id(request)}"
        panel = self._panels.setdefault(name, _Panel())
        panel.newest = request
        if panel.work:
            panel.work.cancel()  # where it has not begun; what has is soon done
        async with panel.turn:
            if panel.newest is not request or _has_left(request):
                return _reply(409, {"message": OVERTAKEN, "again": True})
            chart = self._charts[noun]
            panel.work = self._workers.submit(answer_to, chart, noun, self._kinds, body)
            done = asyncio.wrap_future(panel.work)
            while not done.done():
                await asyncio.wait({done}, timeout=LOOK_EVERY_SECONDS)
                if _has_left(request):
                    panel.work.cancel()
            if done.cancelled():
                return _reply(409, {"message": OVERTAKEN, "again": True})
            status, text = done.result()
            return web.Response(status=status, text=text, content_type="application/json")


def _has_left(request: web.Request) -> bool:
    """Whether nobody waits for the answer any more."""
    return request.transport is None or request.transport.is_closing()


async def _read(request: web.Request) -> bytes:
    """The body, or what is one byte too many of it."""
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > MOST_BYTES:
            break
    return bytes(body)


def _refusal(status: int, sentence: str) -> web.Response:
    return _reply(status, {"error": sentence})


def _reply(status: int, answer: Mapping[str, Any]) -> web.Response:
    return web.json_response(told(answer), status=status)


def answer_to(chart: Chart, noun: str, kinds: Kinds, body: bytes) -> tuple[int, str]:
    """HTTP status and JSON text for a question as it came in."""
    try:
        node = parse_live_node(parse_json(body), kinds)
        if node.node_id not in chart.nodes:
            raise ValueError(f"{node.node_id} shows no chart {noun}")
    except ValueError as refusal:
        return 400, json.dumps({"error": _short(refusal)})
    try:
        return 200, json.dumps(told(computed(chart, node)), allow_nan=False)
    except ValueError:
        return 200, json.dumps({"error": "a number of this chart is not finite"})


def computed(chart: Chart, node: LiveNode) -> dict[str, Any]:
    """The chart's answer, or one sentence."""
    try:
        return chart.compute(node)
    except DecidedByTheRunError as message:
        return {"message": _sentence(message)}
    except (ValueError, OSError) as error:
        return {"error": _sentence(error)}
    except Exception as error:  # a damaged file, a full disk: the panel says so, not a lost reply
        logger.warning("live chart of %s", node.node_id, exc_info=True)
        return {"error": f"this chart cannot be drawn ({said(error)}); the server's log says where"}


def _sentence(error: Exception) -> str:
    """What an error says, as the Text that it was raised with where it was."""
    text = error.args[0] if error.args else None
    return text if isinstance(text, Text) and len(text) <= LONGEST_SENTENCE else _short(error)


def _short(error: Exception) -> str:
    return str(error)[:LONGEST_SENTENCE]
