"""`make full-size` with models so small that it takes seconds."""

import comfy.sd
import pytest
import torch
from full_size import files, models
from full_size.watch import watched
from safetensors import safe_open

SMALL = dict(models.WAN, dim=256, num_heads=2, ffn_dim=512, num_layers=2)


@pytest.fixture
def small(monkeypatch):
    """A Wan that detection takes for one, under the name "small"."""
    monkeypatch.setitem(models.MODELS, "small", ("WAN21_T2V", SMALL, 4096))
    return "small"


def test_a_random_file_is_loaded_by_comfyui_and_has_the_weights_of_a_trained_model(small, tmp_path):
    path = tmp_path / "small.safetensors"
    numbers = files.write_model(small, path)
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(path)).model
    assert sum(p.numel() for p in model.diffusion_model.parameters()) == numbers
    with safe_open(path, "pt") as file:
        norm = file.get_tensor("blocks.0.self_attn.norm_q.weight").float()
        first, second = (file.get_tensor(f"blocks.{n}.ffn.0.weight").float() for n in (0, 1))
    assert abs(norm.mean() - 1) < 0.01 and abs(first.std() * 256**0.5 - 1) < 0.02
    assert not torch.equal(first, second)


def test_a_process_is_watched_by_phase_and_says_how_it_ended(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import time\n"
        "print('not for us', flush=True)\n"
        "print('{\"load_seconds\": 1}', flush=True)\n"
        "held = b'1' * (200 << 20); time.sleep(1)\n"
        "print('{\"step_seconds\": 2}', flush=True)\n"
        "del held; time.sleep(0.3)\n"
        "raise SystemExit(3)\n"
    )
    seen = watched(script)
    assert seen.said == {"load_seconds": 1, "step_seconds": 2}
    assert seen.peaks["training"] > 200 << 20 > seen.peaks["sampling"]
    assert seen.ended == "it ended with 3 while sampling"
