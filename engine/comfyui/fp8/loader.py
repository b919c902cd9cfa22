"""A model file and an FP8 policy become a ModelPatcher through ComfyUI's own loader."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...disk.reading import AGAIN, damage_named, one_line
from ...files import mapped_tensors
from ...fp8.model_file import Fp8File, format_name, recognise, without_prefix
from ...fp8.policy import Fp8Policy
from ...fp8.report import Fp8Report, LayerReport
from ...fp8.source import map_tensors
from ...fp8.stream import Merge, granularity_of, quantized_stream
from ...network.layers import is_linear
from ..progress import reported
from .held import report_as_held
from .skeleton import Skeleton, build_skeleton, decide_layers

logger = logging.getLogger("comfyui_braid.fp8")

MODEL_PREFIX = "diffusion_model."


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Request:
    """What to load and how."""

    path: Path
    """A .safetensors file that holds a diffusion model; any one of its shards."""
    policy: Fp8Policy = field(default_factory=Fp8Policy)
    lora: Path | None = None
    """Merged before quantising, in float32."""
    lora_strength: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Model:
    """A loaded model and what was done to it."""

    patcher: ModelPatcher
    report: Fp8Report


def load_fp8(request: Fp8Request, disable_dynamic: bool = False) -> Fp8Model:
    """Quantise the file of `request` while reading it and load it; ValueError says what is wrong.

    A file that is FP8 already is loaded as what it is.
    """
    whole = map_tensors(request.path)
    with damage_named(request.path):
        with _understood_by_comfyui():
            prefix = comfy.model_detection.unet_prefix_from_state_dict(whole.tensors)
        source = without_prefix(whole, prefix)
        already = recognise(source.tensors, source.metadata)
    if already is not None:
        names: Mapping[str, str] = {}
        ready, report = _as_it_is(already, request)
    else:
        skeleton = _skeleton_of(source.tensors, request, source.metadata)
        names = skeleton.module_names
        ready, report = _quantized(source.tensors, request, skeleton)
    with damage_named(request.path), _understood_by_comfyui():
        patcher = comfy.sd.load_diffusion_model_state_dict(
            ready,
            metadata=dict(source.metadata) if already and not already.scaled else {},
            disable_dynamic=disable_dynamic,
        )
    if patcher is None:
        raise ValueError(_unknown(request.path))
    _use_fine_scales(patcher)
    patcher.cached_patcher_init = (load_fp8_patcher, (request,))
    report = report_as_held(report, patcher.model.diffusion_model, names)
    return Fp8Model(patcher=patcher, report=report)


def load_fp8_patcher(request: Fp8Request, disable_dynamic: bool = False) -> ModelPatcher:
    """`load_fp8` without the report: how ComfyUI makes an independent copy of the model."""
    return load_fp8(request, disable_dynamic).patcher


def _as_it_is(already: Fp8File, request: Fp8Request) -> tuple[dict[str, Tensor], Fp8Report]:
    if request.lora is not None and request.lora_strength != 0.0:
        raise ValueError(
            f"{request.path.name} is FP8 already ({already.origin}); a LoRA can be merged before "
            "quantising only from a bf16, fp16 or fp32 file: use Load LoRA after this node instead"
        )
    layers = tuple(
        LayerReport(
            name=name,
            shape=tuple(already.tensors[f"{name}.weight"].shape),
            quantized=True,
            reason="FP8 in the file",
            granularity=granularity_of(already.tensors[f"{name}.weight_scale"]),
            bytes_before=already.tensors[f"{name}.weight"].nbytes,
            bytes_after=already.tensors[f"{name}.weight"].nbytes
            + already.tensors[f"{name}.weight_scale"].nbytes,
        )
        for name in already.scaled
    )
    note = f"{request.path.name} is FP8 already ({already.origin}); the settings here are not used"
    logger.info(note)
    counted = {f"{name}.{part}" for name in already.scaled for part in ("weight", "weight_scale")}
    other = sum(t.nbytes for key, t in already.tensors.items() if key not in counted)
    report = Fp8Report(layers=layers, notes=(note,), other_bytes=other)
    return dict(already.tensors), report


def _skeleton_of(
    tensors: Mapping[str, Tensor], request: Fp8Request, metadata: Mapping[str, str]
) -> Skeleton:
    with damage_named(request.path), _understood_by_comfyui():
        skeleton = build_skeleton(tensors, metadata)
    if skeleton is None:
        raise ValueError(_unknown(request.path))
    return skeleton


def _quantized(
    tensors: Mapping[str, Tensor], request: Fp8Request, skeleton: Skeleton
) -> tuple[dict[str, Tensor], Fp8Report]:
    notes = [f"{request.path.name}: {skeleton.architecture}, quantised while reading"]
    merge = None
    if request.lora is not None and request.lora_strength != 0.0:
        merge, merged = _lora_merge(skeleton, request, request.lora)
        notes.append(merged)
    decisions = decide_layers(skeleton, tensors, request.policy)
    stream = quantized_stream(
        tensors, decisions, request.policy, comfy.model_management.get_torch_device(), merge
    )
    ready: dict[str, Tensor] = {}
    layers: list[LayerReport] = []
    other_bytes = 0
    with damage_named(request.path):
        for streamed in reported(stream, total=len(tensors)):
            ready.update(streamed.tensors)
            if streamed.layer is not None:
                layers.append(streamed.layer)
            else:
                other_bytes += sum(tensor.nbytes for tensor in streamed.tensors.values())
    if not any(layer.quantized for layer in layers):
        raise ValueError(
            f"no layer of {request.path.name} is quantised by these patterns; its Linear layers "
            f"are called {', '.join(layer.name for layer in layers[:3])}, …"
        )
    return ready, Fp8Report(layers=tuple(layers), notes=tuple(notes), other_bytes=other_bytes)


def _lora_merge(skeleton: Skeleton, request: Fp8Request, lora: Path) -> tuple[Merge, str]:
    """(key, tensor) -> merged tensor, and a sentence about what matched."""
    key_map = comfy.lora.model_lora_keys_unet(skeleton.model, {})
    with damage_named(lora), _understood_by_comfyui():
        file = _lora_tensors(lora)
        loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(file), key_map)
    patches: dict[str, list] = {}
    for target, patch in loaded.items():
        key, offset, function, *_ = (*_as_tuple(target), None, None)
        patches.setdefault(key, []).append((request.lora_strength, patch, 1.0, offset, function))
    targets = {
        raw: patches[MODEL_PREFIX + key]
        for raw, key in skeleton.module_keys.items()
        if MODEL_PREFIX + key in patches
    }
    if not targets:
        raise ValueError(
            f"{lora.name} has no key for a layer of {request.path.name} "
            f"(architecture {skeleton.architecture}): it was trained for another model"
        )

    def merge(key: str, tensor: Tensor) -> Tensor:
        if key not in targets:
            return tensor
        whole, dtype = tensor.to(torch.float32, copy=True), torch.float32
        with damage_named(lora), _understood_by_comfyui():
            return comfy.lora.calculate_weight(targets[key], whole, key, intermediate_dtype=dtype)

    note = (
        f"{lora.name} merged at {request.lora_strength:g} into {len(targets)} tensors "
        f"before quantising ({len(patches) - len(targets)} of its targets are not in this model)"
    )
    logger.info(note)
    return merge, note


def _lora_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix.lower() not in (".safetensors", ".sft"):
        try:
            return comfy.utils.load_torch_file(str(path), safe_load=True)
        except Exception as error:  # whatever an unpickler comes to
            raise ValueError(f"cannot be read ({one_line(error, 200)}); {AGAIN}") from error
    tensors = mapped_tensors(path)
    for key, tensor in tensors.items():
        if key.endswith(".alpha") and tensor.numel() != 1:
            raise ValueError(f"{key} has shape {list(tensor.shape)}, not that of one number")
    return tensors


@contextmanager
def _understood_by_comfyui() -> Iterator[None]:
    """Inside, what ComfyUI raises about tensors that fit no model of its is a ValueError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = one_line(error, 200)
        raise ValueError(f"ComfyUI cannot make sense of its tensors ({reason}); {AGAIN}") from error


