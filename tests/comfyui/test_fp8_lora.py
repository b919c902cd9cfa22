import comfy.model_management as mm
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_torch_compile import TorchCompileModel
from fp8_files import (
    distance,
    lora_state_dict,
    reference,
    sample,
    state_dict,
)
from safetensors.torch import save_file

from comfyui_braid.engine.comfyui.fp8.loader import Fp8Request, load_fp8
from comfyui_braid.engine.comfyui.fp8.patches import PatchOnTheFly
from comfyui_braid.engine.fp8.policy import Fp8Policy

GRANULARITIES = ("tensor", "channel", "block")
LAYER = "double_blocks.0.img_attn.proj"


def load(path, granularity="block", **kwargs):
    with torch.inference_mode():
        policy = Fp8Policy(granularity=granularity)
        return load_fp8(Fp8Request(path=path, policy=policy, **kwargs))


def with_lora(patcher, lora, strength=1.0):
    with torch.inference_mode():
        return comfy.sd.load_lora_for_models(patcher, None, dict(lora), strength, 0)[0]


def lora_on_every_block_linear(size, rank=4):
    generator = torch.Generator().manual_seed(5)
    lora = {}
    for key, weight in state_dict("flux").items():
        if key.endswith(".weight") and weight.ndim == 2 and "blocks" in key and "mod" not in key:
            out, width = weight.shape
            stem = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            down = torch.randn(rank, width, generator=generator) / width**0.5
            lora[f"{stem}.lora_down.weight"] = down
            lora[f"{stem}.lora_up.weight"] = torch.randn(out, rank, generator=generator) * size
            lora[f"{stem}.alpha"] = torch.tensor(float(rank))
    return lora


def effect_kept(fp8, fp8_lora, bf16, bf16_lora):
    """Projection of the LoRA's effect on the FP8 model onto its effect on the bf16 model."""
    wanted = bf16_lora - bf16
    return float(((fp8_lora - fp8) * wanted).sum() / wanted.square().sum())


@pytest.mark.parametrize("granularity", ["channel", "block"])
def test_a_weak_lora_keeps_its_whole_effect_and_adds_no_noise(granularity, flux_file):
    lora = lora_on_every_block_linear(size=0.01)
    exact = reference(flux_file)
    bf16, bf16_lora = sample(exact), sample(with_lora(exact, lora))
    model = load(flux_file, granularity).patcher
    fp8, fp8_lora = sample(model), sample(with_lora(model, lora))
    assert effect_kept(fp8, fp8_lora, bf16, bf16_lora) == pytest.approx(1, abs=0.02)
    assert distance(fp8_lora, bf16_lora) < 1.05 * distance(fp8, bf16)


def test_patching_on_the_fly_is_nearer_to_bf16_than_requantising(flux_file):
    lora = lora_on_every_block_linear(size=0.05)
    exact = sample(with_lora(reference(flux_file), lora))
    model = with_lora(load(flux_file).patcher, lora)
    on_the_fly = distance(sample(model), exact)
    requantised = with_lora(load(flux_file).patcher, lora)
    requantised.callbacks = {}
    assert on_the_fly < 0.7 * distance(sample(requantised), exact)


