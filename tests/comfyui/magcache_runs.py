"""Short runs for the MagCache tests."""

import dataclasses
import functools

import comfy.sample
import comfy.samplers
import torch
from tiny_models import FLUX, MODELS, built, conditioning, latent

from comfyui_braid.engine.comfyui.magcache.calibrate import Calibrator
from comfyui_braid.engine.comfyui.magcache.patch import MagCachePatch
from comfyui_braid.engine.magcache.plan import plan_from_ratios
from comfyui_braid.engine.magcache.rules import MagCacheRule, MagCacheSettings

STEPS = 8
SMALL = dict(depth=1, depth_single_blocks=2, hidden_size=64, axes_dim=[8, 28, 28])


def small_flux():
    """A FLUX of three narrow blocks; takes the latents and conditioning of "flux"."""
    return built(dataclasses.replace(MODELS["flux"], unet_config={**FLUX, **SMALL}))


def sample(
    model,
    name,
    *,
    steps=STEPS,
    cfg=2.0,
    sampler="euler",
    scheduler="simple",
    positive=None,
    negative=None,
    noise=None,
    start=None,
    **options,
):
    """Sample as KSampler does; seed 0."""
    noise = latent(name) if noise is None else noise
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            scheduler,
            conditioning(name, 0) if positive is None else positive,
            conditioning(name, 1) if negative is None else negative,
            torch.zeros_like(noise) if start is None else start,
            seed=0,
            disable_pbar=True,
            **options,
        )


def sample_levels(model, levels, sampler="euler", name="flux"):
    """Sample as SamplerCustom does, on noise levels of one's own."""
    noise = latent(name)
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model,
            noise,
            2.0,
            comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler,
            torch.tensor(levels),
            conditioning(name, 0),
            conditioning(name, 1),
            torch.zeros_like(noise),
            seed=0,
            disable_pbar=True,
        )


def calibrate(model, name, measure="latent", **options):
    """(plan, samples) of a calibration run."""
    calibrator = Calibrator(measure)
    samples = sample(calibrator.attach(model), name, **options)
    return calibrator.result(), samples


@functools.cache
def flux_plan(steps=STEPS, sampler="euler"):
    """A calibration of the small FLUX, measured once."""
    return calibrate(small_flux(), "flux", steps=steps, sampler=sampler)[0]


def ones(steps=STEPS):
    """Ratios with which the rule skips as far as k goes."""
    return plan_from_ratios(",".join(["1"] * steps))


GREEDY = MagCacheRule(threshold=1.0, retention_ratio=0.0, k=2)
"""Computes steps 0, 3, 6, … and the last."""
SKIPPED = (1, 2, 4, 5)
"""What it skips of 8 steps."""


def cached(model, plan=None, rule=GREEDY, **settings):
    """(patched model, patch)."""
    patch = MagCachePatch(MagCacheSettings(plan=plan or ones(), rule=rule, **settings))
    return patch.attach(model), patch


def counting(model, counts):
    """A clone whose network calls are counted, as another pack's wrapper would."""
    clone = model.clone()

    def count(executor, *args, **kwargs):
        counts.append(len(kwargs.get("transformer_options", args[-1])["uuids"]))
        return executor(*args, **kwargs)

    clone.add_wrapper_with_key("diffusion_model", "another pack", count)
    return clone


def close(a, b):
    """Equal up to the rounding of another batch size."""
    return torch.allclose(a, b, atol=2e-4 * max(b.std().item(), 1.0), rtol=1e-3)


def labels(patch):
    """Name of each conditioning of the last run -> (computed steps, skipped steps)."""
    return {c.label: (c.computed, c.skipped) for c in patch.last_report.conditionings}


def warnings_of(patch):
    """Everything that the last run warned of, in one line."""
    return " / ".join(patch.last_report.schedule.warnings)
