"""Every architecture of the table as ComfyUI's own class, at a size that a test can hold.

real_model(title)        the diffusion model, without memory for its weights
with_base_model(title)   the whole model, as the key maps of `comfy.lora` take it
network_of(model, …)     an adapter network on it, its delta not zero
"""

import comfy.ops
import comfy.supported_models
import torch
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.flux.model import Flux
from comfy.ldm.hunyuan_video.model import HunyuanVideo
from comfy.ldm.ideogram4.model import Ideogram4Transformer2DModel
from comfy.ldm.kandinsky5.model import Kandinsky5
from comfy.ldm.krea2.model import SingleStreamDiT
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel
from tiny_models import FLUX, MODELS

from comfyui_braid.engine.network.attach import build_network
from comfyui_braid.engine.network.spec import NetworkSpec, TargetPatterns
from comfyui_braid.engine.network.targets import select_targets

_FLUX = {k: v for k, v in FLUX.items() if k != "image_model"}
_FLUX_2 = _FLUX | dict(
    in_channels=128,
    out_channels=128,
    axes_dim=[32] * 4,
    mlp_ratio=3.0,
    global_modulation=True,
    mlp_silu_act=True,
    qkv_bias=False,
    ops_bias=False,
    vec_in_dim=None,
    patch_size=1,
)
_CHROMA = {k: v for k, v in _FLUX.items() if k != "guidance_embed"} | dict(
    in_dim=64, out_dim=128, hidden_dim=128, n_layers=2
)
_HUNYUAN = {k: v for k, v in MODELS["hunyuan_video"].unet_config.items() if k != "image_model"}
_HUNYUAN_15 = _HUNYUAN | dict(
    depth_single_blocks=0,
    vec_in_dim=None,
    guidance_embed=False,
    byt5=True,
    use_cond_type_embedding=True,
    vision_in_dim=64,
    meanflow_sum=True,
)
_WAN = {k: v for k, v in MODELS["wan"].unet_config.items() if k != "image_model"}
del _WAN["window_size"]
_QWEN = {k: v for k, v in MODELS["qwen_image"].unet_config.items() if k != "image_model"}
_LUMINA = {k: v for k, v in MODELS["lumina2"].unet_config.items() if k != "image_model"}
_KANDINSKY = dict(num_text_blocks=2, num_visual_blocks=2, model_dim=128, ff_dim=256, time_dim=64)
_KREA = dict(
    layers=28, features=128, heads=2, kvheads=2, txtdim=64, txtheads=2, txtkvheads=2, tdim=64
)
_IDEOGRAM = dict(num_layers=2, num_attention_heads=2, intermediate_size=256, llm_features_dim=128)

_UNET = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=32,
    context_dim=64,
    num_res_blocks=[2] * 4,
    channel_mult=(1, 2, 2, 2),
    transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_output=[1] * 9 + [0] * 3,
    transformer_depth_middle=1,
    num_heads=2,
    num_head_channels=-1,
    use_spatial_transformer=True,
    use_linear_in_transformer=False,
    use_temporal_attention=False,
    legacy=False,
    adm_in_channels=None,
)

# title → (class, small arguments, unet_config as detected, layers adapted by default)
REAL = {
    "FLUX.1": (Flux, _FLUX, {"image_model": "flux"}, 2 * 8 + 4 * 2),
    "FLUX.2": (Flux, _FLUX_2, {"image_model": "flux2", "hidden_size": 6144}, 2 * 8 + 4 * 2),
    "Chroma": (Chroma, _CHROMA, {"image_model": "chroma"}, 2 * 8 + 4 * 2),
    "Wan 2.1 / 2.2": (WanModel, _WAN, {"image_model": "wan2.1"}, 3 * 10),
    "Qwen-Image": (QwenImageTransformer2DModel, _QWEN, {"image_model": "qwen_image"}, 2 * 12),
    "HunyuanVideo": (
        HunyuanVideo,
        _HUNYUAN,
        {"image_model": "hunyuan_video", "vec_in_dim": 768, "use_cond_type_embedding": False},
        2 * 8 + 2 * 2,
    ),
    "HunyuanVideo 1.5": (
        HunyuanVideo,
        _HUNYUAN_15,
        {"image_model": "hunyuan_video", "vec_in_dim": None, "use_cond_type_embedding": True},
        2 * 8,
    ),
    "HunyuanImage 2.1": (
        HunyuanVideo,
        _HUNYUAN | dict(vec_in_dim=None, guidance_embed=False, byt5=True),
        {"image_model": "hunyuan_video", "vec_in_dim": None, "use_cond_type_embedding": False},
        2 * 8 + 2 * 2,
    ),
    "Lumina 2": (NextDiT, _LUMINA, {"image_model": "lumina2", "dim": 2304}, 2 * 5),
    "Z-Image": (
        NextDiT,
        _LUMINA
        | dict(dim=192, n_heads=3, n_kv_heads=3, ffn_dim_multiplier=8 / 3, z_image_modulation=True),
        {"image_model": "lumina2", "dim": 3840},
        2 * 5,
    ),
    "Kandinsky 5": (Kandinsky5, _KANDINSKY, {"image_model": "kandinsky5"}, 2 * 6 + 2 * 10),
    "Krea 2": (SingleStreamDiT, _KREA, {"image_model": "krea2"}, 264),
    "Ideogram 4": (Ideogram4Transformer2DModel, _IDEOGRAM, {"image_model": "ideogram4"}, 2 * 5),
    "U-Net (Stable Diffusion)": (
        UNetModel,
        _UNET,
        {"model_channels": 32, "context_dim": 64},
        16 * 12,
    ),
}


def real_model(title: str, **others) -> torch.nn.Module:
    """ComfyUI's own class without memory for its weights; `others` replace small arguments."""
    kind, arguments, _, _ = REAL[title]
    operations = comfy.ops.disable_weight_init
    arguments = arguments | others
    return kind(**arguments, device="meta", dtype=torch.float32, operations=operations)


SUPPORTED = {
    "FLUX.1": "Flux",
    "FLUX.2": "Flux2",
    "Chroma": "Chroma",
    "Wan 2.1 / 2.2": "WAN21_T2V",
    "Qwen-Image": "QwenImage",
    "HunyuanVideo": "HunyuanVideo",
    "HunyuanVideo 1.5": "HunyuanVideo15",
    "HunyuanImage 2.1": "HunyuanImage21",
    "Lumina 2": "Lumina2",
    "Z-Image": "ZImage",
    "Kandinsky 5": "Kandinsky5",
    "Krea 2": "Krea2",
    "Ideogram 4": "Ideogram4",
    "U-Net (Stable Diffusion)": "SD15",
}


def with_base_model(title: str):
    """The small model of `title` on the meta device inside ComfyUI's model_base class."""
    _, arguments, unet_config, _ = REAL[title]
    config = getattr(comfy.supported_models, SUPPORTED[title])(arguments | unet_config)
    config.unet_config.update(arguments)  # small again, where the family has fixed sizes
    config.set_inference_dtype(torch.float32, None)
    return config.get_model({}, "", device="meta")


def network_of(model, architecture, targets: TargetPatterns, **spec):
    """A network on `model`, a diffusion model, of rank 2 and alpha 1; its up matrices not zero."""
    spec = NetworkSpec(rank=2, alpha=1.0, targets=targets, **spec)
    report = select_targets(model, spec, architecture)
    network = build_network(report.selected, spec, seed=0)
    generator = torch.Generator().manual_seed(1)
    for adapter in network.adapters.values():
        torch.nn.init.normal_(adapter.up, generator=generator)
    return network
