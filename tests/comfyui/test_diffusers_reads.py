"""Files of key_format diffusers, loaded by diffusers itself into its own models."""

import comfy.utils
import pytest
import torch
from real_models import REAL, network_of, real_model

pytest.importorskip("peft", reason="peft is not installed: nothing here is loaded by diffusers")
pytest.importorskip("diffusers", reason="diffusers is not installed: nothing here is loaded by it")

import diffusers
from diffusers_models import THEIRS, pipeline_of
from peft.tuners.tuners_utils import BaseTunerLayer

from comfyui_braid.engine.network.adapter_file import state_dict_of, weights_of, write_adapter
from comfyui_braid.engine.network.architectures import ARCHITECTURES, architecture_of
from comfyui_braid.engine.network.spec import TargetPatterns

UNET = "U-Net (Stable Diffusion)"
OF_THE_BLOCKS = TargetPatterns(include=(".*",))  # modulation too, where it lies in the blocks
FULL_WIDTH = {"HunyuanVideo": dict(hidden_size=3072, num_heads=24)}  # diffusers' converter has it
TITLES = [title for title in THEIRS if title not in FULL_WIDTH]
FUSED = ("FLUX.1", "FLUX.2", "Chroma", "Z-Image", "Ideogram 4")  # and HunyuanVideo
PIPELINES = [
    *((THEIRS[title][0], title, False) for title in TITLES),
    ("StableDiffusionXLPipeline", UNET, False),
    *((THEIRS[title][0], title, True) for title in FUSED),
]
# title → ComfyUI's own map of diffusers' names
CORE_S_MAP = {
    "FLUX.1": comfy.utils.flux_to_diffusers,
    "Chroma": comfy.utils.flux_to_diffusers,
    "Z-Image": comfy.utils.z_image_to_diffusers,
    "Krea 2": comfy.utils.krea2_to_diffusers,
    UNET: comfy.utils.unet_to_diffusers,
}


def written(
    folder, title, targets=OF_THE_BLOCKS, key_format="diffusers", *, split_qkv=False, **others
):
    """A network on the small model of `title`, whose file is in `folder`."""
    architecture = architecture_of(REAL[title][2])
    spec = dict(conv_rank=2, conv_alpha=2.0) if title == UNET else dict(split_qkv=split_qkv)
    model = real_model(title, **FULL_WIDTH.get(title, {}) | others)
    network = network_of(model, architecture, targets, **spec)
    state = state_dict_of(network, architecture, key_format)
    write_adapter(folder / "lora.safetensors", state, {})
    return network


def deltas_of(network):
    """Our layer → (scaled up, down), which multiply to its delta."""
    return {
        name: (
            layer.tensors["up"].flatten(1) * (layer.alpha / layer.rank),
            layer.tensors["down"].flatten(1),
        )
        for name, layer in weights_of(network).items()
    }


def fingerprints(deltas) -> torch.Tensor:
    """One number for each row of all the deltas, in order of size."""
    widest = max(down.shape[1] for _, down in deltas)
    direction = torch.randn(widest, generator=torch.Generator().manual_seed(7))
    rows = [up @ (down @ direction[: down.shape[1]]) for up, down in deltas]
    return torch.cat(rows).sort().values


