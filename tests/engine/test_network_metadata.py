"""Metadata of adapter files: musubi's fields, modelspec, and what is typed by hand."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from comfyui_braid.engine.network.architectures import (
    ARCHITECTURES,
    architecture_named,
    architecture_of,
)
from comfyui_braid.engine.network.metadata import adapter_metadata, parse_metadata
from comfyui_braid.engine.network.spec import NetworkSpec, TargetPatterns

GOLDEN = json.loads((Path(__file__).parent.parent / "goldens" / "network_lora.json").read_text())
HUNYUAN = architecture_of({"image_model": "hunyuan_video", "vec_in_dim": 768})


def test_metadata_is_all_strings_and_has_musubi_s_fields():
    spec = NetworkSpec(
        rank=8,
        alpha=0.0,
        neuron_dropout=0.1,
        loraplus_lr_ratio=4.0,
        targets=TargetPatterns(exclude=(".*a.*",)),
    )
    metadata = adapter_metadata(
        spec,
        HUNYUAN,
        title="T",
        created=datetime(2026, 1, 2, 3, 4, 5, 6),
        training={"seed": 3, "lr_warmup_steps": None, "datasets": [{"n": 1}], "min_timestep": 200},
        timestep_range=(200, 900),
    )
    assert metadata == {
        "ss_seed": "3",
        "ss_lr_warmup_steps": "None",
        "ss_datasets": '[{"n": 1}]',
        "ss_min_timestep": "200",
        "ss_base_model_version": "hunyuan_video",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": "8.0",
        "ss_network_dropout": "0.1",
        "ss_network_args": '{"exclude_patterns": "[\'.*a.*\']", "loraplus_lr_ratio": "4.0"}',
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "hunyuan-video/lora",
        "modelspec.implementation": "https://github.com/Tencent/HunyuanVideo",
        "modelspec.title": "T",
        "modelspec.resolution": "1280x720",
        "modelspec.date": "2026-01-02T03:04:05",
        "modelspec.timestep_range": "200,900",
    }


@pytest.mark.parametrize(
    "golden, unet_config",
    [
        ("hv", {"image_model": "hunyuan_video", "vec_in_dim": 768}),
        ("wan", {"image_model": "wan2.1"}),
        ("fk", {"image_model": "flux"}),
        ("f2d", {"image_model": "flux2", "hidden_size": 6144}),
        ("f2k4b", {"image_model": "flux2", "hidden_size": 3072}),
        ("f2k9b", {"image_model": "flux2", "hidden_size": 4096}),
        ("qi", {"image_model": "qwen_image"}),
        ("qil", {"image_model": "qwen_image", "use_additional_t_cond": True}),
        ("k5", {"image_model": "kandinsky5"}),
        ("hv15", {"image_model": "hunyuan_video", "use_cond_type_embedding": True}),
        ("zi", {"image_model": "lumina2", "dim": 3840}),
        ("i4", {"image_model": "ideogram4"}),
        ("kr2", {"image_model": "krea2"}),
    ],
)
def test_modelspec_is_musubi_s(golden, unet_config):
    """Resolution only where musubi's is not its placeholder for video and image alike."""
    metadata = adapter_metadata(
        NetworkSpec(), architecture_of(unet_config), title="T", created=datetime(2026, 1, 1)
    )
    expected = GOLDEN["modelspec"][golden]
    for key in ("sai_model_spec", "architecture", "implementation", "title"):
        assert metadata[f"modelspec.{key}"] == expected[f"modelspec.{key}"]
    if expected["modelspec.resolution"] != "1280x720":
        assert metadata["modelspec.resolution"] == expected["modelspec.resolution"]


def test_every_architecture_is_found_by_the_version_that_it_writes():
    versions = [architecture.base_model_version for architecture in ARCHITECTURES]
    assert len(set(versions)) == len(versions)
    assert all(architecture_named(a.base_model_version) is a for a in ARCHITECTURES)
    assert architecture_named("nothing") is None


@pytest.mark.parametrize(
    "text, parsed",
    [
        ("", {}),
        (
            ' {"a": "b", "c": 1, "d": null, "e": [1]} ',
            {"a": "b", "c": "1", "d": "None", "e": "[1]"},
        ),
    ],
)
def test_metadata_is_read_from_json(text, parsed):
    assert parse_metadata(text) == parsed


def test_broken_metadata_says_where():
    with pytest.raises(ValueError, match="line 2, column"):
        parse_metadata('{"a": 1,\n b}')
    with pytest.raises(ValueError, match="not a JSON object"):
        parse_metadata('"text"')
    with pytest.raises(ValueError, match="sshs_legacy_hash is computed from the tensors"):
        parse_metadata('{"sshs_legacy_hash": "0"}')
    with pytest.raises(ValueError, match="'a.ud800' holds half of a character"):
        parse_metadata('{"a\\ud800": 1}')
    for text in ("[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 100_000 + "}"):
        with pytest.raises(ValueError, match="metadata: .*JSON"):
            parse_metadata(text)
