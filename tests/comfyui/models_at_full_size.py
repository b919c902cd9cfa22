"""Full-size models in ComfyUI's own classes on the meta device, and what they are trained on.

The figures are those of the published checkpoints, as ComfyUI 0.33's model_detection reads them.
"""

import comfy.model_patcher
import comfy.supported_models
import torch

FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096,
    hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=19, depth_single_blocks=38,
    axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True,
    txt_ids_dims=[],
)  # fmt: skip
FLUX_2 = dict(
    image_model="flux2", in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=15360,
    hidden_size=6144, mlp_ratio=3.0, num_heads=48, depth=8, depth_single_blocks=48,
    axes_dim=[32, 32, 32, 32], theta=2000, patch_size=1, qkv_bias=False, guidance_embed=True,
    global_modulation=True, mlp_silu_act=True, ops_bias=False, default_ref_method="index",
    ref_index_scale=10.0, txt_ids_dims=[3], yak_mlp=False, txt_norm=False,
)  # fmt: skip
QWEN = dict(image_model="qwen_image", num_layers=60, in_channels=64)
WAN = dict(
    image_model="wan2.1", model_type="t2v", dim=5120, num_heads=40, ffn_dim=13824, num_layers=40,
    text_dim=4096, patch_size=(1, 2, 2), in_dim=16, out_dim=16, freq_dim=256, qk_norm=True,
    cross_attn_norm=True, eps=1e-6, window_size=(-1, -1),
)  # fmt: skip
HUNYUAN = dict(
    image_model="hunyuan_video", in_channels=16, out_channels=16, patch_size=[1, 2, 2],
    vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=20,
    depth_single_blocks=40, axes_dim=[16, 56, 56], theta=256, qkv_bias=True, guidance_embed=True,
    byt5=False, meanflow=False, meanflow_sum=False, use_cond_type_embedding=False,
    vision_in_dim=None,
)  # fmt: skip
LUMINA = dict(
    image_model="lumina2", patch_size=2, in_channels=16, dim=3840, n_layers=30, n_refiner_layers=2,
    n_heads=30, n_kv_heads=30, cap_feat_dim=2560, axes_dims=[32, 48, 48],
    axes_lens=[1536, 512, 512], qk_norm=True, multiple_of=256, norm_eps=1e-5, rope_theta=256.0,
    ffn_dim_multiplier=8 / 3, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32,
)  # fmt: skip
SDXL = dict(
    use_checkpoint=False, image_size=32, out_channels=4, use_spatial_transformer=True, legacy=False,
    num_classes="sequential", adm_in_channels=2816, in_channels=4, model_channels=320,
    num_res_blocks=[2, 2, 2], transformer_depth=[0, 0, 2, 2, 10, 10], channel_mult=[1, 2, 4],
    transformer_depth_middle=10, use_linear_in_transformer=True, context_dim=2048,
    num_head_channels=64, transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
    use_temporal_attention=False, use_temporal_resblock=False,
)  # fmt: skip

MODELS = {
    "FLUX.1": ("Flux", FLUX, 4096),
    "FLUX.2": ("Flux2", FLUX_2, 15360),
    "Qwen-Image": ("QwenImage", QWEN, 3584),
    "Wan 14B": ("WAN21_T2V", WAN, 4096),
    "Wan I2V 14B": ("WAN22_T2V" and "WAN21_I2V", WAN | dict(model_type="i2v", in_dim=36), 4096),
    "Wan 1.3B": (
        "WAN21_T2V",
        WAN | dict(dim=1536, num_heads=12, ffn_dim=8960, num_layers=30),
        4096,
    ),
    "Wan 5B": (
        "WAN22_T2V",
        WAN | dict(dim=3072, num_heads=24, ffn_dim=14336, num_layers=30, in_dim=48, out_dim=48),
        4096,
    ),
    "HunyuanVideo": ("HunyuanVideo", HUNYUAN, 4096),
    "HunyuanVideo 1.5": (
        "HunyuanVideo15",
        HUNYUAN
        | dict(
            in_channels=65, out_channels=32, patch_size=[1, 1, 1], vec_in_dim=None,
            context_in_dim=3584, hidden_size=2048, num_heads=16, depth=54, depth_single_blocks=0,
            guidance_embed=False, byt5=True, use_cond_type_embedding=True, vision_in_dim=1152,
            meanflow_sum=True,
        ),
        3584,
    ),
    "Z-Image": ("ZImage", LUMINA, 2560),
    "SDXL": ("SDXL", SDXL, 2048),
}  # fmt: skip
"""Name → (class of comfy.supported_models, unet_config, width of the text encoder)."""


def full_size(name: str, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"):
    """A ModelPatcher of the model without memory; stored in `dtype`."""
    kind, config, _ = MODELS[name]
    config = getattr(comfy.supported_models, kind)(dict(config))
    config.set_inference_dtype(torch.bfloat16, None)
    with torch.inference_mode():
        model = config.get_model({}, "", device="meta").eval()
    if dtype != torch.bfloat16:
        for parameter in model.diffusion_model.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.to(dtype)
    device = torch.device(device)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def item(name: str, shape: tuple[int, ...], tokens: int, references: tuple = ()):
    """(samples, CONDITIONING) of the sizes asked for; `references`: shapes of reference latents."""
    options = {}
    if name == "FLUX.1" or name == "HunyuanVideo":
        options["pooled_output"] = torch.zeros(1, 768)
    if name == "SDXL":
        options["pooled_output"] = torch.zeros(1, 1280)
    if name in ("Z-Image",):
        options["num_tokens"] = tokens
    if references:
        options["reference_latents"] = [torch.zeros(size) for size in references]
    return torch.zeros(shape), [[torch.zeros(1, tokens, MODELS[name][2]), options]]
