"""Validation Loss: the loss on items that are held out of training."""

from comfy_api.latest import io

from ...engine.training.options import Validation
from .. import sockets
from .options import chained, options_input, options_output


class BraidValidation(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidValidation",
            display_name="Validation Loss",
            category=sockets.TRAINING,
            description="Loss on items held out of training, always at the same noise and noise "
            "levels, so that it can be compared across steps and runs.",
            search_aliases=["braid", "eval", "held out", "overfitting"],
            is_input_list=True,
            inputs=[
                io.Latent.Input("latents", tooltip="Latents that are not trained on."),
                io.Conditioning.Input("positive", tooltip="Their conditioning."),
                io.Int.Input(
                    "every_n_steps",
                    default=100,
                    min=1,
                    max=1_000_000,
                    tooltip="Steps between two measurements; one is made after the last step too.",
                ),
                io.Int.Input(
                    "timesteps_per_item",
                    default=8,
                    min=1,
                    max=1000,
                    tooltip="Noise levels per item, evenly spread over the run's own sampling.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Of the fixed noise; keep it to compare runs.",
                ),
                options_input(),
            ],
            outputs=[options_output()],
        )

    @classmethod
    def execute(
        cls,
        latents: list[dict],
        positive: list,
        every_n_steps: list[int],
        timesteps_per_item: list[int],
        seed: list[int],
        options: list | None = None,
    ) -> io.NodeOutput:
        part = Validation(
            latents=tuple(latents),
            conditioning=tuple(positive),
            every_n_steps=every_n_steps[0],
            timesteps_per_item=timesteps_per_item[0],
            seed=seed[0],
        )
        return chained(options[0] if options else None, validation=part)
