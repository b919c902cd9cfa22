"""MagCache: calibrate in the graph, plan over sigma, sample."""

from comfy_api.latest import io

from .cache import BraidMagCache, BraidMagCachePlan, BraidMagCacheReport
from .calibration import BraidLoadCalibration, BraidMagCacheCalibrate, BraidMagCacheCalibration

NODES: list[type[io.ComfyNode]] = [
    BraidMagCache,
    BraidMagCacheCalibrate,
    BraidMagCacheCalibration,
    BraidMagCachePlan,
    BraidMagCacheReport,
    BraidLoadCalibration,
]
