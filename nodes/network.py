"""The trainable adapter: its settings, a preview of the layers it adapts, and its file."""

from comfy_api.latest import io, ui

from ..engine.checkpoints import AdapterStateDict
from ..engine.comfyui.model import architecture_of, diffusion_model_of
from ..engine.network.adapter_file import SAVE_PRECISIONS, cast, write_adapter
from ..engine.network.architectures import Architecture, architecture_named
from ..engine.network.keys import KEY_FORMATS, converted
from ..engine.network.layers import layer_shapes
from ..engine.network.metadata import parse_metadata
from ..engine.network.report import report_text
from ..engine.network.spec import KINDS, TARGET_MODES, NetworkSpec, parse_network_args
from ..engine.network.targets import select_targets
from . import sockets
from .outputs import next_file


class BraidNetwork(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidNetwork",
            display_name="LoRA Network",
            category=sockets.NETWORK,
            description="What is trained: kind and size of the adapter, and which layers get one.",
            search_aliases=["lora", "loha", "lokr", "network_args", "musubi", "loraplus", "target"],
            inputs=[
                io.Combo.Input(
                    "network_type",
                    options=list(KINDS),
                    default="lora",
                    tooltip="lora: two thin matrices, the safe choice. loha: the product of two "
                    "LoRAs, richer at twice the size. lokr: a Kronecker product, very small files.",
                ),
                io.Int.Input(
                    "network_dim",
                    default=16,
                    min=1,
                    max=1024,
                    tooltip="Rank: inner width of the matrices, 1 to 1024. 4 to 32 for a style or "
                    "a subject; the file grows with it.",
                ),
                io.Float.Input(
                    "network_alpha",
                    default=16.0,
                    min=0.0,
                    max=4096.0,
                    step=0.5,
                    tooltip="The update is scaled by network_alpha / network_dim. Equal to "
                    "network_dim = full strength; half of it = half the effective learning rate. "
                    "0 = network_dim.",
                ),
                io.Float.Input(
                    "loraplus_lr_ratio",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="LoRA+: how many times faster the up matrices learn than the down "
                    "matrices. 0 = off. Start at 4; the paper recommends 16. lora only.",
                ),
                io.String.Input(
                    "exclude_patterns",
                    default="",
                    multiline=True,
                    tooltip="Layers to leave alone: one regular expression a line, or musubi's "
                    "list [r'.*single_blocks.*']. It must match the whole layer name (in the FP8 "
                    "loader it is found anywhere). Added to the model's own defaults.",
                ),
                io.String.Input(
                    "include_patterns",
                    default="",
                    multiline=True,
                    tooltip="target_mode musubi: layers to take back although excluded. whitelist: "
                    "the only layers to adapt. One regular expression a line, for the whole name.",
                ),
                io.Combo.Input(
                    "target_mode",
                    options=list(TARGET_MODES),
                    default="musubi",
                    tooltip="musubi: every layer of the blocks except excluded ones, which include "
                    "takes back. whitelist: only what include_patterns match.",
                ),
                io.Float.Input(
                    "network_dropout",
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    advanced=True,
                    tooltip="Chance, 0 to below 1, that one inner activation is dropped; of loha "
                    "and lokr, that one input of the layer is.",
                ),
                io.Float.Input(
                    "rank_dropout",
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    advanced=True,
                    tooltip="Chance, 0 to below 1, that one rank is dropped for one picture "
                    "of the batch; of loha and lokr, that one output of the layer is.",
                ),
                io.Float.Input(
                    "module_dropout",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Chance, 0 to 1, that a whole layer's adapter is skipped in one step.",
                ),
                io.String.Input(
                    "network_args",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="musubi's key=value tokens, one a line or as on its command line: "
                    "conv_dim, conv_alpha, factor, verbose, and any widget of this node by name. "
                    "What is given here wins.",
                ),
                io.Boolean.Input(
                    "split_qkv",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="On: where a model holds q, k and v in one layer (FLUX, Chroma, "
                    "HunyuanVideo, Z-Image, Lumina 2, ...), each of them gets an adapter of its "
                    "own, as musubi-tuner trains Z-Image. Learns more, trains more parameters. "
                    "lora only.",
                ),
            ],
            outputs=[
                sockets.Network.Output(
                    "network",
                    tooltip="The settings of the adapter, for Train LoRA and the preview.",
                )
            ],
        )

    @classmethod
    def execute(cls, network_args: str = "", **widgets) -> io.NodeOutput:
        return io.NodeOutput(parse_network_args(network_args, **widgets))


