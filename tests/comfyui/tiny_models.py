"""Tiny real models of each architecture, in ComfyUI's own classes, with seeded random weights.

    patcher = build("flux", dtype=torch.float32)     a comfy.model_patcher.ModelPatcher
    latent(name, batch), conditioning(name, seed)    what its sampler and trainer take

Each fits in a few MB and samples in milliseconds on a CPU.
"""

from dataclasses import dataclass, field

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import torch


@dataclass(frozen=True)
class TinyModel:
    """How to build one architecture small, and what it eats."""

    supported_model: str
    unet_config: dict
    latent_shape: tuple[int, ...]
    """(C, H, W) or (C, T, H, W), without the batch."""
    context_dim: int
    pooled_dim: int | None = None
    extra_cond: dict = field(default_factory=dict)


FLUX = dict(
    image_model="flux",
    in_channels=16,
    out_channels=16,
    vec_in_dim=32,
    context_in_dim=64,
    hidden_size=128,
    mlp_ratio=4.0,
    num_heads=1,
    depth=2,
    depth_single_blocks=4,
    axes_dim=[16, 56, 56],
    theta=10000,
    patch_size=2,
    qkv_bias=True,
    guidance_embed=False,
    txt_ids_dims=[],
)
MODELS = {
    "flux": TinyModel("FluxSchnell", FLUX, (16, 16, 16), 64, pooled_dim=32),
    "flux_dev": TinyModel(
        "Flux", {**FLUX, "guidance_embed": True}, (16, 16, 16), 64, pooled_dim=32
    ),
    "wan": TinyModel(
        "WAN21_T2V",
        dict(
            image_model="wan2.1",
            model_type="t2v",
            dim=128,
            num_heads=1,
            ffn_dim=256,
            num_layers=3,
            text_dim=64,
            patch_size=(1, 2, 2),
            in_dim=16,
            out_dim=16,
            freq_dim=256,
            qk_norm=True,
            cross_attn_norm=True,
            eps=1e-6,
            window_size=(-1, -1),
        ),
        (16, 3, 8, 8),
        64,
    ),
    "qwen_image": TinyModel(
        "QwenImage",
        dict(
            image_model="qwen_image",
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=64,
            joint_attention_dim=64,
            axes_dims_rope=(16, 24, 24),
            in_channels=64,
        ),
        (16, 1, 8, 8),
        64,
    ),
    "hunyuan_video": TinyModel(
        "HunyuanVideo",
        dict(
            image_model="hunyuan_video",
            hidden_size=128,
            num_heads=1,
            depth=2,
            depth_single_blocks=2,
            axes_dim=[16, 56, 56],
            context_in_dim=64,
            vec_in_dim=32,
            patch_size=[1, 2, 2],
            in_channels=16,
            out_channels=16,
            mlp_ratio=4.0,
            theta=256,
            qkv_bias=True,
            guidance_embed=True,
            byt5=False,
            meanflow=False,
            use_cond_type_embedding=False,
            vision_in_dim=None,
            meanflow_sum=False,
        ),
        (16, 3, 8, 8),
        64,
        pooled_dim=32,
    ),
    "lumina2": TinyModel(
        "Lumina2",
        dict(
            image_model="lumina2",
            patch_size=2,
            in_channels=16,
            dim=128,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=64,
            axes_dims=[16, 24, 24],
            axes_lens=[300, 512, 512],
            qk_norm=True,
            multiple_of=256,
            norm_eps=1e-5,
        ),
        (16, 16, 16),
        64,
    ),
    "sd15": TinyModel(
        "SD15",
        dict(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=32,
            num_res_blocks=[1, 1],
            channel_mult=(1, 2),
            transformer_depth=[1, 1],
            transformer_depth_output=[1, 1, 1, 1],
            transformer_depth_middle=1,
            num_heads=2,
            num_head_channels=-1,
            use_spatial_transformer=True,
            context_dim=64,
            legacy=False,
            use_temporal_attention=False,
            use_linear_in_transformer=False,
            adm_in_channels=None,
        ),
        (4, 16, 16),
        64,
    ),
}
ARCHITECTURES = ("flux", "wan", "qwen_image", "hunyuan_video", "lumina2")
"""The transformer architectures that every training test covers."""


def build(
    name: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    weight_std: float = 0.05,
) -> comfy.model_patcher.ModelPatcher:
    """One tiny model wrapped in a ModelPatcher, its weights drawn from `seed`."""
    return built(MODELS[name], dtype, seed, weight_std)


def built(
    tiny: TinyModel, dtype: torch.dtype = torch.float32, seed: int = 0, weight_std: float = 0.05
) -> comfy.model_patcher.ModelPatcher:
    """As `build`, for one that is not in MODELS."""
    config = getattr(comfy.supported_models, tiny.supported_model)(dict(tiny.unet_config))
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.diffusion_model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * weight_std
            if parameter.ndim == 1 and key.endswith("weight"):
                values += 1.0
            parameter.copy_(values.to(parameter.dtype))
    model.eval()
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(
        model.to(device), load_device=device, offload_device=device
    )


def latent(name: str, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """A standard normal latent batch of the model's shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, *MODELS[name].latent_shape), generator=generator)


def conditioning(name: str, seed: int = 0, tokens: int = 6) -> list:
    """CONDITIONING as a text encoder node gives it: [[context (1, L, D), options]]."""
    tiny = MODELS[name]
    generator = torch.Generator().manual_seed(1000 + seed)
    options = dict(tiny.extra_cond)
    if tiny.pooled_dim:
        options["pooled_output"] = torch.randn((1, tiny.pooled_dim), generator=generator)
    if name == "lumina2":
        options["attention_mask"] = torch.ones(1, tokens)
    return [[torch.randn((1, tokens, tiny.context_dim), generator=generator), options]]


def sampled(patcher, name: str, *, steps: int = 2, cfg: float = 1.0, seed: int = 0) -> torch.Tensor:
    """What the host samples from the noise of `seed`, in inference mode like its executor."""
    noise = latent(name, seed=seed)
    with torch.inference_mode():
        return comfy.sample.sample(
            patcher,
            noise,
            steps,
            cfg,
            "euler",
            "simple",
            conditioning(name, 0),
            conditioning(name, 1),
            torch.zeros_like(noise),
            seed=0,
            disable_pbar=True,
        )
