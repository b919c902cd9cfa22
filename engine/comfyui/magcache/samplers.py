"""What MagCache must know about a sampler: its calls' noise levels, and whether it adds noise."""

import bisect
import inspect
from collections.abc import Sequence

import comfy.samplers
from torch import Tensor

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
SAME_LEVEL = 5e-4
"""Relative distance of noise levels that count as one: samplers compute a level in several ways."""
NOISELESS = frozenset(("sample_res_multistep", "sample_res_multistep_cfg_pp"))
"""Core samplers that take a noise source and do not use it."""


def same_level(sigma: float, other: float) -> bool:
    """Whether two noise levels are one, up to a sampler's rounding."""
    return abs(sigma - other) <= SAME_LEVEL * max(sigma, other)


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


class StepClock:
    """Which step of the schedule a model call belongs to, and its noise level as a Python float.

    For samplers that call once a step it counts; otherwise it reads the noise level, which waits
    for the device once a call.
    """

    def __init__(self, sigmas: Sequence[float], follows_schedule: bool) -> None:
        self._sigmas = tuple(sigmas)
        self._falling = [-sigma for sigma in sigmas]
        self._follows = follows_schedule
        self._calls = 0

    def tick(self, timestep: Tensor) -> tuple[int, float, bool]:
        """Step index, sigma and whether sigma is that step's own level, for the next call."""
        step = self._calls
        self._calls += 1
        if self._follows and step < len(self._sigmas) - 1:
            return step, self._sigmas[step], True
        return self._read(float(timestep.max()))

    def _read(self, sigma: float) -> tuple[int, float, bool]:
        below = sigma * (1.0 - SAME_LEVEL)  # SDE samplers call a little below the first level
        step = bisect.bisect_right(self._falling, -below) - 1
        step = min(max(step, 0), len(self._sigmas) - 2)
        return step, sigma, same_level(self._sigmas[step], sigma)
