"""Load a diffusion model into FP8 with scales, and save it."""

import json
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..engine.canvas import as_image
from ..engine.comfyui.fp8.loader import Fp8Request, load_fp8
from ..engine.comfyui.fp8.save import save_fp8
from ..engine.fp8.figure import draw_errors
from ..engine.fp8.policy import MODULATIONS, Fp8Policy, LayerPatterns
from ..engine.fp8.report import Fp8Report
from ..engine.patterns import parse_patterns
from ..engine.playground.model import WEIGHTS
from .outputs import next_file, shown_picture
from .sockets import FP8

NO_LORA = "none"
PLAYGROUND = "braid_playground.safetensors"
"""The small model that comes with Braid, in the list of every installation."""


class BraidFp8Loader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidFp8Loader",
            display_name="Load Diffusion Model (FP8 Scaled)",
            category=FP8,
            description=(
                "Reads a bf16, fp16 or fp32 diffusion model and holds its block weights in FP8 "
                "with scales: half the memory of bf16 and nearly its picture. LoRAs work on it."
            ),
            search_aliases=["fp8_scaled", "fp8 quantize", "musubi fp8", "UNETLoader fp8"],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=[*folder_paths.get_filename_list("diffusion_models"), PLAYGROUND],
                    tooltip="The model file: .safetensors in fp32, fp16 or bf16. Shards "
                    "(-00001-of-00004) are found by any one of them; full checkpoints work too. A "
                    "file that is FP8 already is loaded as it is.",
                ),
                io.DynamicCombo.Input(
                    "granularity",
                    options=[
                        io.DynamicCombo.Option(
                            "block",
                            [
                                io.Int.Input(
                                    "block_size",
                                    default=64,
                                    min=8,
                                    max=1024,
                                    step=8,
                                    tooltip="Inputs that share one scale (8 to 1024). Smaller is "
                                    "more exact and takes more memory: 64 adds 6 % to the FP8 "
                                    "size. A layer whose width it does not divide gets one scale "
                                    "per channel.",
                                )
                            ],
                        ),
                        io.DynamicCombo.Option("channel", []),
                        io.DynamicCombo.Option("tensor", []),
                    ],
                    tooltip="Weights that share one scale. block: most exact, musubi-tuner's way. "
                    "channel: one per output. tensor: one per layer; ComfyUI's own format, with "
                    "its fast FP8 matmul on Ada and newer cards, readable by any ComfyUI.",
                ),
                io.Combo.Input(
                    "fp8_format",
                    options=["e4m3fn", "e5m2"],
                    default="e4m3fn",
                    tooltip="e4m3fn: 3 mantissa bits, the right choice with scales. e5m2: 2 bits, "
                    "twice the error.",
                ),
                io.Combo.Input(
                    "scale_search",
                    options=["amax", "mse"],
                    default="amax",
                    advanced=True,
                    tooltip="amax: the largest weight becomes the largest code. mse: tries 21 "
                    "scales per group and takes the one with the least squared error: 14 % less "
                    "error with blocks at no cost when the model runs; quantising takes 18 times "
                    "as long, so save the result.",
                ),
                io.String.Input(
                    "include_patterns",
                    default="",
                    multiline=True,
                    advanced=True,
                    tooltip="Regular expressions, one a line, found anywhere in a Linear's name "
                    "(LoRA Network's match all of it): quantised in addition to the "
                    "architecture's preset. Empty: the preset alone.",
                ),
                io.String.Input(
                    "exclude_patterns",
                    default="",
                    multiline=True,
                    advanced=True,
                    tooltip="Regular expressions, one a line, found anywhere in a Linear's name "
                    "(LoRA Network's match all of it): kept in the file's precision, whatever "
                    "else says otherwise. The report names the layers that are worth it.",
                ),
                io.Combo.Input(
                    "lora_name",
                    options=[NO_LORA, *folder_paths.get_filename_list("loras")],
                    default=NO_LORA,
                    optional=True,
                    tooltip="A LoRA to merge in float32 before quantising, in any key format that "
                    "ComfyUI reads.",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.01,
                    optional=True,
                    tooltip="Factor on the merged LoRA (-20 to 20; 0 merges nothing).",
                ),
                io.Combo.Input(
                    "modulation",
                    options=list(MODULATIONS),
                    default="keep",
                    optional=True,
                    advanced=True,
                    tooltip="The modulation layers of the blocks, 27 % of FLUX.1, where the "
                    "preset keeps them (FLUX.1, HunyuanVideo, Z-Image, ...). keep: in the file's "
                    "precision. fp8: as the other layers; the playground model's output is then "
                    "1.05 times as far off as without.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model", tooltip="The model, ready for samplers, LoRAs and training."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="JSON: per layer kept or quantised and why, relative RMS error in % "
                    "and dB, bytes before and after; layers worth exempting.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        unet_name: str,
        granularity: dict,
        fp8_format: str,
        scale_search: str = "amax",
        include_patterns: str = "",
        exclude_patterns: str = "",
        lora_name: str = NO_LORA,
        lora_strength: float = 1.0,
        modulation: str = "keep",
    ) -> io.NodeOutput:
        policy = Fp8Policy(
            fp8_format=fp8_format,
            granularity=granularity["granularity"],
            block_size=granularity.get("block_size", 64),
            scale_search=scale_search,
            modulation=modulation,
            patterns=LayerPatterns(
                include=parse_patterns("include_patterns", include_patterns),
                exclude=parse_patterns("exclude_patterns", exclude_patterns),
            ),
        )
        loaded = load_fp8(
            Fp8Request(
                path=_model_file(unet_name),
                policy=policy,
                lora=None
                if lora_name == NO_LORA
                else Path(folder_paths.get_full_path_or_raise("loras", lora_name)),
                lora_strength=lora_strength,
            )
        )
        report = json.dumps(loaded.report.to_json(), indent=1)
        return io.NodeOutput(loaded.patcher, report, ui=_chart(loaded.report))


class BraidSaveFp8(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidSaveFp8",
            display_name="Save FP8 Model",
            category=FP8,
            description=(
                "Saves a model with FP8 weights in ComfyUI's format, so that it loads at once next "
                "time. Scales per tensor load in any ComfyUI; finer ones need Braid's loader."
            ),
            search_aliases=["save quantized model", "fp8 checkpoint"],
            inputs=[
                io.Model.Input("model", tooltip="A model from Load Diffusion Model (FP8 Scaled)."),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/fp8",
                    tooltip="Folder and start of the name under ComfyUI's output folder. What lies "
                    "in output/diffusion_models can be chosen in the loaders at once.",
                ),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="The file written.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: io.Model.Type, filename_prefix: str) -> io.NodeOutput:
        path = next_file(filename_prefix, ".safetensors")
        save_fp8(model, path)
        return io.NodeOutput(str(path), ui=ui.PreviewText(str(path)))


def _chart(report: Fp8Report) -> ui.PreviewImage | None:
    if not report.measured:
        return None
    return shown_picture(as_image(draw_errors(report)), BraidFp8Loader)


def _model_file(unet_name: str) -> Path:
    if unet_name == PLAYGROUND:
        return WEIGHTS
    return Path(folder_paths.get_full_path_or_raise("diffusion_models", unet_name))


NODES = [BraidFp8Loader, BraidSaveFp8]
