"""ComfyUI nodes: sockets in, one engine call, sockets out."""

from comfy_api.latest import ComfyExtension, io

from . import (
    ema,
    fp8,
    live,
    magcache,
    network,
    outputs,
    playground,
    replacements,
    timesteps,
    training,
)

NODES: list[type[io.ComfyNode]] = [
    *network.NODES,
    *timesteps.NODES,
    *training.NODES,
    *ema.NODES,
    *fp8.NODES,
    *magcache.NODES,
    *playground.NODES,
]
"""Every node of the pack, in menu order."""


class BraidExtension(ComfyExtension):
    async def on_load(self) -> None:
        live.add_routes()
        outputs.sweep_in_background()
        await replacements.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
