"""Training: what a run is told, node by node, and the node that runs it."""

from comfy_api.latest import io

from .checkpoints import BraidLoadCheckpoints
from .compile import BraidCompile
from .log import BraidTrainingLog
from .optimizer import BraidOptimizer
from .preview import BraidTrainingPreview
from .saving import BraidCheckpointing
from .train import BraidTrainLora
from .validation import BraidValidation

NODES: list[type[io.ComfyNode]] = [
    BraidTrainLora,
    BraidOptimizer,
    BraidCheckpointing,
    BraidTrainingLog,
    BraidCompile,
    BraidTrainingPreview,
    BraidValidation,
    BraidLoadCheckpoints,
]