def _as_tuple(target: str | tuple) -> tuple:
    """A patch target of ComfyUI: a key, or (key, slice of it[, function])."""
    return (target,) if isinstance(target, str) else target


def _use_fine_scales(patcher: ModelPatcher) -> None:
    """Give every FP8 weight with more than one scale our layout, which ComfyUI's cannot hold."""
    # not at the top: the pack must load where ComfyUI runs without comfy-kitchen
    from .layout import registered_layout, with_fine_scale
    from .patches import apply_patches_on_the_fly

    fine = False
    for name, module in patcher.model.diffusion_model.named_modules():
        weight = module._parameters.get("weight")
        if not _has_finer_scale_than_its_layout(weight):
            continue
        if not is_linear(module):
            raise ValueError(f"{name} is not a Linear layer: add it to exclude_patterns")
        linear: Any = module  # of ComfyUI's own class, which has more than torch's
        linear.weight = nn.Parameter(with_fine_scale(weight), requires_grad=False)
        linear.layout_type = registered_layout()
        linear.quant_format = format_name(weight._qdata.dtype, weight._params.scale)
        linear._full_precision_mm = True
        fine = True
    if fine:
        apply_patches_on_the_fly(patcher)


def _has_finer_scale_than_its_layout(weight: object) -> bool:
    return (
        isinstance(weight, QuantizedTensor)
        and weight._layout_cls.startswith("TensorCoreFP8")
        and weight._qdata.ndim == 2  # ComfyUI's banks of experts have a scale each
        and weight._params.scale.numel() > 1
    )


def _unknown(path: Path) -> str:
    return (
        f"{path.name}: ComfyUI does not know this model by its tensors. Diffusers' own layout and "
        "text encoders cannot be quantised while reading: load the model with Load Diffusion Model "
        "and save it with Save Diffusion Model first"
    )
