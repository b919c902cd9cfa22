"""Torch Compile for Training."""

from comfy_api.latest import io

from ...engine.training.options import Compilation, TrainingOptions
from .. import sockets
from .options import chained, options_input, options_output


class BraidCompile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidCompile",
            display_name="Torch Compile for Training",
            category=sockets.TRAINING,
            description="Compiles each block while training; the MODEL itself stays as it is.",
            search_aliases=["braid", "dynamo", "inductor", "torch.compile"],
            inputs=[
                io.Combo.Input(
                    "dynamo_backend",
                    options=["inductor", "aot_eager", "eager", "cudagraphs"],
                    default="inductor",
                    tooltip="inductor makes code and needs a C++ compiler (CPU) or Triton (GPU); "
                    "the others are for finding faults.",
                ),
                io.Combo.Input(
                    "dynamo_mode",
                    options=[
                        "default",
                        "reduce-overhead",
                        "max-autotune",
                        "max-autotune-no-cudagraphs",
                    ],
                    default="default",
                    tooltip="More tuning: a longer first step, shorter later ones.",
                ),
                io.Boolean.Input(
                    "dynamo_fullgraph",
                    default=False,
                    tooltip="Compile each block whole or not at all: where that cannot be done, "
                    "the run goes on uncompiled, with a warning.",
                ),
                io.Combo.Input(
                    "dynamo_dynamic",
                    options=["auto", "off", "on"],
                    default="auto",
                    tooltip="Code for any size (on), for one size each (off), or as torch sees "
                    "fit. Musubi's users report trouble with on.",
                ),
                options_input(),
            ],
            outputs=[options_output()],
        )

    @classmethod
    def execute(
        cls,
        dynamo_backend: str,
        dynamo_mode: str,
        dynamo_fullgraph: bool,
        dynamo_dynamic: str,
        options: TrainingOptions | None = None,
    ) -> io.NodeOutput:
        part = Compilation(
            dynamo_backend=dynamo_backend,
            dynamo_mode=dynamo_mode,
            dynamo_fullgraph=dynamo_fullgraph,
            dynamo_dynamic={"off": False, "on": True, "auto": None}[dynamo_dynamic],
        )
        return chained(options, compilation=part)
