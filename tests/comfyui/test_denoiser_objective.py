import comfy.model_sampling as ms
import pytest
import torch

from comfyui_braid.engine.comfyui.differentiable.noise_levels import (
    check_trainable,
    noised_input,
    sigma_at,
    target,
)

T = torch.tensor([0.0005, 0.25, 0.5, 0.9, 1.0])


def sampling(schedule, prediction, **settings):
    """A `model_sampling` as ComfyUI composes it."""

    class Config:
        sampling_settings = settings

    class ModelSampling(schedule, prediction):
        pass

    return ModelSampling(Config())


FLOWS = {
    "flux": sampling(ms.ModelSamplingFlux, ms.CONST, shift=1.15),
    "sd3": sampling(ms.ModelSamplingDiscreteFlow, ms.CONST, shift=3.0),
    "aura": sampling(ms.ModelSamplingDiscreteFlow, ms.CONST, shift=1.73, multiplier=1.0),
}
TABLES = {
    "epsilon": sampling(ms.ModelSamplingDiscrete, ms.EPS),
    "v": sampling(ms.ModelSamplingDiscrete, ms.V_PREDICTION),
    "zero snr v": sampling(ms.ModelSamplingDiscrete, ms.V_PREDICTION, zsnr=True),
    "cogvideo": sampling(ms.ModelSamplingDiscrete, ms.V_PREDICTION_DDPM),
    "edm": sampling(ms.ModelSamplingContinuousEDM, ms.EDM, sigma_max=80.0, sigma_data=0.5),
    "continuous v": sampling(ms.ModelSamplingContinuousV, ms.V_PREDICTION, sigma_max=500.0),
    "cascade": sampling(ms.StableCascadeSampling, ms.EPS),
}
COSMOS = {"cosmos": sampling(ms.ModelSamplingCosmosRFlow, ms.COSMOS_RFLOW)}
ALL = FLOWS | TABLES | COSMOS


def draws(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, len(T), 4, 6, 6, generator=generator, dtype=dtype)
    return latents, noise


@pytest.mark.parametrize("name", ALL)
def test_the_target_is_the_output_whose_denoised_prediction_is_the_latent(name):
    sampling = ALL[name]
    latents, noise = draws(torch.float64)
    t = T.double()
    x = noised_input(sampling, latents, noise.clone(), t)
    output = target(sampling, latents, noise.clone(), t)
    denoised = sampling.calculate_denoised(sigma_at(sampling, t), output, x)
    torch.testing.assert_close(denoised, latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FLOWS)
def test_flow_models_see_t_unshifted_and_learn_noise_minus_latents_exactly(name):
    sampling = FLOWS[name]
    latents, noise = draws()
    t = T.view(-1, 1, 1, 1)
    assert torch.equal(sigma_at(sampling, T), T)
    assert torch.equal(target(sampling, latents, noise, T), noise - latents)
    expected = (1 - t) * latents + t * noise
    torch.testing.assert_close(noised_input(sampling, latents, noise, T), expected)


def test_a_noise_scale_scales_the_noise_in_input_and_target_alike():
    sampling = FLOWS["sd3"]
    sampling.set_noise_scale(2.0)
    try:
        latents, noise = draws()
        assert torch.equal(target(sampling, latents, noise, T), noise * 2 - latents)
    finally:
        sampling.set_noise_scale(1.0)


def test_epsilon_models_learn_the_noise():
    latents, noise = draws()
    found = target(TABLES["epsilon"], latents, noise.clone(), T)
    torch.testing.assert_close(found, noise, rtol=1e-4, atol=1e-5)


def test_v_models_learn_the_velocity_of_salimans_and_ho():
    """v = alpha noise - sigma latents with alpha² + sigma² = 1 (arXiv 2202.00512, appendix D)."""
    sampling = TABLES["v"]
    latents, noise = draws()
    sigma = sigma_at(sampling, T).view(-1, 1, 1, 1)
    alpha, scaled = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    expected = alpha * noise - scaled * latents
    torch.testing.assert_close(
        target(sampling, latents, noise.clone(), T), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["epsilon", "v", "zero snr v", "cogvideo"])
def test_the_network_is_told_the_table_index_whose_noise_it_gets(name):
    sampling = TABLES[name]
    t = torch.arange(1000).add(0.5).div(1000)
    assert torch.equal(sampling.timestep(sigma_at(sampling, t)), torch.arange(1000))
    edges = sigma_at(sampling, torch.tensor([0.0, 1.0]))
    assert torch.equal(edges, sampling.sigmas[[0, -1]])


@pytest.mark.parametrize("name", ALL)
def test_noise_grows_with_t(name):
    sigma = sigma_at(ALL[name], torch.linspace(0.001, 0.999, 50))
    assert (sigma.diff() >= 0).all() and torch.isfinite(sigma).all()


def test_the_drawn_noise_and_latents_are_left_as_they_are():
    for sampling in ALL.values():
        latents, noise = draws()
        before = latents.clone(), noise.clone()
        noised_input(sampling, latents, noise, T)
        target(sampling, latents, noise, T)
        assert torch.equal(latents, before[0]) and torch.equal(noise, before[1])


def test_image_to_image_models_are_refused():
    with pytest.raises(ValueError, match="knows no noise levels"):
        check_trainable(sampling(ms.ModelSamplingFlux, ms.IMG_TO_IMG_FLOW))
