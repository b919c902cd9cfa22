"""The preview's numbers and pictures."""

import numpy as np
import pytest
import torch

from comfyui_braid.engine.timesteps.figure import draw_preview, title
from comfyui_braid.engine.timesteps.preview import (
    PreviewSettings,
    count_in_bins,
    measure_preview,
    measure_run,
)
from comfyui_braid.engine.timesteps.sampling import TimestepSampling
from comfyui_braid.engine.timesteps.stream import TimestepStream

QINGLONG = TimestepSampling(
    mode="qinglong_flux", logit_mean=-6.0, logit_std=2.0, weighting_scheme="cosmap"
)


def settings(**changes) -> PreviewSettings:
    return PreviewSettings(**(dict(sampling=QINGLONG, samples=5000) | changes))


def test_the_bins_count_what_a_run_with_the_same_seed_draws():
    preview = measure_preview(settings(seed=4, width=1024, height=768))
    drawn = TimestepStream(QINGLONG, 5000, 4).draw(range(5000), 96, 128)
    assert preview.counts.tolist() == torch.histc(drawn, 50, 0.0, 1.0).int().tolist()
    assert preview.statistics["mean"] == drawn.mean().item()
    assert preview.statistics["min"] == drawn.min().item()
    assert preview.statistics["max"] == drawn.max().item()
    assert preview.statistics["deciles"][4] == pytest.approx(drawn.median().item(), abs=1e-12)


def test_expected_bins_are_the_density_integrated():
    preview = measure_preview(settings())
    area = torch.trapezoid(preview.density, preview.t).item()
    assert area == pytest.approx(1.0, abs=2e-3)
    assert preview.expected.sum().item() == pytest.approx(1.0)
    error = (preview.counts / 5000 - preview.expected).abs()
    assert (error < 5 * torch.sqrt(preview.expected / 5000) + 1e-3).all()


def test_density_times_weight_has_area_1_and_the_weights_shape():
    preview = measure_preview(settings())
    assert torch.trapezoid(preview.effective, preview.t).item() == pytest.approx(1.0, abs=3e-3)
    inside = preview.density > 1e-3
    scale = (preview.effective / preview.density / preview.weight)[inside]
    assert scale.std() / scale.mean() < 1e-9


def test_the_size_of_the_image_moves_a_resolution_shift_and_packing_is_known():
    small, large = (measure_preview(settings(width=w, height=w)) for w in (512, 1536))
    assert large.statistics["mean"] > small.statistics["mean"] + 0.05
    assert settings(sampling=TimestepSampling(mode="flux2_shift")).cells == (64, 64)
    assert settings().cells == (128, 128)


def test_the_acceptance_rate_is_the_mass_that_a_cut_range_keeps():
    shift = dict(mode="shift", discrete_flow_shift=3.0, min_timestep=500)
    cut = TimestepSampling(preserve_distribution_shape=True, **shift)
    rate = measure_preview(settings(sampling=cut)).statistics["acceptance_rate"]
    whole = TimestepSampling(mode="shift", discrete_flow_shift=3.0)
    drawn = TimestepStream(whole, 200_000, 0).draw(range(200_000), 8, 8)
    assert rate == pytest.approx((drawn >= 0.5).double().mean().item(), abs=4e-3)
    squeezed = measure_preview(settings(sampling=TimestepSampling(**shift)))
    assert squeezed.statistics["acceptance_rate"] == 1.0


def test_pure_noise_and_clean_fall_in_the_end_bins():
    """musubi's own preview indexes past its last bin at t = 1."""
    t = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    assert count_in_bins(t, 4).tolist() == [1, 0, 1, 1]


def test_a_run_is_binned_with_its_mean_loss_and_standard_error():
    run = measure_run([0.1, 0.15, 0.9], [1.0, 3.0, 5.0], bins=2)
    assert run.counts.tolist() == [2, 1]
    assert run.loss.tolist() == [2.0, 5.0]
    assert run.loss_error[0].item() == pytest.approx(1.0)  # sd sqrt(2) over sqrt(2)
    assert run.loss_error[1].isnan()
    assert measure_run([0.1], [1.0], bins=2).loss[1].isnan()


def test_a_run_without_one_loss_for_each_timestep_is_refused():
    with pytest.raises(ValueError, match="holds 2 timesteps and 1 losses"):
        measure_run([0.1, 0.2], [1.0], bins=4)
    with pytest.raises(ValueError, match="holds 0 timesteps"):
        measure_run([], [], bins=4)


@pytest.mark.parametrize("with_run", [False, True])
@pytest.mark.parametrize(
    "sampling",
    [
        QINGLONG,
        TimestepSampling(weighting_scheme="mode", mode_scale=1.75),
        TimestepSampling(mode="logsnr", logit_mean=-20.0, logit_std=0.1),
        TimestepSampling(mode="shift", min_timestep=999, weighting_scheme="sigma_sqrt"),
    ],
    ids=lambda s: s.mode,
)
def test_the_figure_is_an_image_without_warnings(sampling, with_run, recwarn):
    preview = measure_preview(settings(sampling=sampling, samples=500))
    run = measure_run([0.9995, 0.9996, 1.0], [0.1, 0.2, 0.4], 50) if with_run else None
    image = draw_preview(preview, run)
    assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    assert image.min() < 128 < image.max()
    assert not [str(w.message) for w in recwarn.list]


def test_the_title_says_mode_shift_weight_range_and_size():
    cut = TimestepSampling(
        mode="shift", discrete_flow_shift=3.0, max_timestep=500, preserve_distribution_shape=True
    )
    assert title(measure_preview(settings(sampling=cut))) == ["shift 3", "cut to 0–500"]
    assert title(measure_preview(settings())) == ["qinglong_flux / cosmap", "1024 × 1024 px"]


@pytest.mark.parametrize("field", ["width", "height", "bins", "samples"])
def test_an_empty_preview_is_refused(field):
    with pytest.raises(ValueError, match=f"{field} is 0; it must be 1 or more"):
        settings(**{field: 0})
