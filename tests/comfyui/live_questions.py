"""Questions of the live charts, as web/live/graph.js puts them, asked without a server."""

from comfyui_braid.nodes import LIVE, kinds
from comfyui_braid.nodes.live import computed
from comfyui_braid.nodes.live_node import parse_live_node


def node_of(body):
    """The node that a body describes."""
    return parse_live_node(body, kinds())


def chart_of(noun, body):
    """What the chart is drawn from; raises what the route would answer as a sentence."""
    return LIVE[noun].compute(node_of(body))


def answer_of(noun, body):
    """What the route answers."""
    return computed(LIVE[noun], node_of(body))