def loaded(pipeline, title, folder, **others):
    """The deltas of diffusers' model by its layer, after its pipeline has loaded the file."""
    pipe, model = pipeline_of(pipeline, title, **others)
    pipe.load_lora_weights(str(folder), weight_name="lora.safetensors", adapter_name="braid")
    return {
        name: module.get_delta_weight("braid").detach()
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def dense(deltas):
    return [(torch.eye(delta.shape[0]), delta.flatten(1)) for delta in deltas.values()]


@pytest.mark.parametrize("pipeline, title, split_qkv", PIPELINES)
def test_diffusers_loads_every_tensor_and_every_row_of_every_delta(
    pipeline, title, split_qkv, tmp_path
):
    ours = deltas_of(written(tmp_path, title, split_qkv=split_qkv))
    theirs = loaded(pipeline, title, tmp_path)
    read = getattr(diffusers, pipeline).lora_state_dict(
        str(tmp_path), weight_name="lora.safetensors"
    )
    read = read[0] if isinstance(read, tuple) else read
    assert 2 * len(theirs) == len(read)
    torch.testing.assert_close(
        fingerprints(dense(theirs)), fingerprints(ours.values()), rtol=1e-4, atol=1e-4
    )
    if title in CORE_S_MAP:
        places = CORE_S_MAP[title](REAL[title][2] | REAL[title][1])
        for name, delta in theirs.items():
            place = places[f"{name}.weight"]
            whole, rows = place if isinstance(place, tuple) else (place, None)
            up, down = ours[whole.removesuffix(".weight")]
            expected = (up @ down).view(-1, *delta.shape[1:])
            expected = expected.narrow(*rows) if rows else expected
            torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)


def test_a_kohya_file_of_a_unet_is_read_by_the_pipeline_of_xl_and_not_by_that_of_1_and_2(tmp_path):
    shape = dict(
        channel_mult=(1, 2, 2),
        num_res_blocks=[2] * 3,
        transformer_depth=[0, 0, 1, 1, 1, 1],
        transformer_depth_output=[0] * 3 + [1] * 6,
    )
    ours = deltas_of(written(tmp_path, UNET, TargetPatterns(), "kohya", **shape))
    same = dict(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
    )
    theirs = loaded("StableDiffusionXLPipeline", UNET, tmp_path, **same)
    torch.testing.assert_close(
        fingerprints(dense(theirs)), fingerprints(ours.values()), rtol=1e-4, atol=1e-4
    )
    # It takes the numbers for its own and warns of what it then cannot place.
    assert len(loaded("StableDiffusionPipeline", UNET, tmp_path, **same)) < len(theirs)


@pytest.mark.parametrize("split_qkv", [False, True])
@pytest.mark.parametrize("title", FULL_WIDTH)
def test_what_diffusers_converts_at_full_width_names_and_fits_its_own_layers(
    title, split_qkv, tmp_path
):
    ours = deltas_of(written(tmp_path, title, split_qkv=split_qkv))
    pipe, model = pipeline_of(THEIRS[title][0], title, device="meta")
    read = pipe.lora_state_dict(str(tmp_path), weight_name="lora.safetensors")
    stems = {key.removesuffix(".lora_A.weight") for key in read if ".lora_A." in key}
    assert read.keys() == {f"{stem}.lora_{ab}.weight" for stem in stems for ab in "AB"}
    layers = dict(model.named_modules())
    deltas = [(read[f"{stem}.lora_B.weight"], read[f"{stem}.lora_A.weight"]) for stem in stems]
    for stem, (up, down) in zip(stems, deltas, strict=True):
        weight = layers[stem.removeprefix("transformer.")].weight
        assert weight.shape == (up.shape[0], down.shape[1])
    torch.testing.assert_close(
        fingerprints(deltas), fingerprints(ours.values()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("title", THEIRS)
def test_a_layer_that_diffusers_would_not_find_is_refused(title, tmp_path):
    every = TargetPatterns(include=(".*",), mode="whitelist")
    if title in ("Wan 2.1 / 2.2", "Qwen-Image", "Kandinsky 5", "Krea 2", UNET):  # knows them all
        written(tmp_path, title, every)
        return
    with pytest.raises(ValueError, match="diffusers has no name for .*; leave that layer out"):
        written(tmp_path, title, every)
    assert not list(tmp_path.iterdir())


def test_every_row_of_the_table_is_loaded_here_or_says_why_diffusers_cannot_read_it():
    """The rows that share their layers with another are tested by that one."""
    alike = {"FLUX.2 klein 4B", "FLUX.2 klein 9B", "Qwen-Image Layered"}
    for row in ARCHITECTURES:
        assert (row.title in THEIRS or row.title in alike) != bool(row.diffusers_cannot)