def test_requantising_keeps_a_weak_lora_on_average(flux_file):
    """What dynamic memory management and ComfyUI's save nodes do: unbiased, if noisier."""
    linear = load(flux_file).patcher.model.diffusion_model.get_submodule(LAYER)
    dense = linear.weight.dequantize()
    change = torch.randn(dense.shape, generator=torch.Generator().manual_seed(0)) * 5e-4
    with torch.inference_mode():
        made = [linear.set_weight(dense + change, seed=s, return_weight=True) for s in range(1, 65)]
        mean = torch.stack([weight.dequantize() for weight in made]).mean(0)
    kept = float(((mean - dense) * change).sum() / change.square().sum())
    assert kept == pytest.approx(1, abs=0.1)
    assert made[0]._layout_cls == linear.weight._layout_cls
    assert made[0]._params.scale.shape == linear.weight._params.scale.shape


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_lora_leaves_the_model_as_it_was(granularity, flux_file):
    model = load(flux_file, granularity).patcher
    before = sample(model)
    lora = with_lora(model, lora_state_dict("comfyui"))
    changed = sample(lora)
    assert distance(changed, before) > 1e-4
    assert torch.equal(sample(model), before)
    assert torch.equal(sample(lora), changed)
    with torch.inference_mode():
        mm.unload_all_models()
    functions = [getattr(m, "weight_function", []) for m in model.model.modules()]
    assert not any(isinstance(f, PatchOnTheFly) for fs in functions for f in fs)
    assert torch.equal(sample(model), before)
    assert torch.equal(sample(lora), changed)


def test_a_clone_that_takes_over_the_loaded_weights_keeps_the_lora(flux_file):
    lora = with_lora(load(flux_file).patcher, lora_state_dict("comfyui", size=4.0))
    changed = sample(lora)
    clone = lora.clone()
    clone.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    clone.add_wrapper_with_key("diffusion_model", "test", lambda run, *a, **k: run(*a, **k))
    assert torch.equal(sample(clone), changed)
    assert torch.equal(sample(lora), changed)


def test_a_compiled_model_keeps_the_lora(flux_file):
    model = load(flux_file).patcher
    lora = with_lora(model, lora_state_dict("comfyui", size=4.0))
    before, changed = sample(model), sample(lora)
    with torch.inference_mode():
        compiled = TorchCompileModel.execute(lora, "eager").result[0]
    assert distance(changed, before) > 5e-3
    assert distance(sample(compiled), changed) < 1e-5
    torch.compiler.reset()


def test_partial_unloading_applies_the_lora_exactly_once(flux_file):
    model = with_lora(load(flux_file).patcher, lora_state_dict("comfyui"))
    changed = sample(model)
    module = model.model.diffusion_model.get_submodule(LAYER)
    dense = module.weight.dequantize()
    with torch.inference_mode():
        patched = module.weight_function[0](dense.clone())
        model.partially_unload(torch.device("cpu"), memory_to_free=1e12)
        weight = dense.clone()
        for function in module.weight_function:
            weight = function(weight)
    assert len(module.weight_function) == 2
    assert torch.allclose(weight, patched, atol=1e-5)
    assert distance(sample(model), changed) < 1e-4


@pytest.mark.parametrize("key_format", ["comfyui", "kohya", "diffusers"])
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_a_lora_merged_before_quantising_comes_out_as_on_bf16(
    key_format, strength, flux_file, tmp_path
):
    lora = lora_state_dict(key_format, size=6.0)
    path = tmp_path / "lora.safetensors"
    save_file(lora, path)
    bf16, base = reference(flux_file), load(flux_file)
    quantising = distance(sample(base.patcher), sample(bf16))
    exact = sample(with_lora(bf16, lora, strength))
    merged = load(flux_file, lora=path, lora_strength=strength)
    assert "merged at" in merged.report.notes[1] and "into 2 tensors" in merged.report.notes[1]
    assert distance(sample(base.patcher), exact) > 2 * quantising
    assert distance(sample(merged.patcher), exact) < 1.2 * quantising


QKV = "transformer.transformer_blocks.1.attn"


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