class BraidPreviewTargets(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidPreviewTargets",
            display_name="Preview LoRA Targets",
            category=sockets.NETWORK,
            description="Which layers of a model the network would adapt, why each other is "
            "skipped, and what each pattern matches; before any training.",
            search_aliases=["layers", "modules", "exclude_patterns", "include_patterns", "regex"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model that would be trained."),
                sockets.Network.Input("network", tooltip="The settings of LoRA Network."),
            ],
            outputs=[
                io.String.Output(
                    "report", tooltip="Adapted and skipped layers with the reasons, as text."
                ),
                io.Int.Output("modules", tooltip="Number of layers that are adapted."),
                io.Int.Output("parameters", tooltip="Number of values that are trained."),
            ],
        )

    @classmethod
    def execute(cls, model, network: NetworkSpec) -> io.NodeOutput:
        report = select_targets(diffusion_model_of(model), network, architecture_of(model))
        text = report_text(report)
        return io.NodeOutput(text, len(report.selected), report.parameters, ui=ui.PreviewText(text))


class BraidSaveLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidSaveLora",
            display_name="Save LoRA (with metadata)",
            category=sockets.NETWORK,
            description="Writes a LoRA under ComfyUI's output folder, with the training's metadata "
            "and the hashes that LoRA managers look for, and checks the file after writing.",
            search_aliases=["export lora", "safetensors", "kohya", "diffusers", "peft"],
            is_output_node=True,
            inputs=[
                io.LoraModel.Input("lora", tooltip="The LoRA that a training node made."),
                io.String.Input(
                    "filename_prefix",
                    default="loras/braid",
                    tooltip="Path below the output folder and start of the file name; a number is "
                    "added. What lies in loras/ can be chosen in Load LoRA at once.",
                ),
                io.Combo.Input(
                    "key_format",
                    options=list(KEY_FORMATS),
                    default="comfyui",
                    tooltip="Names in the file. comfyui: loads in ComfyUI for every model. kohya: "
                    "as kohya's and musubi-tuner's files. diffusers: as diffusers' "
                    "load_lora_weights takes it; ComfyUI reads it too (LoRA only; alpha is "
                    "folded in).",
                ),
                io.Combo.Input(
                    "save_precision",
                    options=list(SAVE_PRECISIONS),
                    default="keep",
                    tooltip="Number format of the matrices. keep: as trained (fp32), best for "
                    "post-hoc EMA. bf16 and fp16 halve the file.",
                ),
                io.String.Input(
                    "metadata",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="JSON object of further metadata, such as "
                    '{"modelspec.author": "me"}; wins over what the training recorded.',
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model that it was trained on; only for a LoRA from elsewhere "
                    "whose names must be translated.",
                ),
            ],
            outputs=[io.String.Output("path", tooltip="The file written, as an absolute path.")],
        )

    @classmethod
    def execute(
        cls, lora, filename_prefix, key_format, save_precision, metadata="", model=None
    ) -> io.NodeOutput:
        recorded = lora.metadata if isinstance(lora, AdapterStateDict) else {}
        complete = recorded | parse_metadata(metadata)
        if model is not None:
            layers = layer_shapes(diffusion_model_of(model))
            architecture: Architecture | None = architecture_of(model)
        else:
            layers = None
            architecture = architecture_named(complete.get("ss_base_model_version", ""))
        tensors = cast(
            converted(lora, key_format, architecture, layers), key_format, save_precision
        )
        path = next_file(filename_prefix, ".safetensors")
        write_adapter(path, tensors, complete)
        return io.NodeOutput(str(path), ui=ui.PreviewText(str(path)))


NODES = [BraidNetwork, BraidPreviewTargets, BraidSaveLora]
