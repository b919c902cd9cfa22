"""MagCache: calibrate in the graph, plan over sigma, sample."""

from .nodes import NODES

__all__ = ["NODES"]
