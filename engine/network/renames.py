"""What diffusers calls the layers of each family, for adapter files under its names."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Rename:
    """One layer of ComfyUI's model under the name, or names, that another program gives it."""

    layer: str
    """Regular expression that must match the whole of our dotted name."""
    names: tuple[str, ...]
    """Other name with \\1 … from `layer`; several when the other program holds the rows of our
    weight in separate layers, from the top: (q, k, v) or (q, k, v, mlp)."""
    parts: int = 1
    """How many such parts our weight has where the other program holds them in one layer, too."""

    def of(self, name: str) -> tuple[str, ...]:
        """The names of our layer `name` there; () when this rename is not about it."""
        match = re.fullmatch(self.layer, name)
        return tuple(match.expand(other) for other in self.names) if match else ()

    def parts_of(self, name: str) -> int:
        """How many parts the rows of our layer `name` have; 1 when this is not about it."""
        return max(self.parts, len(self.names)) if re.fullmatch(self.layer, name) else 1


_DOUBLE = r"double_blocks\.(\d+)\."
_SINGLE = r"single_blocks\.(\d+)\."

# diffusers' FluxTransformer2DModel; ComfyUI: comfy.utils.flux_to_diffusers
FLUX_DOUBLE = tuple(
    Rename(layer=_DOUBLE + layer, names=tuple(rf"transformer_blocks.\1.{name}" for name in names))
    for layer, names in (
        (r"img_attn\.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
        (r"txt_attn\.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
        (r"img_attn\.proj", ("attn.to_out.0",)),
        (r"txt_attn\.proj", ("attn.to_add_out",)),
    )
)
# diffusers' ChromaTransformer2DModel: FLUX.1's without modulation inside the blocks
CHROMA = FLUX_DOUBLE + (
    Rename(layer=_DOUBLE + r"img_mlp\.0", names=(r"transformer_blocks.\1.ff.net.0.proj",)),
    Rename(layer=_DOUBLE + r"img_mlp\.2", names=(r"transformer_blocks.\1.ff.net.2",)),
    Rename(layer=_DOUBLE + r"txt_mlp\.0", names=(r"transformer_blocks.\1.ff_context.net.0.proj",)),
    Rename(layer=_DOUBLE + r"txt_mlp\.2", names=(r"transformer_blocks.\1.ff_context.net.2",)),
    Rename(
        layer=_SINGLE + r"linear1",
        names=(
            r"single_transformer_blocks.\1.attn.to_q",
            r"single_transformer_blocks.\1.attn.to_k",
            r"single_transformer_blocks.\1.attn.to_v",
            r"single_transformer_blocks.\1.proj_mlp",
        ),
    ),
    Rename(layer=_SINGLE + r"linear2", names=(r"single_transformer_blocks.\1.proj_out",)),
)
FLUX = CHROMA + (
    Rename(layer=_DOUBLE + r"img_mod\.lin", names=(r"transformer_blocks.\1.norm1.linear",)),
    Rename(layer=_DOUBLE + r"txt_mod\.lin", names=(r"transformer_blocks.\1.norm1_context.linear",)),
    Rename(
        layer=_SINGLE + r"modulation\.lin", names=(r"single_transformer_blocks.\1.norm.linear",)
    ),
)
FLUX_2 = FLUX_DOUBLE + (
    Rename(layer=_DOUBLE + r"img_mlp\.0", names=(r"transformer_blocks.\1.ff.linear_in",)),
    Rename(layer=_DOUBLE + r"img_mlp\.2", names=(r"transformer_blocks.\1.ff.linear_out",)),
    Rename(layer=_DOUBLE + r"txt_mlp\.0", names=(r"transformer_blocks.\1.ff_context.linear_in",)),
    Rename(layer=_DOUBLE + r"txt_mlp\.2", names=(r"transformer_blocks.\1.ff_context.linear_out",)),
    Rename(
        layer=_SINGLE + r"linear1",
        names=(r"single_transformer_blocks.\1.attn.to_qkv_mlp_proj",),
        parts=4,
    ),
    Rename(layer=_SINGLE + r"linear2", names=(r"single_transformer_blocks.\1.attn.to_out",)),
)
# HunyuanVideo as Tencent, musubi and diffusion-pipe name it; diffusers converts these on loading
HUNYUAN = (
    Rename(
        layer=_DOUBLE + r"(img|txt)_attn\.qkv", names=(r"double_blocks.\1.\2_attn_qkv",), parts=3
    ),
    Rename(layer=_DOUBLE + r"(img|txt)_attn\.proj", names=(r"double_blocks.\1.\2_attn_proj",)),
    Rename(layer=_DOUBLE + r"(img|txt)_mlp\.0", names=(r"double_blocks.\1.\2_mlp.fc1",)),
    Rename(layer=_DOUBLE + r"(img|txt)_mlp\.2", names=(r"double_blocks.\1.\2_mlp.fc2",)),
    Rename(layer=_DOUBLE + r"(img|txt)_mod\.lin", names=(r"double_blocks.\1.\2_mod.linear",)),
    Rename(layer=_SINGLE + r"modulation\.lin", names=(r"single_blocks.\1.modulation.linear",)),
    Rename(layer=_SINGLE + r"linear1", names=(r"single_blocks.\1.linear1",), parts=4),
)
HUNYUAN_15_SPLIT = (
    Rename(
        layer=_DOUBLE + r"(img|txt)_attn\.qkv",
        names=tuple(rf"double_blocks.\1.\2_attn_{part}" for part in "qkv"),
    ),
)
IDEOGRAM_4 = (
    Rename(layer=r"layers\.(\d+)\.attention\.qkv", names=(r"layers.\1.attention.qkv",), parts=3),
)
# What ComfyUI's other transformers call a layer that holds q, k and v: qkv, qkv_x, img_qkv, Wqkv
ANY_QKV = (Rename(layer=r"(.+\.\w*qkv\w*)", names=(r"\1",), parts=3),)
LUMINA_BLOCK = r"(layers|noise_refiner|context_refiner)\.(\d+)\."
Z_IMAGE = (
    Rename(
        layer=LUMINA_BLOCK + r"attention\.qkv",
        names=tuple(rf"\1.\2.attention.to_{part}" for part in "qkv"),
    ),
    Rename(layer=LUMINA_BLOCK + r"attention\.out", names=(r"\1.\2.attention.to_out.0",)),
)
KREA_2 = tuple(
    Rename(layer=ours + r"\.(\d+)\." + layer, names=(f"{theirs}.{name}",))
    for ours, theirs in (
        (r"blocks", r"transformer_blocks.\1"),
        (r"txtfusion\.layerwise_blocks", r"text_fusion.layerwise_blocks.\1"),
        (r"txtfusion\.refiner_blocks", r"text_fusion.refiner_blocks.\1"),
    )
    for layer, name in (
        (r"attn\.wq", "attn.to_q"),
        (r"attn\.wk", "attn.to_k"),
        (r"attn\.wv", "attn.to_v"),
        (r"attn\.gate", "attn.to_gate"),
        (r"attn\.wo", "attn.to_out.0"),
        (r"mlp\.gate", "ff.gate"),
        (r"mlp\.up", "ff.up"),
        (r"mlp\.down", "ff.down"),
    )
) + tuple(
    Rename(layer=layer, names=(name,))
    for layer, name in (
        (r"first", "img_in"),
        (r"tmlp\.0", "time_embed.linear_1"),
        (r"tmlp\.2", "time_embed.linear_2"),
        (r"tproj\.1", "time_mod_proj"),
        (r"txtmlp\.1", "txt_in.linear_1"),
        (r"txtmlp\.3", "txt_in.linear_2"),
        (r"txtfusion\.projector", "text_fusion.projector"),
        (r"last\.linear", "final_layer.linear"),
    )
)

# diffusers' UNet2DConditionModel; ComfyUI: comfy.utils.unet_to_diffusers. Two residual blocks to a
# level, as in Stable Diffusion 1, 2, XL and the XL refiner: three numbers to a level. A U-Net with
# another count has layers that no rename is about.
_DOWN = tuple((i, f"down_blocks.{(i - 1) // 3}", (i - 1) % 3) for i in range(1, 12) if i % 3)
_UP = tuple((i, f"up_blocks.{i // 3}", i % 3) for i in range(12))


def _unet_places(part: int, kind: str) -> tuple[tuple[str, str], ...]:
    """(our block as a pattern, theirs) of every residual block (0) or transformer (1)."""
    down = tuple((rf"input_blocks\.{i}\.{part}\.", f"{b}.{kind}.{n}.") for i, b, n in _DOWN)
    up = tuple((rf"output_blocks\.{i}\.{part}\.", f"{b}.{kind}.{n}.") for i, b, n in _UP)
    middle = ((0, 0), (2, 1)) if part == 0 else ((1, 0),)
    return (
        *down,
        *((rf"middle_block\.{i}\.", f"mid_block.{kind}.{n}.") for i, n in middle),
        *up,
    )


_UNET_TRANSFORMERS = _unet_places(1, "attentions")
_UNET_ATTENTION = r"(transformer_blocks\.\d+\.attn[12])\.(to_[qkv]|to_out)"
UNET = (
    tuple(
        Rename(layer=ours + layer, names=(theirs + name,))
        for ours, theirs in _unet_places(0, "resnets")
        for layer, name in (
            (r"in_layers\.2", "conv1"),
            (r"out_layers\.3", "conv2"),
            (r"emb_layers\.1", "time_emb_proj"),
            (r"skip_connection", "conv_shortcut"),
        )
    )
    + tuple(
        Rename(layer=ours + layer, names=(theirs + name,))
        for ours, theirs in _UNET_TRANSFORMERS
        for layer, name in (
            (r"(proj_in|proj_out|transformer_blocks\.\d+\.ff\.net\.(?:0\.proj|2))", r"\1"),
            # The only name of an attention layer that ComfyUI knows beside kohya's; diffusers has
            # read it from its first LoRA on.
            (_UNET_ATTENTION + r"(?:\.0)?", r"\1.processor.\2"),
        )
    )
    + tuple(
        Rename(
            layer=rf"input_blocks\.{3 * level + 3}\.0\.op",
            names=(f"down_blocks.{level}.downsamplers.0.conv",),
        )
        for level in range(3)
    )
    + tuple(
        Rename(
            layer=rf"output_blocks\.{3 * level + 2}\.[12]\.conv",
            names=(f"up_blocks.{level}.upsamplers.0.conv",),
        )
        for level in range(3)
    )
    + tuple(
        Rename(layer=layer, names=(name,))
        for layer, name in (
            (r"input_blocks\.0\.0", "conv_in"),
            (r"time_embed\.0", "time_embedding.linear_1"),
            (r"time_embed\.2", "time_embedding.linear_2"),
            (r"label_emb\.0\.0", "add_embedding.linear_1"),
            (r"label_emb\.0\.2", "add_embedding.linear_2"),
            (r"out\.2", "conv_out"),
        )
    )
)
# The attention layers as PEFT has them, and as sd-scripts has those of Stable Diffusion 1 and 2
UNET_PEFT = tuple(
    Rename(layer=ours + _UNET_ATTENTION + r"(\.0)?", names=(theirs + r"\1.\2\3",))
    for ours, theirs in _UNET_TRANSFORMERS
)
