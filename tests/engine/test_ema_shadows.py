import numpy as np
import pytest
import safetensors.torch
import torch
from ema_files import ALPHA, DOWN, UP, finish, save, write_run

from comfyui_braid.engine.checkpoints import Checkpoint, Checkpoints, find_checkpoints
from comfyui_braid.engine.disk.hashes import sshs_hashes
from comfyui_braid.engine.ema.profile import gamma_from_sigma_rel, power_profile
from comfyui_braid.engine.ema.reconstruction import (
    plan_reconstruction,
    read_shadows_info,
    reconstructed,
    solve_reconstruction,
)
from comfyui_braid.engine.ema.shadows import SIGMA_RELS, Shadows
from comfyui_braid.engine.files import read_header


def _live(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        DOWN: torch.nn.Parameter(torch.randn(4, 8, generator=generator).to(dtype)),
        UP: torch.nn.Parameter(torch.randn(10, 4, generator=generator).to(dtype)),
    }


def _move(live, generator):
    with torch.no_grad():
        for tensor in live.values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


def _train(live, shadows, steps, seed=1):
    """Move the tensors at random and tell the shadows; returns every state, (steps, elements)."""
    generator, states = torch.Generator().manual_seed(seed), []
    for step in range(1, steps + 1):
        _move(live, generator)
        shadows.update(step)
        states.append(torch.cat([t.detach().double().flatten() for t in live.values()]))
    return torch.stack(states)


def _flat(tensors):
    return torch.cat([tensors[key].double().flatten() for key in (DOWN, UP)])


@pytest.mark.parametrize("sigma_rel", np.linspace(0.05, 0.25, 41).round(4))
def test_every_width_between_is_rebuilt_within_one_percent_with_coefficients_that_sum_to_one(
    sigma_rel,
):
    reconstruction = solve_reconstruction(SIGMA_RELS, float(sigma_rel), end=1000)
    assert reconstruction.profile_error <= 0.01
    assert sum(reconstruction.coefficients) == pytest.approx(1, abs=1e-12)
    assert np.abs(reconstruction.coefficients).sum() < 2  # rounding of the shadows is not amplified


def test_the_profile_error_is_the_distance_between_the_profiles():
    for sigma_rel in (0.06, 0.17, 0.27):
        reconstruction = solve_reconstruction(SIGMA_RELS, sigma_rel, end=1)
        time = (np.arange(200_000) + 0.5) / 200_000
        wanted = power_profile(time, 1.0, gamma_from_sigma_rel(sigma_rel))
        distance = np.linalg.norm(reconstruction.profile(time) - wanted) / np.linalg.norm(wanted)
        assert reconstruction.profile_error == pytest.approx(distance, rel=1e-4)


def test_a_stored_width_is_that_shadow_alone():
    reconstruction = solve_reconstruction(SIGMA_RELS, 0.2, end=7)
    assert reconstruction.coefficients == pytest.approx((0, 0, 0, 1, 0), abs=1e-9)


def test_a_shadow_that_sees_every_step_is_the_dense_power_average():
    live = _live()
    shadows = Shadows(live, update_every_steps=1)
    states = _train(live, shadows, 40)
    for sigma_rel in SIGMA_RELS:
        edges = (np.arange(41) / 40) ** (gamma_from_sigma_rel(sigma_rel) + 1)
        dense = torch.from_numpy(np.diff(edges)) @ states
        state = shadows.state_dict()
        assert torch.allclose(
            _flat({k: state[f"{sigma_rel}/{k}"] for k in (DOWN, UP)}), dense, atol=1e-5
        )


def test_updates_every_ten_steps_hold_the_newest_value_over_all_ten():
    live = _live()
    shadows = Shadows(live, sigma_rels=(0.1,), update_every_steps=10)
    states = _train(live, shadows, 45)
    assert shadows.step == 40
    shadows.catch_up(45)
    held = states[[9, 19, 29, 39, 44]]
    edges = (np.array([0, 10, 20, 30, 40, 45]) / 45) ** (gamma_from_sigma_rel(0.1) + 1)
    expected = torch.from_numpy(np.diff(edges)) @ held
    state = shadows.state_dict()
    assert torch.allclose(_flat({k: state[f"0.1/{k}"] for k in (DOWN, UP)}), expected, atol=1e-5)


def test_shadows_are_float32_whatever_trains_and_follow_the_live_tensors():
    live = _live(dtype=torch.bfloat16)
    shadows = Shadows(live)
    shadows.update(10)
    state = shadows.state_dict()
    assert {t.dtype for k, t in state.items() if k != "step"} == {torch.float32}
    assert torch.equal(state[f"0.05/{UP}"], live[UP].float())


def test_a_resumed_run_keeps_the_same_shadows():
    live = _live()
    whole = Shadows(live)
    _train(live, whole, 30)
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    kept = {key: value.detach().clone() for key, value in live.items()}
    _train(live, _Later(whole, 30), 25, seed=2)
    resumed_live = {key: torch.nn.Parameter(value) for key, value in kept.items()}
    resumed = Shadows(resumed_live)
    resumed.load_state_dict(state)
    _train(resumed_live, _Later(resumed, 30), 25, seed=2)
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


