"""One table: how each model family that ComfyUI knows is adapted, named and described.

Detection works on what ComfyUI itself detected: the `unet_config` of the loaded model. Layer names
are ComfyUI's, dotted from the root of the diffusion model; the patterns were checked against every
`comfy/ldm` model named here (ComfyUI 0.33) and a test holds them to it.

Where the defaults differ from musubi-tuner's, on purpose:
  Qwen-Image, HunyuanVideo 1.5   musubi's patterns (`.*(_mod_).*`, `.*(_in).*`) were written for
                                 names with underscores and never match, so that it trains the
                                 modulation layers by accident; here they are excluded.
  FLUX, FLUX.2                   giving exclude_patterns never switches the defaults off.
  Kandinsky 5                    no default include_patterns: musubi's take attention and feed
                                 forward back from whatever the user excludes.
  Wan, `norm`, `_in`, `head` …   patterns that could only match outside the blocks are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

from . import renames
from .renames import LUMINA_BLOCK


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What Braid knows of one model family."""

    title: str
    """For people."""
    detect: Mapping[str, object] = field(default_factory=dict)
    """Entries of ComfyUI's unet_config that identify it; `...` = present with any value."""
    layers: str
    """Regular expression of the layers that may be adapted; must match the whole dotted name."""
    exclude: tuple[str, ...] = ()
    """Layers among them that are left alone unless include_patterns take them back."""
    base_model_version: str
    """ss_base_model_version, as musubi-tuner or sd-scripts write it."""
    modelspec: str
    """Architecture id of modelspec.architecture, without the `/lora`."""
    implementation: str = ""
    """modelspec.implementation."""
    resolution: str = "1024x1024"
    """modelspec.resolution."""
    diffusers_prefix: str = "diffusion_model."
    """Key prefix that both ComfyUI and diffusers read for this family in PEFT files."""
    diffusers: tuple[renames.Rename, ...] = ()
    """Layers whose name in diffusers differs, or whose rows have parts."""
    diffusers_keeps: str = r".*"
    """Regular expression of the other layers that diffusers reads, under the name they have here;
    must match the whole dotted name. Of what neither this nor `diffusers` is about it reads none.
    """
    diffusers_suffixes: tuple[str, str] = (".lora_A.weight", ".lora_B.weight")
    """What follows a layer's name there: of the down and of the up matrix."""
    diffusers_cannot: str = ""
    """Why no file of this family is read by diffusers and ComfyUI both; "" where one is."""
    musubi: tuple[renames.Rename, ...] = ()
    """Layers whose name in musubi-tuner differs from both; only read, never written."""


_STREAM_BLOCKS = r"(double_blocks|single_blocks)\..*"
_STREAM_MODULATION = (r".*(img_mod|txt_mod|modulation)\.lin.*",)
_FLUX_2_COMMON: dict[str, Any] = dict(
    layers=_STREAM_BLOCKS,  # the modulation of FLUX.2 is shared and lies outside the blocks
    implementation="https://github.com/black-forest-labs/flux2",
    diffusers_prefix="transformer.",
    diffusers=renames.FLUX_2,
    diffusers_keeps="",
)
_HUNYUAN_COMMON: dict[str, Any] = dict(layers=_STREAM_BLOCKS, exclude=_STREAM_MODULATION)
_NO_LOADER = "diffusers has no LoRA loader for it"
_LUMINA_COMMON: dict[str, Any] = dict(
    layers=LUMINA_BLOCK + ".*",
    exclude=(r".*adaLN_modulation.*", r".*_refiner.*"),
)

