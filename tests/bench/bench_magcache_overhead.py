"""What a skipped step costs, and the speed-up that is really measured.

    OMP_NUM_THREADS=1 python tests/bench/bench_magcache_overhead.py

Ratios are medians of interleaved repetitions in one thread.
"""

import platform
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in (".", "comfyui")]

import conftest  # noqa: E402, F401
from host.inprocess import import_comfyui  # noqa: E402

if not import_comfyui():
    raise SystemExit("bench_magcache_overhead needs a ComfyUI; set COMFYUI_PATH")

import logging  # noqa: E402

import torch  # noqa: E402
from magcache_runs import cached, calibrate, ones, sample  # noqa: E402
from tiny_models import build, latent  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from comfyui_braid.engine.magcache.curve import resampled_sigmas  # noqa: E402
from comfyui_braid.engine.magcache.residuals import ResidualCache, predicted_denoised  # noqa: E402
from comfyui_braid.engine.magcache.rules import MagCacheRule, PlannedRule  # noqa: E402
from comfyui_braid.engine.magcache.schedule import plan_schedule  # noqa: E402


def interleaved(repetitions: int, **works) -> dict[str, float]:
    """name -> median seconds of each callable, run in turn."""
    times = {name: [] for name in works}
    for _ in range(repetitions):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def skip_cost() -> None:
    """A skipped call of two conditionings at 1024 x 1024: (2, 16, 128, 128) float32."""
    x, older, newer = (torch.randn(2, 16, 128, 128) for _ in range(3))
    caches = {}
    for name, extrapolate in (("reuse", False), ("extrapolate", True)):
        caches[name] = ResidualCache(extrapolate)
        for key in (0, 1):
            caches[name].store(key, 0, 0.9, older[key : key + 1])
            caches[name].store(key, 1, 0.8, newer[key : key + 1])

    def skip(name):
        return predicted_denoised(caches[name], [0, 1], x, 0.7)

    took = interleaved(
        300,
        add=lambda: torch.add(x, newer),
        reuse=lambda: skip("reuse"),
        extrapolate=lambda: skip("extrapolate"),
    )
    for name in ("reuse", "extrapolate"):
        ratio = took[name] / took["add"]
        print(f"  skipped call, {name:12} {took[name] * 1e6:7.0f} us = {ratio:.2f} x one add")
    print(f"  {'one add of the cached tensor':26} {took['add'] * 1e6:7.0f} us")


class CountReads(TorchDispatchMode):
    """Counts the places where Python waits for a tensor's value."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def host_reads() -> None:
    model = build("flux")
    patched, _ = cached(model, rule=MagCacheRule(threshold=1.0, retention_ratio=0.0, k=2))
    found = {}
    for name, subject in (("plain", model), ("cached", patched)):
        counts = []
        for steps in (10, 20):
            counter = CountReads()
            with counter:
                sample(subject, "flux", steps=steps)
            counts.append(counter.reads)
        found[name] = (counts[1] - counts[0]) / 10
    print(
        f"  host reads per step: {found['plain']:.1f} without, {found['cached']:.1f} with MagCache"
    )


def plan_time() -> None:
    plan, _ = calibrate(build("flux"), "flux", steps=50)
    for steps in (20, 50, 100):
        sigmas = resampled_sigmas(plan.conditions.sigmas, steps)
        took = interleaved(
            15,
            planned=lambda s=sigmas: plan_schedule(plan, s, PlannedRule(speedup=2.0)),
            magcache=lambda s=sigmas: plan_schedule(plan, s, MagCacheRule()),
        )
        print(
            f"  plan of {steps:3} steps: planned {took['planned'] * 1e3:5.1f} ms, "
            f"magcache {took['magcache'] * 1e3:5.1f} ms"
        )


def measured_speedup() -> None:
    """On a FLUX whose step takes more than 100 ms: a larger latent."""
    model = build("flux")
    noise = torch.nn.functional.interpolate(latent("flux"), scale_factor=4)
    steps = 12
    patched, patch = cached(
        model, ones(steps), MagCacheRule(threshold=1.0, retention_ratio=0.0, k=1)
    )
    took = interleaved(
        3,
        full=lambda: sample(model, "flux", steps=steps, noise=noise),
        cached=lambda: sample(patched, "flux", steps=steps, noise=noise),
    )
    ideal, measured = patch.last_report.speedup, took["full"] / took["cached"]
    print(
        f"  step of {took['full'] / steps * 1e3:.0f} ms: {measured:.3f} x faster, "
        f"evaluations {ideal:.3f} x fewer, {measured / ideal:.3f} of the ideal"
    )


def main() -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, 1 thread")
    skip_cost()
    host_reads()
    plan_time()
    measured_speedup()


if __name__ == "__main__":
    main()