ADAPTERS = {
    "loha": {
        f"diffusion_model.{LAYER}.hada_w1_a": drawn(128, 4),
        f"diffusion_model.{LAYER}.hada_w1_b": drawn(4, 128),
        f"diffusion_model.{LAYER}.hada_w2_a": drawn(128, 4) * 8,
        f"diffusion_model.{LAYER}.hada_w2_b": drawn(4, 128),
    },
    "lokr": {
        f"diffusion_model.{LAYER}.lokr_w1": drawn(8, 8),
        f"diffusion_model.{LAYER}.lokr_w2": drawn(16, 16),
    },
    "dora": {
        f"diffusion_model.{LAYER}.lora_A.weight": drawn(4, 128),
        f"diffusion_model.{LAYER}.lora_B.weight": drawn(128, 4),
        f"diffusion_model.{LAYER}.dora_scale": torch.full((1, 128), 1.5),
    },
    "a whole difference, and one of the bias": {
        f"diffusion_model.{LAYER}.diff": drawn(128, 128) * 0.3,
        f"diffusion_model.{LAYER}.diff_b": drawn(128),
    },
    "a layer that is kept": {
        "diffusion_model.double_blocks.0.img_mod.lin.lora_A.weight": drawn(4, 128),
        "diffusion_model.double_blocks.0.img_mod.lin.lora_B.weight": drawn(768, 4),
    },
    "query, key and value of one weight": {
        f"{QKV}.{name}.lora_{side}.weight": drawn(*shape) * 4
        for name in ("add_q_proj", "add_k_proj", "add_v_proj")
        for side, shape in (("A", (4, 128)), ("B", (128, 4)))
    },
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_kind_of_adapter_has_its_effect_on_top_and_merged(adapter, flux_file, tmp_path):
    lora = ADAPTERS[adapter]
    save_file(lora, tmp_path / "adapter.safetensors")
    exact, model = reference(flux_file), load(flux_file).patcher
    bf16, bf16_lora, fp8 = sample(exact), sample(with_lora(exact, lora)), sample(model)
    assert distance(bf16_lora, bf16) > 5e-4
    on_top = sample(with_lora(model, lora))
    assert effect_kept(fp8, on_top, bf16, bf16_lora) == pytest.approx(1, abs=0.03)
    merged = sample(load(flux_file, lora=tmp_path / "adapter.safetensors").patcher)
    assert effect_kept(fp8, merged, bf16, bf16_lora) == pytest.approx(1, abs=0.1)


def test_stacked_loras_add_up_and_come_off(flux_file):
    exact, model = reference(flux_file), load(flux_file).patcher
    before = sample(model)
    one, two = lora_state_dict("comfyui", size=6.0), lora_state_dict("kohya", size=6.0, seed=8)
    stacked = with_lora(with_lora(model, one, 0.5), two, 1.5)
    expected = sample(with_lora(with_lora(exact, one, 0.5), two, 1.5))
    assert distance(sample(stacked), expected) < 1.1 * distance(before, sample(exact))
    assert torch.equal(sample(model), before)


def test_a_merge_changes_only_the_layers_of_the_lora(flux_file, tmp_path):
    save_file(lora_state_dict("kohya"), tmp_path / "lora.safetensors")
    plain = load(flux_file).patcher.model.diffusion_model.state_dict()
    merged = load(flux_file, lora=tmp_path / "lora.safetensors")
    changed = {
        key.rsplit(".", 1)[0]
        for key, tensor in merged.patcher.model.diffusion_model.state_dict().items()
        if not torch.equal(tensor.view(torch.uint8), plain[key].view(torch.uint8))
    }
    assert changed == {LAYER, "single_blocks.1.linear2"}


def test_a_lora_for_another_model_is_refused(flux_file, tmp_path):
    lora = {
        "lora_unet_down_blocks_9_attn.lora_down.weight": torch.randn(4, 8),
        "lora_unet_down_blocks_9_attn.lora_up.weight": torch.randn(8, 4),
    }
    save_file(lora, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors has no key for a layer of flux"):
        load(flux_file, lora=tmp_path / "other.safetensors")


def test_strength_zero_merges_nothing(flux_file, tmp_path):
    save_file(lora_state_dict("kohya"), tmp_path / "lora.safetensors")
    zero = load(flux_file, lora=tmp_path / "lora.safetensors", lora_strength=0.0)
    assert torch.equal(sample(zero.patcher), sample(load(flux_file).patcher))
