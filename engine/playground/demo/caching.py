"""Chapter 5: MagCache calibrated, planned, and compared with taking fewer steps."""

import torch
from torch import Tensor

from ...magcache.calibration import ResidualRecorder, calibrated_plan
from ...magcache.figure import draw_schedule
from ...magcache.plan import POSITIVE, Conditions, MagCachePlan
from ...magcache.rules import MagCacheRule, PlannedRule
from ...magcache.schedule import Schedule, plan_schedule
from ..glyphs import LATENT_SIZE, LETTERS, process_out
from ..model import Flux
from ..sampling import embed_letters
from .quantising import decibel
from .report import Picture, Section

STEPS, CFG = 50, 2.0
CALIBRATION_SEED, TEST_SEED = 100, 5


def caching_section(model: Flux) -> Section:
    sigmas = torch.linspace(1, 0, STEPS + 1).tolist()
    recorder = ResidualRecorder(POSITIVE, channel_dim=1)
    _denoise(model, sigmas, CALIBRATION_SEED, recorder=recorder)
    plan = calibrated_plan(
        "playground",
        Conditions(steps=STEPS, sigmas=tuple(sigmas), model="Flux", measure="latent", cfg=CFG),
        [recorder],
        [recorder],
        "make demo",
    )
    full = _denoise(model, sigmas, TEST_SEED)
    rows = [["evaluations of 50", "fewer steps", "MagCache's rule", "planned, extrapolated"]]
    pictures = []
    for speedup in (2.0, 3.0):
        planned = plan_schedule(plan, sigmas, PlannedRule(speedup=speedup))
        rule = _rule_with(plan, sigmas, planned.computed)
        fewer = torch.linspace(1, 0, planned.computed + 1).tolist()
        rows.append(
            [
                f"{planned.computed} (rule: {rule.computed})",
                decibel(_denoise(model, fewer, TEST_SEED), full),
                decibel(_denoise(model, sigmas, TEST_SEED, rule), full),
                decibel(_denoise(model, sigmas, TEST_SEED, planned), full),
            ]
        )
        picture = draw_schedule(planned, "planned")
        pictures.append(Picture(pixels=picture, caption=f"The plan for {speedup:g} times fewer."))
    return Section(
        title="MagCache, calibrated and planned",
        text="One full run measures how the velocity changes over sigma; from that the steps that "
        "may be predicted are chosen before sampling begins. PSNR of the latents against the full "
        "50 Euler steps, other noise than the calibration's.",
        pictures=pictures,
        table=rows,
    )


def _rule_with(plan: MagCachePlan, sigmas: list[float], evaluations: int) -> Schedule:
    """The paper's rule at the threshold that comes closest to `evaluations`."""
    schedules = [
        plan_schedule(plan, sigmas, MagCacheRule(threshold=i / 200, retention_ratio=0.2, k=6))
        for i in range(1, 200)
    ]
    return min(schedules, key=lambda s: (abs(s.computed - evaluations), -s.computed))


def _denoise(
    model: Flux,
    sigmas: list[float],
    seed: int,
    schedule: Schedule | None = None,
    recorder: ResidualRecorder | None = None,
) -> Tensor:
    """Euler steps with guidance; a step that `schedule` skips has its guided velocity predicted."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(LETTERS), 16, LATENT_SIZE, LATENT_SIZE, generator=generator)
    context, pooled = embed_letters(LETTERS)
    nothing, no_pooled = embed_letters([""] * len(LETTERS))
    computed: list[tuple[float, Tensor]] = []
    for step, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        if schedule and step in schedule.skipped:
            velocity = predicted(computed, sigma, schedule.extrapolate)
        else:
            t = torch.full((len(LETTERS),), sigma)
            with torch.no_grad():
                free = model(x, t, nothing, no_pooled)
                velocity = free + CFG * (model(x, t, context, pooled) - free)
            computed = [*computed[-1:], (sigma, velocity)]
        if recorder:
            recorder.add(velocity)
        x = x + (following - sigma) * velocity
    return process_out(x)


def predicted(computed: list[tuple[float, Tensor]], sigma: float, extrapolate: bool) -> Tensor:
    """The last computed velocity, or the line in sigma through the last two."""
    last_sigma, last = computed[-1]
    if not extrapolate or len(computed) < 2:
        return last
    before_sigma, before = computed[-2]
    return last + (last - before) * ((sigma - last_sigma) / (last_sigma - before_sigma))