class _Later:
    def __init__(self, shadows, offset):
        self.shadows, self.offset = shadows, offset

    def update(self, step):
        self.shadows.update(step + self.offset)


def test_a_state_of_another_network_or_other_widths_is_refused_and_changes_nothing():
    shadows = Shadows(_live())
    shadows.update(10)
    before = {key: value.clone() for key, value in shadows.state_dict().items()}
    for other in (Shadows({DOWN: torch.ones(4, 8)}), Shadows(_live(), sigma_rels=(0.05, 0.1))):
        with pytest.raises(ValueError, match="EMA shadows: .*resume with the network"):
            shadows.load_state_dict(other.state_dict())
    after = shadows.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_going_back_in_time_is_refused():
    shadows = Shadows(_live())
    shadows.update(20)
    with pytest.raises(ValueError, match="step 10: .*already seen step 20"):
        shadows.catch_up(10)


def _written(tmp_path, steps=300):
    """A run with checkpoints and shadows, and the trajectory it took."""
    live = _live()
    shadows = Shadows(live, update_every_steps=1)
    states = _train(live, shadows, steps)
    metadata = {"ss_steps": str(steps), "ss_output_name": "run"}
    tensors = {k: v.detach().bfloat16() for k, v in live.items()} | {ALPHA: torch.tensor(4.0)}
    save(tmp_path / f"run-step{steps:08d}.safetensors", tensors, **metadata)
    shadows.write(tmp_path / "run-shadows.safetensors", {ALPHA: torch.tensor(4.0)}, metadata)
    return states


@pytest.mark.parametrize("sigma_rel", [0.06, 0.1, 0.17, 0.23])
def test_a_reconstruction_from_the_file_is_the_dense_average_within_two_percent(
    sigma_rel, tmp_path
):
    states = _written(tmp_path)
    run = find_checkpoints(tmp_path)
    plan = plan_reconstruction(run, sigma_rel)
    lora, seen = finish(reconstructed(Checkpoints(files=(), shadows=run.shadows), plan))
    edges = (np.arange(301) / 300) ** (gamma_from_sigma_rel(sigma_rel) + 1)
    dense = torch.from_numpy(np.diff(edges)) @ states
    distance = (_flat(lora) - dense).norm() / (states[-1] - dense).norm()
    assert distance <= 0.02
    assert {t.dtype for t in lora.values()} == {torch.float32} and float(lora[ALPHA]) == 4
    assert seen[-1].done == seen[-1].total == 2


def test_a_saved_reconstruction_has_the_runs_dtypes_metadata_and_hashes(tmp_path):
    _written(tmp_path)
    run = find_checkpoints(tmp_path)
    output = tmp_path / "made" / "ema.safetensors"
    lora, _ = finish(reconstructed(run, plan_reconstruction(run, 0.15), output))
    assert lora[UP].dtype == torch.bfloat16 and lora[ALPHA].dtype == torch.float32
    metadata = read_header(output).metadata
    loaded = safetensors.torch.load_file(output)
    assert loaded.keys() == {DOWN, UP, ALPHA} and torch.equal(loaded[UP], lora[UP])
    assert metadata["ss_output_name"] == "run" and "braid.shadows" not in metadata
    assert metadata["modelspec.merged_from"] == "run-shadows"
    assert metadata["sshs_model_hash"] == sshs_hashes(loaded, metadata)["sshs_model_hash"]
    assert find_checkpoints(tmp_path).files == run.files


def test_the_shadow_file_says_what_it_holds(tmp_path):
    _written(tmp_path, steps=20)
    info = read_shadows_info(tmp_path / "run-shadows.safetensors")
    assert (info.step, info.sigma_rels, info.update_every_steps) == (20, SIGMA_RELS, 1)
    keys = read_header(tmp_path / "run-shadows.safetensors").tensors
    assert keys[f"0.05/{UP}"].dtype == "F32" and f"constant/{ALPHA}" in keys


def test_a_run_without_shadows_and_a_file_of_something_else_are_refused(tmp_path):
    paths = write_run(tmp_path, 2)
    with pytest.raises(ValueError, match="no EMA shadows beside them.*ema_shadows on"):
        plan_reconstruction(find_checkpoints(tmp_path), 0.2)
    with pytest.raises(ValueError, match="not a file of EMA shadows"):
        plan_reconstruction(
            Checkpoints(files=(Checkpoint(path=paths[0], step=1),), shadows=paths[0]), 0.2
        )


def test_widths_that_no_profile_has_are_refused():
    with pytest.raises(ValueError, match="no average"):
        solve_reconstruction(SIGMA_RELS, 0.3, 1)


def test_updating_every_zero_steps_is_refused():
    with pytest.raises(ValueError, match="update_every_steps is 0; it must be 1 or more"):
        Shadows(_live(), update_every_steps=0)
