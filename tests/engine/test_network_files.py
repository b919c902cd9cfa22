"""Adapter files of Braid: musubi's keys, dtypes and hashes; what is written is what is read."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from network_files import FLUX, Z_IMAGE, Model, delta, linear, network_for
from torch import nn

from comfyui_braid.engine.disk.hashes import sshs_hashes
from comfyui_braid.engine.files import read_header
from comfyui_braid.engine.network.adapter_file import (
    cast,
    load_weights,
    read_adapter,
    state_dict_of,
    verify_adapter,
    weights_of,
    write_adapter,
)
from comfyui_braid.engine.network.architectures import DEFAULT, architecture_of
from comfyui_braid.engine.network.keys import decoded, encoded
from comfyui_braid.engine.network.layers import LayerShape, layer_shapes
from comfyui_braid.engine.network.spec import KINDS

GOLDEN = json.loads((Path(__file__).parent.parent / "goldens" / "network_lora.json").read_text())
HUNYUAN = architecture_of({"image_model": "hunyuan_video", "vec_in_dim": 768})


def golden_state():
    """The tensors of the file that musubi saved."""
    return {
        key: torch.tensor(entry["values"]).view(entry["shape"]).float()
        for key, entry in GOLDEN["state_dict"].items()
    }


def tiny_layers():
    """The adapted layers of musubi's tiny model."""
    sizes = {"img_attn_qkv": (4, 6), "img_mlp.0": (4, 8), "img_mlp.2": (8, 4)}
    return {
        f"double_blocks.{block}.{name}": LayerShape(in_features=i, out_features=o)
        for block in range(2)
        for name, (i, o) in sizes.items()
    }


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 1))])


def test_kohya_files_have_musubi_s_keys_order_shapes_and_dtypes():
    weights = decoded(golden_state(), tiny_layers(), HUNYUAN)
    state = encoded(weights, "kohya", HUNYUAN)
    assert list(state) == list(GOLDEN["state_dict"])
    for key, entry in GOLDEN["state_dict"].items():
        assert list(state[key].shape) == entry["shape"]
        assert str(state[key].dtype) == entry["dtype"]
        assert state[key].flatten().tolist() == entry["values"]


@pytest.mark.parametrize("case", GOLDEN["hash_lora_file"], ids=lambda case: case["dtype"])
def test_a_kohya_file_is_as_long_as_musubi_s_and_its_hash_is_that_of_its_bytes(case, tmp_path):
    """The weights behind the golden's hash are not recorded; its file's size and hash rule are."""
    precision = {"None": "keep", "torch.float32": "fp32", "torch.bfloat16": "bf16"}.get(
        case["dtype"], "fp16"
    )
    path = tmp_path / "lora.safetensors"
    write_adapter(path, cast(golden_state(), "kohya", precision), case["metadata_in"])
    header = read_header(path)
    after_header = path.read_bytes()[header.data_start :]
    assert header.metadata["sshs_model_hash"] == hashlib.sha256(after_header).hexdigest()
    assert header.metadata["sshs_legacy_hash"] == case["sshs_legacy_hash"]
    assert path.stat().st_size == case["file_size"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key_format", ["comfyui", "kohya"])
@pytest.mark.parametrize("model, architecture", [(Model, FLUX), (Convolutional, DEFAULT)])
def test_every_kind_survives_its_file_bit_for_bit(model, architecture, key_format, kind, tmp_path):
    model = model()
    network = network_for(model, architecture, kind=kind, conv_rank=2, conv_alpha=1.0)
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, state_dict_of(network, architecture, key_format), {})
    weights = read_adapter(path, layer_shapes(model), architecture)
    again = network_for(model, architecture, kind=kind, conv_rank=2, conv_alpha=1.0)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    load_weights(again, weights)
    for one, other in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    for name, adapter in network.items():
        assert torch.equal(delta(weights[name], adapter.shape), adapter.delta_weight())


def test_weights_of_another_shape_are_refused():
    part = "transformer.layers.0.attention.to_k"
    state = {f"{part}.lora_A.weight": torch.zeros(2, 8), f"{part}.lora_B.weight": torch.zeros(6, 2)}
    with pytest.raises(ValueError, match="part 2 of .* has 6 rows in the file and 8 in the model"):
        decoded(state, {"layers.0.attention.qkv": linear(24, 8)}, Z_IMAGE)
    network = network_for(Model(), FLUX)
    other = weights_of(network_for(Model(), FLUX, rank=3))
    with pytest.raises(ValueError, match=r"needs down \(2, 8\), up \(24, 2\), the file has down"):
        load_weights(network, other)
    with pytest.raises(ValueError, match="the file has nothing"):
        load_weights(network, {})


def test_a_state_dict_holds_copies_so_that_training_may_go_on():
    network = network_for(Model(), FLUX)
    state = state_dict_of(network, FLUX)
    before = {key: tensor.clone() for key, tensor in state.items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_a_file_that_reads_back_different_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    write_adapter(
        path, {"x": torch.tensor([1.0, float("nan")])}, {"ss_a": "1"}
    )  # NaN is a bit pattern
    tensors = {"x": torch.tensor([1.0, 2.0])}
    with pytest.raises(OSError, match="x read back different"):
        verify_adapter(
            path, tensors, {"ss_a": "1"} | sshs_hashes({"x": torch.tensor([1.0, float("nan")])}, {})
        )
    with pytest.raises(OSError, match="other keys or metadata"):
        verify_adapter(path, tensors, {})
