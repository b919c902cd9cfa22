"""diffusers' own classes of the architectures in real_models, at the same size.

pipeline_of(name, title)   a pipeline that holds nothing but the model
"""

import inspect

import diffusers
import torch

_STREAMS = dict(num_attention_heads=1, joint_attention_dim=64, num_layers=2, num_single_layers=4)
_HEADS = dict(num_attention_heads=2, attention_head_dim=64)

# title → (pipeline class, class of the model, its arguments)
THEIRS = {
    "FLUX.1": ("FluxPipeline", "FluxTransformer2DModel", _STREAMS | dict(pooled_projection_dim=32)),
    "FLUX.2": ("Flux2Pipeline", "Flux2Transformer2DModel", _STREAMS),
    "Chroma": (
        "ChromaPipeline",
        "ChromaTransformer2DModel",
        _STREAMS | dict(approximator_hidden_dim=128, approximator_layers=2),
    ),
    "Wan 2.1 / 2.2": (
        "WanPipeline",
        "WanTransformer3DModel",
        dict(num_layers=3, num_attention_heads=1, ffn_dim=256, text_dim=64),
    ),
    "Qwen-Image": (
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        _HEADS | dict(num_layers=2, joint_attention_dim=64, axes_dims_rope=(16, 24, 24)),
    ),
    "HunyuanVideo": (
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        dict(num_layers=2, num_single_layers=2, text_embed_dim=64, pooled_projection_dim=32),
    ),
    "Z-Image": (
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        dict(
            dim=192,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=3,
            n_kv_heads=3,
            cap_feat_dim=64,
            axes_dims=[16, 24, 24],
        ),
    ),
    "Kandinsky 5": (
        "Kandinsky5T2VPipeline",
        "Kandinsky5Transformer3DModel",
        dict(num_text_blocks=2, num_visual_blocks=2, model_dim=128, ff_dim=256, time_dim=64),
    ),
    "Krea 2": (
        "Krea2Pipeline",
        "Krea2Transformer2DModel",
        _HEADS
        | dict(
            num_key_value_heads=2,
            intermediate_size=384,
            timestep_embed_dim=64,
            text_hidden_dim=64,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=256,
            axes_dims_rope=(16, 24, 24),
        ),
    ),
    "Ideogram 4": (
        "Ideogram4Pipeline",
        "Ideogram4Transformer2DModel",
        dict(
            num_layers=2,
            num_attention_heads=2,
            intermediate_size=256,
            llm_features_dim=128,
        ),
    ),
    "U-Net (Stable Diffusion)": (
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
        dict(
            sample_size=32,
            block_out_channels=(32, 64, 64, 64),
            cross_attention_dim=64,
            attention_head_dim=2,
        ),
    ),
}


def pipeline_of(name: str, title: str, device: str = "cpu", **others):
    """The pipeline class `name` with the model of `title`; its other components are None.

    `others` replace arguments of the model.
    """
    _, kind, arguments = THEIRS[title]
    with torch.device(device):
        model = getattr(diffusers, kind)(**arguments | others)
    pipeline = getattr(diffusers, name)
    needed = [
        key
        for key, parameter in inspect.signature(pipeline.__init__).parameters.items()
        if parameter.default is inspect.Parameter.empty and key != "self"
    ]
    part = "unet" if "unet" in needed else "transformer"
    return pipeline(**dict.fromkeys(needed) | {part: model}), model
