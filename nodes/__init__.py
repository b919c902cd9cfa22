"""ComfyUI nodes: sockets in, one engine call, sockets out."""

from comfy_api.latest import ComfyExtension, io

from . import fp8, live, magcache, network, outputs, playground, replacements, training
from .ema import nodes as ema
from .ema.live import live_ema
from .magcache.live import live_magcache
from .timesteps import nodes as timesteps

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

LIVE: dict[str, live.Chart] = {
    "ema": live.Chart(nodes=("BraidPostHocEma",), compute=live_ema),
    "magcache": live.Chart(nodes=("BraidMagCache", "BraidMagCachePlan"), compute=live_magcache),
    "timesteps": live.Chart(
        nodes=("BraidTimestepSampling", "BraidTimestepPreview"), compute=timesteps.live_timesteps
    ),
}
"""noun -> its live chart; web/extension.js has the same in CHARTS."""


def kinds() -> dict[str, type[io.ComfyNode]]:
    """Node id -> class."""
    return {node.define_schema().node_id: node for node in NODES}


class BraidExtension(ComfyExtension):
    async def on_load(self) -> None:
        live.add_routes(LIVE, kinds())
        outputs.sweep_in_background()
        await replacements.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
