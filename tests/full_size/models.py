"""Models at full size, in ComfyUI's own classes, and what they are trained on.

The figures are those of the published checkpoints, as ComfyUI 0.33's model_detection reads them.
"""

import comfy.supported_models
import torch
from torch import nn

FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096,
    hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=19, depth_single_blocks=38,
    axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True,
    txt_ids_dims=[],
)  # fmt: skip
WAN = dict(
    image_model="wan2.1", model_type="t2v", dim=1536, num_heads=12, ffn_dim=8960, num_layers=30,
    text_dim=4096, patch_size=(1, 2, 2), in_dim=16, out_dim=16, freq_dim=256, qk_norm=True,
    cross_attn_norm=True, eps=1e-6, window_size=(-1, -1),
)  # fmt: skip
Z_IMAGE = dict(
    image_model="lumina2", patch_size=2, in_channels=16, dim=3840, n_layers=30, n_refiner_layers=2,
    n_heads=30, n_kv_heads=30, cap_feat_dim=2560, axes_dims=[32, 48, 48],
    axes_lens=[1536, 512, 512], qk_norm=True, multiple_of=256, norm_eps=1e-5, rope_theta=256.0,
    ffn_dim_multiplier=8 / 3, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32,
)  # fmt: skip
MODELS = {
    "Wan 1.3B": ("WAN21_T2V", WAN, 4096),
    "Z-Image": ("ZImage", Z_IMAGE, 2560),
    "FLUX.1": ("Flux", FLUX, 4096),
}
"""Name → (class of comfy.supported_models, unet_config, width of the text encoder)."""


def diffusion_model(name: str) -> nn.Module:
    """The network, without memory for its weights."""
    kind, unet_config, _ = MODELS[name]
    config = getattr(comfy.supported_models, kind)(dict(unet_config))
    config.set_inference_dtype(torch.bfloat16, None)
    with torch.inference_mode():
        return config.get_model({}, "", device="meta").diffusion_model


def item(name: str, shape: tuple[int, ...], tokens: int):
    """(samples, CONDITIONING) of latents of that shape and a prompt of so many tokens."""
    options = {
        "FLUX.1": {"pooled_output": torch.zeros(1, 768)},
        "Z-Image": {"num_tokens": tokens},
    }
    prompt = torch.zeros(1, tokens, MODELS[name][2])
    return torch.zeros(shape), [[prompt, options.get(name, {})]]
