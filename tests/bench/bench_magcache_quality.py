"""PSNR at equal numbers of evaluations: fewer steps, EasyCache, MagCache's rule, planned schedules.

    OMP_NUM_THREADS=1 python tests/bench/bench_magcache_quality.py [--samples 10] [--steps 50]

Runs the playground's trained FLUX in ComfyUI, CFG 2. The plan is calibrated on one sample (euler,
50 steps) and used on others, with other letters and seeds. Every row is compared with the full
run of its own sampler and with a converged solution (400 euler steps). PSNR in the model's
latents, range 2.
"""

import argparse
import logging
import platform
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import conftest  # noqa: E402, F401
from host.inprocess import import_comfyui  # noqa: E402

if not import_comfyui():
    raise SystemExit("bench_magcache_quality needs a ComfyUI; set COMFYUI_PATH")

import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import torch  # noqa: E402
from comfy_extras.nodes_easycache import EasyCacheNode  # noqa: E402

from comfyui_braid.engine.comfyui.magcache.calibrate import Calibrator  # noqa: E402
from comfyui_braid.engine.comfyui.magcache.patch import MagCachePatch  # noqa: E402
from comfyui_braid.engine.comfyui.playground import load_playground_model  # noqa: E402
from comfyui_braid.engine.magcache.rules import MagCacheRule, MagCacheSettings, PlannedRule  # noqa: E402
from comfyui_braid.engine.magcache.schedule import plan_schedule  # noqa: E402
from comfyui_braid.engine.playground import glyphs, sampling  # noqa: E402

CFG = 2.0
CONVERGED_STEPS = 400


def shifted_sigmas(steps: int, shift: float) -> torch.Tensor:
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def conditioning(letters: list[str]) -> list:
    context, pooled = sampling.embed_letters(letters)
    return [[context, {"pooled_output": pooled}]]


class World:
    """The model, the test samples and a way to run them."""

    def __init__(self, letters: list[str], seed: int) -> None:
        self.model = load_playground_model()
        self.letters = letters
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn((len(letters), 16, 16, 16), generator=generator)

    def run(self, model, sampler: str, sigmas: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            out = comfy.sample.sample_custom(
                model,
                self.noise,
                CFG,
                comfy.samplers.sampler_object(sampler),
                sigmas,
                conditioning(self.letters),
                conditioning([""] * len(self.letters)),
                torch.zeros_like(self.noise),
                disable_pbar=True,
                seed=0,
            )
        return glyphs.process_in(out)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Median over the samples: one that tips over into another picture does not decide the row."""
    return float((10 * torch.log10(4.0 / (a - b).pow(2).flatten(1).mean(dim=1))).median())


def paper_rule(plan, sigmas, evaluations: int, interpolation: str) -> MagCacheRule:
    """The smallest threshold with which the rule needs at most `evaluations`."""
    for step in range(1, 2000):
        rule = MagCacheRule(
            threshold=step * 0.002, retention_ratio=0.1, k=6, interpolation=interpolation
        )
        if plan_schedule(plan, sigmas, rule).computed <= evaluations:
            return rule
    return rule


def easycache(world: World, sampler: str, sigmas: torch.Tensor, evaluations: int):
    """EasyCache with at most `evaluations`, its threshold found by bisection; (samples, count)."""
    low, high, best = 0.0, 3.0, None
    for _ in range(7):
        threshold = (low + high) / 2
        counted = world.model.clone()
        calls = []
        counted.add_wrapper_with_key("diffusion_model", "own input", _own_input)
        counted.add_wrapper_with_key("diffusion_model", "easycache_count", _counter(calls))
        node = EasyCacheNode.execute(counted, threshold, 0.1, 0.95, False)
        patched = node.args[0]
        wrappers = patched.wrappers["diffusion_model"]
        wrappers["easycache_count"] = wrappers.pop("easycache_count")  # inside the cache
        samples = world.run(patched, sampler, sigmas)
        if len(calls) <= evaluations:
            best, high = (samples, len(calls)), threshold
        else:
            low = threshold
    return best


def _own_input(executor, x, *args, **kwargs):
    """EasyCache (0.33) adds to its input in place; in float32 that is the sampler's own latent."""
    return executor(x.clone(), *args, **kwargs)


def _counter(calls: list):
    def count(executor, *args, **kwargs):
        calls.append(1)
        return executor(*args, **kwargs)

    return count


def cached(world: World, plan, rule, sampler: str, sigmas):
    patch = MagCachePatch(MagCacheSettings(plan=plan, rule=rule))
    samples = world.run(patch.attach(world.model), sampler, sigmas)
    return samples, patch.last_report.schedule


def table(world: World, plan, sampler: str, steps: int, shift: float, evaluations: int, converged):
    sigmas = shifted_sigmas(steps, shift)
    full = world.run(world.model, sampler, sigmas)
    rows = [("full run", steps, full, None)]
    fewer = world.run(world.model, sampler, shifted_sigmas(evaluations, shift))
    rows.append(("fewer steps", evaluations, fewer, None))
    easy = easycache(world, sampler, sigmas, evaluations)
    if easy:
        rows.append(("EasyCache (core)", easy[1], easy[0], None))
    speedup = steps / evaluations
    rules = {
        "MagCache rule, nearest": paper_rule(plan, sigmas, evaluations, "nearest"),
        "MagCache rule, cumulative": paper_rule(plan, sigmas, evaluations, "cumulative"),
        "planned, reuse": PlannedRule(speedup=speedup, predict="reuse"),
        "planned, extrapolate": PlannedRule(speedup=speedup),
    }
    for name, rule in rules.items():
        samples, schedule = cached(world, plan, rule, sampler, sigmas)
        rows.append((name, schedule.computed, samples, schedule.predicted_rms))
    print(f"\n{sampler}, {steps} steps, shift {shift:g}, at most {evaluations} evaluations")
    print(f"  {'':28}{'evals':>6}{'vs full':>9}{'vs converged':>14}{'RMS pred / true':>20}")
    for name, count, samples, predicted in rows:
        true_rms = float((samples - full).pow(2).mean().sqrt())
        rms = "" if predicted is None else f"{predicted:.4f} / {true_rms:.4f}"
        against = "-" if samples is full else f"{psnr(samples, full):.1f}"
        print(f"  {name:28}{count:6}{against:>9}{psnr(samples, converged):14.1f}{rms:>20}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--steps", type=int, nargs="+", default=[50])
    parser.add_argument("--shifts", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--samplers", nargs="+", default=["euler", "dpmpp_2m"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, 1 thread")
    letters = [glyphs.LETTERS[i % len(glyphs.LETTERS)] for i in range(arguments.samples)]
    world = World(letters, seed=7)
    for shift in arguments.shifts:
        calibrator = Calibrator()
        calibration = World([glyphs.LETTERS[3]], seed=1234)
        calibration.run(calibrator.attach(world.model), "euler", shifted_sigmas(50, shift))
        plan = calibrator.result()
        converged = world.run(world.model, "euler", shifted_sigmas(CONVERGED_STEPS, shift))
        for sampler in arguments.samplers:
            for steps in arguments.steps:
                for evaluations in (steps // 2, steps // 3):
                    table(world, plan, sampler, steps, shift, evaluations, converged)


if __name__ == "__main__":
    main()
