"""Quantising a model while it is read: time and peak private memory, ours and the reference recipe.

    python tests/bench/bench_fp8_load.py [--rounds 3] [--megabytes 640] [--search]

One thread, page-cached file of 4096² bf16 matrices, every run in a process of its own, variants
interleaved. Peak memory is the largest RssAnon seen every 2 ms: pages of the mapped file, which the
system may drop, do not count. The reference recipe is musubi-tuner's sequence of whole-tensor
operations, written again here. "bound" reads the file once and writes half of it to memory.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
import conftest  # noqa: E402, F401  registers the package
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402

from comfyui_braid.engine.files import write_safetensors  # noqa: E402
from comfyui_braid.engine.fp8.policy import Decision, Fp8Policy  # noqa: E402
from comfyui_braid.engine.fp8.source import map_tensors  # noqa: E402
from comfyui_braid.engine.fp8.stream import quantized_stream  # noqa: E402

WIDTH = 4096
LARGEST_FP8 = 448.0


def write_file(path: Path, megabytes: int) -> None:
    layers = -(-megabytes * 10**6 // (2 * WIDTH * WIDTH))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH, generator=generator).mul_(0.02).bfloat16()
    write_safetensors(path, {f"blocks.{i}.weight": weight.roll(i) for i in range(layers)}, {})


def ours(path: Path, policy: Fp8Policy) -> dict:
    source = map_tensors(path)
    decisions = dict.fromkeys(source.tensors, Decision(quantize=True, reason="bench"))
    made = {}
    for streamed in quantized_stream(source.tensors, decisions, policy, torch.device("cpu")):
        made.update(streamed.tensors)
    return made


def recipe(path: Path, block: int | None) -> dict:
    """The reference's steps: whole tensors, scale in the weight's dtype, nan_to_num, clamp."""
    made = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():
            weight = file.get_tensor(key)
            shape = weight.shape
            groups = weight.view(shape[0], -1, block) if block else weight
            amax = groups.abs().max(dim=-1, keepdim=True).values
            scale = (amax / LARGEST_FP8).clamp(min=1e-8).to(torch.float32)
            scaled = torch.nan_to_num(groups.to(torch.float32) / scale, nan=0.0)
            codes = scaled.clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
            made[key] = codes.view(shape)
            made[key.replace(".weight", ".scale_weight")] = scale.to(weight.dtype)
    return made


def bound(path: Path) -> dict:
    source = map_tensors(path)
    return {
        key: tensor.view(torch.uint8)[:, :WIDTH].clone() if tensor[:, ::32].sum() else tensor
        for key, tensor in source.tensors.items()
    }


VARIANTS = {
    "bound": bound,
    "reference, block 64": lambda path: recipe(path, 64),
    "ours, block 64": lambda path: ours(path, Fp8Policy()),
    "reference, channel": lambda path: recipe(path, None),
    "ours, channel": lambda path: ours(path, Fp8Policy(granularity="channel")),
    "ours, tensor": lambda path: ours(path, Fp8Policy(granularity="tensor")),
}
SEARCH = {"ours, block 64, mse": lambda path: ours(path, Fp8Policy(scale_search="mse"))}


def private_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no RssAnon in /proc/self/status")


def measure(variant: str, path: Path) -> None:
    """Run one variant in this process and print its figures as JSON."""
    torch.set_num_threads(1)
    before, peak, running = private_bytes(), [0], [True]

    def watch() -> None:
        while running[0]:
            peak[0] = max(peak[0], private_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    cpu, wall = time.process_time(), time.perf_counter()
    made = {**VARIANTS, **SEARCH}[variant](path)
    seconds = time.perf_counter() - wall
    cpu = time.process_time() - cpu
    running[0] = False
    watcher.join()
    size = sum(t.nbytes for t in made.values())
    print(json.dumps({"wall": seconds, "cpu": cpu, "peak": peak[0] - before, "size": size}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=640)
    parser.add_argument("--search", action="store_true", help="time the scale search too (slow)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], Path(arguments.measure[1]))
        return
    variants = [*VARIANTS, *(SEARCH if arguments.search else ())]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_file(path, arguments.megabytes)
        found: dict[str, list[dict]] = {variant: [] for variant in variants}
        for _ in range(arguments.rounds):
            for variant in variants:
                command = [sys.executable, __file__, "--measure", variant, str(path)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[variant].append(json.loads(output))
        report(found, path.stat().st_size)


def report(found: dict[str, list[dict]], source_size: int) -> None:
    largest = 2 * WIDTH * WIDTH
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread")
    print(f"source {source_size / 1e6:.0f} MB bf16; limit = 1.05 x FP8 size + one bf16 tensor")
    print(f"{'':22s} {'CPU s':>7s} {'wall s':>7s} {'/ reference':>12s} {'peak / limit':>13s}")
    for variant, runs in found.items():
        cpu = statistics.median(run["cpu"] for run in runs)
        wall = statistics.median(run["wall"] for run in runs)
        peak = max(run["peak"] for run in runs)
        name = variant.split(", ")[1] if ", " in variant else ""
        base = found.get(f"reference, {name}")
        ratio = cpu / statistics.median(run["cpu"] for run in base) if base else float("nan")
        limit = 1.05 * runs[0]["size"] + largest
        print(f"{variant:22s} {cpu:7.2f} {wall:7.2f} {ratio:12.2f} {peak / limit:13.2f}")


if __name__ == "__main__":
    main()
