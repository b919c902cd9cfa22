"""A small real world to try Braid in: runs anywhere, downloads nothing."""

from typing import Any

from comfy_api.latest import io

from ..engine.comfyui.playground import load_playground_model
from ..engine.playground import captions, glyphs
from ..engine.refusals import refuse_below
from . import sockets

MOST_PIXELS = 64_000_000
"""Of all pictures that are decoded at once, 0.8 GB."""


class BraidPlaygroundModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidPlaygroundModel",
            display_name="Playground Model",
            category=sockets.PLAYGROUND,
            description="A small trained FLUX that draws ten letters; comes with Braid.",
            search_aliases=["braid", "tiny flux", "test model", "glyphs"],
            inputs=[],
            outputs=[
                io.Model.Output(
                    "model",
                    tooltip="A FLUX (schnell) of 2.3 million parameters, loaded by ComfyUI's own "
                    "loader. Sample with cfg 2, 16 x 16 x 16 latents.",
                )
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_playground_model())


class BraidPlaygroundDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidPlaygroundDataset",
            display_name="Playground Dataset",
            category=sockets.PLAYGROUND,
            description="Drawn letters in a style that a LoRA can learn, with captions.",
            search_aliases=["braid", "glyphs", "training data"],
            inputs=[
                io.Combo.Input(
                    "style",
                    options=list(glyphs.STYLES),
                    default="outlined",
                    tooltip="What the pictures share: plain (the model's own style), outlined "
                    "in red, slanted, or checkered.",
                ),
                io.Int.Input(
                    "count",
                    default=40,
                    min=1,
                    max=glyphs.MOST_GLYPHS,
                    tooltip="Number of pictures; the ten letters come in turn.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,
                    tooltip="Draws font, colour, size and place of every letter.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "latents",
                    is_output_list=True,
                    tooltip="One latent (1, 16, 16, 16) per picture.",
                ),
                io.Conditioning.Output(
                    "positive",
                    is_output_list=True,
                    tooltip="One conditioning per picture: its letter, not its style.",
                ),
                io.Image.Output("image", tooltip="The pictures, (count, 32, 32, 3)."),
            ],
        )

    @classmethod
    def execute(cls, style: str, count: int, seed: int) -> io.NodeOutput:
        drawn = glyphs.draw_dataset(count, style, seed)
        pictures = glyphs.pictures_of(drawn)
        latents = [{"samples": latent[None]} for latent in glyphs.encode(pictures)]
        return io.NodeOutput(latents, [conditioning(g.caption) for g in drawn], pictures)


class BraidPlaygroundPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidPlaygroundPrompt",
            display_name="Playground Prompt",
            category=sockets.PLAYGROUND,
            description="The conditioning of one letter, or of none (for the negative input).",
            search_aliases=["braid", "glyph", "letter"],
            inputs=[
                io.Combo.Input(
                    "glyph",
                    options=[*glyphs.LETTERS, "none"],
                    default=glyphs.LETTERS[0],
                    tooltip="The letter to draw; none is the empty prompt, for negative inputs.",
                )
            ],
            outputs=[
                io.Conditioning.Output("conditioning", tooltip="Four tokens and a pooled vector.")
            ],
        )

    @classmethod
    def execute(cls, glyph: str) -> io.NodeOutput:
        return io.NodeOutput(conditioning(glyphs.caption_of("" if glyph == "none" else glyph)))


class BraidPlaygroundDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidPlaygroundDecode",
            display_name="Playground Decode",
            category=sockets.PLAYGROUND,
            description="Latents to pictures: an exact rearrangement, no VAE.",
            search_aliases=["braid", "vae decode"],
            inputs=[
                io.Latent.Input("latent", tooltip="Latents (B, 16, H, W) of the playground model."),
                io.Int.Input(
                    "scale",
                    default=8,
                    min=1,
                    max=32,
                    optional=True,
                    advanced=True,
                    tooltip="Screen pixels per picture pixel, so that 32 pixels can be seen.",
                ),
            ],
            outputs=[io.Image.Output("image", tooltip="Pictures (B, 2 H scale, 2 W scale, 3).")],
        )

    @classmethod
    def execute(cls, latent: dict, scale: int = 8) -> io.NodeOutput:
        refuse_below("scale", scale, 1)
        samples = latent["samples"]
        if samples.ndim != 4 or samples.shape[1] != 16:
            raise ValueError(
                f"latent is {tuple(samples.shape)}; Playground Decode takes latents (B, 16, H, W) "
                "of the playground model, use VAE Decode for others"
            )
        count, _, height, width = samples.shape
        pixels = count * 4 * height * width * scale**2
        if pixels > MOST_PIXELS:
            raise ValueError(
                f"{pixels:.1e} pixels in all are more than {MOST_PIXELS:.1e}; lower scale, or "
                "decode fewer or smaller latents"
            )
        pictures = glyphs.decode(samples)
        pictures = pictures.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
        return io.NodeOutput(pictures)


def conditioning(caption: str) -> list[list[Any]]:
    """CONDITIONING of a caption, as a text encoder node gives it."""
    context, pooled = captions.embed_caption(caption)
    return [[context, {"pooled_output": pooled}]]


NODES = [
    BraidPlaygroundModel,
    BraidPlaygroundDataset,
    BraidPlaygroundPrompt,
    BraidPlaygroundDecode,
]
