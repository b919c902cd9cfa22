import pytest
import safetensors.torch
import torch
from ema_files import average_of, checkpoints, save

from comfyui_braid.engine.ema.layout import read_sources
from comfyui_braid.engine.ema.one_run import MIN_COSINE, check_one_run, consecutive_cosines
from comfyui_braid.engine.ema.schedule import BetaRamp, Power

HALF = BetaRamp(beta=0.5, beta2=0.5)


LAYERS, WIDTH = 12, 16


def _trained(folder, seed, learning_rate, steps=100, files=4, rank=4):
    """A LoRA on frozen residual layers learns a changed network; its files, saved along the way."""
    torch.manual_seed(0)
    layers = torch.randn(LAYERS, WIDTH, WIDTH) / WIDTH**0.5
    target = layers + 0.3 * torch.randn(LAYERS, WIDTH, WIDTH) / WIDTH**0.5
    torch.manual_seed(seed)
    down = torch.empty(LAYERS, rank, WIDTH).uniform_(-(WIDTH**-0.5), WIDTH**-0.5).requires_grad_()
    up = torch.zeros(LAYERS, WIDTH, rank).requires_grad_()
    optimizer = torch.optim.AdamW([down, up], lr=learning_rate)
    paths = []
    for step in range(1, steps + 1):
        y = wanted = torch.randn(16, WIDTH)
        for index in range(LAYERS):
            y = y + torch.tanh(y @ (layers[index] + up[index] @ down[index]).T)
            wanted = wanted + torch.tanh(wanted @ target[index].T)
        optimizer.zero_grad()
        (y - wanted).square().mean().backward()
        optimizer.step()
        if step % (steps // files) == 0:
            tensors = {}
            for index in range(LAYERS):
                tensors[f"lora_unet_{index}.lora_down.weight"] = down[index].detach().clone()
                tensors[f"lora_unet_{index}.lora_up.weight"] = up[index].detach().clone()
            path = folder / f"seed{seed}-step{step:08d}.safetensors"
            paths.append(save(path, tensors, ss_steps=str(step)))
    return paths


@pytest.mark.parametrize("learning_rate", [1e-4, 1e-3, 1e-2, 5e-2])
def test_checkpoints_of_one_training_run_pass_at_any_learning_rate(learning_rate, tmp_path):
    sources = read_sources(_trained(tmp_path, 1, learning_rate))
    cosines = check_one_run(sources)
    assert len(cosines) == 3 and min(cosines) > 2 * MIN_COSINE


@pytest.mark.parametrize("learning_rate", [1e-4, 1e-3, 1e-2])
def test_checkpoints_of_two_training_runs_are_refused_by_name(learning_rate, tmp_path):
    one, other = (_trained(tmp_path, seed, learning_rate, files=2) for seed in (1, 2))
    assert max(map(abs, consecutive_cosines(read_sources([one[1], other[1]])))) < MIN_COSINE
    with pytest.raises(ValueError, match=r"seed1.*seed2.*different runs.*space 'product'"):
        average_of(checkpoints([*one, other[1]]), HALF, sort="given")


def test_a_file_in_another_gauge_is_refused_and_averages_in_product_space(tmp_path):
    paths = _trained(tmp_path, 1, 1e-3, files=2)
    q, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))
    turned = {
        key: q @ value if "down" in key else value @ q.T
        for key, value in safetensors.torch.load_file(paths[1]).items()
    }
    pair = [paths[0], save(tmp_path / "resized.safetensors", turned, ss_steps="200")]
    run = checkpoints(pair, [100, 200])
    with pytest.raises(ValueError, match="different runs"):
        average_of(run, Power(sigma_rel=0.2))
    average_of(run, Power(sigma_rel=0.2), space="product")


def test_too_few_values_to_tell_are_not_refused(tmp_path):
    tiny = [
        {
            "lora_unet_a.lora_up.weight": torch.randn(
                4, 4, generator=torch.Generator().manual_seed(i)
            )
        }
        for i in range(2)
    ]
    paths = [save(tmp_path / f"{i}.safetensors", t) for i, t in enumerate(tiny)]
    average_of(checkpoints(paths), HALF, sort="given")