DEFAULT = Architecture(
    title="other model",
    layers=r".+?\.\d+\..+",  # inside an element of a numbered container: the repeated blocks
    exclude=(
        r"(?i:.*(modulation|adaln|img_mod|txt_mod|emb_layers|_emb\b|embedder).*)",
        r".*\b(mod[CX]+|norm\d?)\.(\d+|linear)",  # modulation in AuraFlow and OmniGen 2
    ),
    base_model_version="unknown",
    modelspec="unknown",
    diffusers=renames.ANY_QKV,
)
"""For anything that no row below detects."""

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        title="FLUX.1",
        detect={"image_model": "flux"},
        layers=_STREAM_BLOCKS,
        exclude=_STREAM_MODULATION,
        base_model_version="flux1",
        modelspec="Flux.1-dev",
        implementation="https://github.com/black-forest-labs/flux",
        diffusers_prefix="transformer.",
        diffusers=renames.FLUX,
        diffusers_keeps="",
    ),
    Architecture(
        title="FLUX.2 klein 4B",
        detect={"image_model": "flux2", "hidden_size": 3072},
        base_model_version="flux_2_klein_4b",
        modelspec="Flux.2-klein-4b",
        **_FLUX_2_COMMON,
    ),
    Architecture(
        title="FLUX.2 klein 9B",
        detect={"image_model": "flux2", "hidden_size": 4096},
        base_model_version="flux_2_klein_9b",
        modelspec="Flux.2-klein-9b",
        **_FLUX_2_COMMON,
    ),
    Architecture(
        title="FLUX.2",
        detect={"image_model": "flux2"},
        base_model_version="flux_2_dev",
        modelspec="Flux.2-dev",
        **_FLUX_2_COMMON,
    ),
    Architecture(
        title="Chroma",
        detect={"image_model": "chroma"},
        layers=_STREAM_BLOCKS,  # modulated by distilled_guidance_layer, outside the blocks
        base_model_version="chroma",
        modelspec="Chroma",
        implementation="https://huggingface.co/lodestones/Chroma",
        diffusers_prefix="transformer.",
        diffusers=renames.CHROMA,
        diffusers_keeps="",
    ),
    Architecture(
        title="Wan 2.1 / 2.2",
        detect={"image_model": "wan2.1"},
        layers=r"blocks\..*",  # modulation is a parameter of the block, not a layer
        base_model_version="wan",
        modelspec="wan2.1",
        implementation="https://github.com/Wan-Video/Wan2.1",
        resolution="1280x720",
    ),
    Architecture(
        title="Qwen-Image Layered",
        detect={"image_model": "qwen_image", "use_additional_t_cond": True},
        layers=r"transformer_blocks\..*",
        exclude=(r".*(img_mod|txt_mod).*",),
        base_model_version="qwen_image_layered",
        modelspec="Qwen-Image-Layered",
        implementation="https://github.com/QwenLM/Qwen-Image-Layered",
        diffusers_prefix="transformer.",
    ),
    Architecture(
        title="Qwen-Image",
        detect={"image_model": "qwen_image"},
        layers=r"transformer_blocks\..*",
        exclude=(r".*(img_mod|txt_mod).*",),
        base_model_version="qwen_image",
        modelspec="Qwen-Image",
        implementation="https://github.com/QwenLM/Qwen-Image",
        resolution="1328x1328",
        diffusers_prefix="transformer.",
    ),
    Architecture(
        title="HunyuanVideo 1.5",
        detect={"image_model": "hunyuan_video", "use_cond_type_embedding": True},
        base_model_version="hunyuan_video_1_5",
        modelspec="hunyuan-video-1.5",
        implementation="https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5",
        resolution="1280x720",
        musubi=(*renames.HUNYUAN, *renames.HUNYUAN_15_SPLIT),
        diffusers_cannot=_NO_LOADER,
        **_HUNYUAN_COMMON,
    ),
    Architecture(
        title="HunyuanImage 2.1",
        detect={"image_model": "hunyuan_video", "vec_in_dim": None},
        base_model_version="hunyuan_image_2_1",
        modelspec="hunyuan-image-2.1",
        implementation="https://github.com/Tencent-Hunyuan/HunyuanImage-2.1",
        resolution="2048x2048",
        musubi=renames.HUNYUAN,
        diffusers_cannot=_NO_LOADER,
        **_HUNYUAN_COMMON,
    ),
    Architecture(
        title="HunyuanVideo",
        detect={"image_model": "hunyuan_video"},
        base_model_version="hunyuan_video",
        modelspec="hunyuan-video",
        implementation="https://github.com/Tencent/HunyuanVideo",
        resolution="1280x720",
        diffusers_prefix="transformer.",
        diffusers=renames.HUNYUAN,
        diffusers_keeps=r"single_blocks\.\d+\.linear[12]",
        **_HUNYUAN_COMMON,
    ),
    Architecture(
        title="Z-Image",
        detect={"image_model": "lumina2", "dim": 3840},
        base_model_version="z_image",
        modelspec="Z-Image",
        implementation="https://github.com/Tongyi-MAI/Z-Image",
        diffusers_prefix="transformer.",
        diffusers=renames.Z_IMAGE,
        diffusers_keeps=LUMINA_BLOCK + r"(feed_forward|adaLN_modulation)\..*",
        **_LUMINA_COMMON,
    ),
    Architecture(
        title="Lumina 2",
        detect={"image_model": "lumina2"},
        base_model_version="lumina2",
        modelspec="lumina-2",
        implementation="https://github.com/Alpha-VLLM/Lumina-Image-2.0",
        # ComfyUI's map of separate q, k, v is only right for as many key as query heads (Z-Image)
        diffusers_cannot="diffusers converts only files that adapt every layer of every block",
        musubi=renames.Z_IMAGE,
        **_LUMINA_COMMON,
    ),
    Architecture(
        title="Kandinsky 5",
        detect={"image_model": "kandinsky5"},
        layers=r"(text_transformer_blocks|visual_transformer_blocks)\..*",
        exclude=(r".*modulation.*",),
        base_model_version="kandinsky5",
        modelspec="Kandinsky-5",
        implementation="https://github.com/kandinskylab/kandinsky-5",
        resolution="1280x720",
        diffusers_prefix="transformer.",
    ),
    Architecture(
        title="Krea 2",
        detect={"image_model": "krea2"},
        layers=r".*",  # as musubi: every Linear of the model
        base_model_version="krea2",
        modelspec="Krea-2",
        implementation="https://github.com/krea-ai/krea-2",
        diffusers_prefix="transformer.",
        diffusers=renames.KREA_2,
        diffusers_keeps="",
    ),
    Architecture(
        title="Ideogram 4",
        detect={"image_model": "ideogram4"},
        layers=r"layers\..*",
        exclude=(r".*adaln_modulation.*",),
        base_model_version="ideogram4",
        modelspec="Ideogram-4",
        implementation="https://huggingface.co/Comfy-Org/Ideogram-4",
        diffusers=renames.IDEOGRAM_4,
        diffusers_keeps=r"layers\..*",
    ),
    Architecture(
        title="U-Net (Stable Diffusion)",
        detect={"model_channels": ..., "context_dim": ...},
        layers=r"(input_blocks|middle_block|output_blocks)\..*",
        exclude=(r".*(emb_layers|skip_connection).*",),
        base_model_version="sd",
        modelspec="stable-diffusion",
        implementation="https://github.com/Stability-AI/generative-models",
        diffusers_prefix="unet.",
        diffusers=renames.UNET,
        diffusers_keeps="",
        # Not PEFT's: of the attention layers ComfyUI knows no name that PEFT's would follow.
        diffusers_suffixes=(".lora.down.weight", ".lora.up.weight"),
        musubi=renames.UNET_PEFT,
    ),
)
"""Rows are tried from the top: more specific ones first."""


def architecture_of(unet_config: Mapping[str, object]) -> Architecture:
    """The first row that what ComfyUI detected fits, or DEFAULT."""
    for architecture in ARCHITECTURES:
        if all(_fits(unet_config, key, value) for key, value in architecture.detect.items()):
            return architecture
    return DEFAULT


def architecture_named(base_model_version: str) -> Architecture | None:
    """The row that writes this ss_base_model_version."""
    rows = (a for a in ARCHITECTURES if a.base_model_version == base_model_version)
    return next(rows, None)


def _fits(unet_config: Mapping[str, object], key: str, value: object) -> bool:
    if key not in unet_config:
        return False
    return isinstance(value, EllipsisType) or unet_config[key] == value
