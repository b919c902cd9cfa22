"""Times of the timestep draws and of the preview, side by side; run by hand on one thread.

OMP_NUM_THREADS=1 python tests/bench/bench_timesteps.py
"""

import math
import platform
import random
import sys
import time
from pathlib import Path
from statistics import NormalDist

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import conftest  # noqa: E402, F401  loads the package

from comfyui_braid.engine.timesteps.preview import PreviewSettings, measure_preview  # noqa: E402
from comfyui_braid.engine.timesteps.sampling import MODES, TimestepSampling  # noqa: E402
from comfyui_braid.engine.timesteps.stream import TimestepStream  # noqa: E402

ITEMS, BATCH = 128, 64
FLUX_MU = 1.15


def scalar_python() -> list[float]:
    """One logit-normal sample at a time in plain Python: the cheapest scalar loop."""
    normal = NormalDist()
    draw = []
    for _ in range(BATCH):
        z = normal.inv_cdf(random.random() or 0.5)
        draw.append(1.0 / (1.0 + math.exp(-(FLUX_MU + z))))
    return draw


def scalar_torch() -> torch.Tensor:
    """One sample at a time with tensors, as a trainer that loops over its batch does."""
    draw = []
    for _ in range(BATCH):
        y = torch.sigmoid(torch.randn(1))
        shift = math.exp(FLUX_MU)
        draw.append(shift * y / (1.0 + (shift - 1.0) * y))
    return torch.cat(draw)


def drawing(**settings):
    """A whole trainer call: u of the next batch, mapped to t; pools of new epochs included."""
    stream = TimestepStream(TimestepSampling(**settings), ITEMS, seed=0)
    batches = [list(range(ITEMS))[i : i + BATCH] for i in range(0, ITEMS, BATCH)]
    calls = iter(range(10**9))
    return lambda: stream.draw(batches[next(calls) % len(batches)], 128, 128)


def best_ms(contenders: dict, rounds: int, repeats: int, clock=time.perf_counter) -> dict:
    """Fastest of `rounds` interleaved means over `repeats` calls, in milliseconds."""
    best = dict.fromkeys(contenders, math.inf)
    for _ in range(rounds):
        for name, call in contenders.items():
            start = clock()
            for _ in range(repeats):
                call()
            best[name] = min(best[name], 1e3 * (clock() - start) / repeats)
    return best


def main() -> None:
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread")
    draws = {
        "scalar loop, tensors": scalar_torch,
        "scalar loop, plain Python": scalar_python,
        "flux_shift": drawing(mode="flux_shift"),
        "flux_shift, 8 buckets": drawing(mode="flux_shift", num_timestep_buckets=8),
        "qinglong_flux, 8 buckets": drawing(mode="qinglong_flux", num_timestep_buckets=8),
    }
    times = best_ms(draws, rounds=60, repeats=40)
    print(f"\none batch of {BATCH}      ms    / tensor loop   / Python loop")
    for name, ms in times.items():
        ratios = [ms / times[base] for base in list(draws)[:2]]
        print(f"{name:26} {ms:8.4f}   {ratios[0]:8.3f}   {ratios[1]:8.3f}")
    previews = {}
    for mode in MODES:
        settings = PreviewSettings(sampling=TimestepSampling(mode=mode, num_timestep_buckets=8))
        previews[mode] = lambda settings=settings: measure_preview(settings)
    print("\npreview of 100,000 draws    ms   of this process's CPU")
    wall = best_ms(previews, rounds=9, repeats=1)
    cpu = best_ms(previews, rounds=9, repeats=1, clock=time.process_time)
    for name, ms in wall.items():
        print(f"{name:22} {ms:8.1f}   {cpu[name]:8.1f}")


if __name__ == "__main__":
    main()
