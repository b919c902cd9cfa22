"""What MagCache must know about a sampler: its calls' noise levels, and whether it adds noise."""

import inspect

import comfy.samplers

CORE_SAMPLERS = "comfy.k_diffusion.sampling"
ONE_CALL_A_STEP = frozenset(
    "sample_" + name
    for name in (
        "euler euler_cfg_pp euler_ancestral euler_ancestral_cfg_pp lms dpmpp_2m dpmpp_2m_cfg_pp "
        "dpmpp_2m_sde dpmpp_2m_sde_gpu dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu dpmpp_3m_sde "
        "dpmpp_3m_sde_gpu ddpm lcm ipndm ipndm_v deis res_multistep res_multistep_cfg_pp "
        "res_multistep_ancestral res_multistep_ancestral_cfg_pp gradient_estimation "
        "gradient_estimation_cfg_pp er_sde sa_solver"
    ).split()
)
"""Core samplers whose n-th call is at the schedule's n-th noise level (a test checks every one)."""
OWN_LEVELS = frozenset(("dpm_fast", "dpm_adaptive"))
"""Core samplers that choose noise levels of their own between the schedule's first and last."""
NOISELESS = frozenset(("sample_res_multistep", "sample_res_multistep_cfg_pp"))
"""Core samplers that take a noise source and do not use it."""


def sampler_name(sampler: comfy.samplers.Sampler) -> str:
    """The name a person knows: `euler`, `dpmpp_2m` …; the class name for other samplers."""
    if isinstance(sampler, comfy.samplers.KSAMPLER):
        name = sampler.sampler_function.__name__
        return name.removeprefix("sample_").removesuffix("_function")
    return type(sampler).__name__


def calls_follow_schedule(sampler: comfy.samplers.Sampler) -> bool:
    """True when the noise level of every call is known beforehand, so that none has to be read."""
    return (
        isinstance(sampler, comfy.samplers.KSAMPLER)
        and sampler.sampler_function.__module__ == CORE_SAMPLERS
        and sampler.sampler_function.__name__ in ONE_CALL_A_STEP
        and not sampler.extra_options.get("s_churn")
    )


def adds_noise(sampler: comfy.samplers.Sampler) -> bool:
    """True for ancestral and SDE samplers, whose latent does not follow one velocity field."""
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        return False
    if sampler.extra_options.get("s_churn"):
        return True
    function = sampler.sampler_function
    if function.__name__ in NOISELESS:
        return False
    parameters = inspect.signature(function).parameters
    if "noise_sampler" not in parameters:
        return False
    eta = parameters["eta"].default if "eta" in parameters else 1.0
    return sampler.extra_options.get("eta", eta) != 0


def noisy_by_name(name: str) -> bool:
    """Whether the core sampler of this `sampler_name` adds noise; False where it is not known."""
    return name in comfy.samplers.SAMPLER_NAMES and adds_noise(comfy.samplers.sampler_object(name))
