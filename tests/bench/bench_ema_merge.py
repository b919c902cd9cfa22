"""Streamed merge against the reference recipe: 8 files of about 160 MB, interleaved, one thread.

Torch has one thread in each; Braid hashes and writes in another beside it, so the time of all
threads (CPU time) is reported too.

    python tests/bench/bench_ema_merge.py [--files 8] [--megabytes 160] [--rounds 5]

The recipe is what musubi-tuner's script does, written as a sequence of operations: all tensors of
the first file in float32, each further file mixed out of place, cast back, serialised once for the
hash and once to save. Peak private memory is what a merge adds to a fresh process that has already
run a tiny one.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conftest  # noqa: E402, F401
import safetensors  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

from comfyui_braid.engine.ema.merge import prepare_merge, write_merged  # noqa: E402
from comfyui_braid.engine.ema.schedule import MusubiPower, merge_betas  # noqa: E402

RANK, WIDTH = 32, 3072


def write_run(folder: Path, files: int, megabytes: int) -> list[Path]:
    """A FLUX-like LoRA in bfloat16 (rank 32), drifting from file to file."""
    modules = max(1, round(megabytes * 10**6 / (2 * RANK * (WIDTH + WIDTH * 3))))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index in range(modules):
        name = f"lora_unet_blocks_{index}_qkv"
        tensors[f"{name}.alpha"] = torch.tensor(16.0)
        tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, WIDTH, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(WIDTH * 3, RANK, generator=generator)
    paths = []
    for index in range(files):
        for key, value in tensors.items():
            if not key.endswith(".alpha"):
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
        path = folder / f"run-step{(index + 1) * 100:08d}.safetensors"
        saved = {key: value.bfloat16() for key, value in tensors.items()}
        safetensors.torch.save_file(saved, path, {"ss_steps": str((index + 1) * 100)})
        paths.append(path)
    return paths


def reference_recipe(paths: list[Path], betas: list[float], output: Path) -> None:
    state, dtypes = {}, {}
    with safetensors.safe_open(paths[-1], framework="pt") as file:
        metadata = file.metadata() or {}
    with safetensors.safe_open(paths[0], framework="pt") as file:
        for key in file.keys():  # noqa: SIM118, safe_open is no mapping
            value = file.get_tensor(key)
            dtypes[key], state[key] = value.dtype, value.float()
    for path, beta in zip(paths[1:], betas, strict=True):
        with safetensors.safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                value = file.get_tensor(key).float()
                if key.endswith(".alpha"):
                    assert torch.allclose(state[key], value)
                else:
                    state[key] = state[key] * beta + value * (1 - beta)
    for key, dtype in dtypes.items():
        state[key] = state[key].to(dtype)
    ss_metadata = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    serialised = safetensors.torch.save(state, ss_metadata)
    header = 8 + int.from_bytes(serialised[:8], "little")
    metadata["sshs_model_hash"] = hashlib.sha256(serialised[header:]).hexdigest()
    metadata["sshs_legacy_hash"] = hashlib.sha256(serialised[0x100000:0x110000]).hexdigest()[:8]
    safetensors.torch.save_file(state, output, metadata)


def streamed(paths: list[Path], betas: list[float], output: Path) -> None:
    for _ in write_merged(prepare_merge(paths, betas, like_musubi=True), output):
        pass


def bound(paths: list[Path], betas: list[float], output: Path) -> None:
    """Read every byte once and write one file: what no merge can beat."""
    buffer = bytearray(1 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with output.open("wb", buffering=0) as file:
        for _ in range(paths[0].stat().st_size // len(buffer)):
            file.write(buffer)


MERGES = {"reference recipe": reference_recipe, "Braid": streamed, "read+write bound": bound}


def private_bytes() -> int:
    """Anonymous memory of this process (Linux)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no /proc/self/smaps_rollup")


def _peak_in_this_process(name: str, arguments: tuple, pipe) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tiny = write_run(Path(folder), 2, 1)
        MERGES[name](tiny, [0.5], Path(folder) / "tiny.safetensors")
    before = private_bytes()
    peak, running = before, True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, private_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    MERGES[name](*arguments)
    running = False
    watcher.join()
    pipe.send(peak - before)


def peak_private_memory(name: str, *arguments) -> int:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_in_this_process, args=(name, arguments, sender))
    process.start()
    peak = receiver.recv()
    process.join()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as name:
        folder = Path(name)
        paths = write_run(folder, options.files, options.megabytes)
        size = paths[0].stat().st_size
        betas = merge_betas(MusubiPower(sigma_rel=0.2), range(1, len(paths) + 1)).tolist()
        outputs = {merge: folder / f"{merge.replace(' ', '_')}.safetensors" for merge in MERGES}
        seconds: dict[str, list[float]] = {merge: [] for merge in MERGES}
        cpu_seconds: dict[str, list[float]] = {merge: [] for merge in MERGES}
        for round_ in range(options.rounds + 1):
            for merge, run in MERGES.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                run(paths, betas, outputs[merge])
                if round_:  # the first round warms the page cache
                    seconds[merge].append(time.perf_counter() - start)
                    cpu_seconds[merge].append(time.process_time() - cpu_start)
        one = safetensors.torch.load_file(outputs["reference recipe"])
        other = safetensors.torch.load_file(outputs["Braid"])
        equal = all(torch.equal(one[key], other[key]) for key in one)
        memory = {
            f"{merge}, {count} files": peak_private_memory(
                merge, paths[:count], betas[: count - 1], outputs[merge]
            )
            / size
            for merge in ("reference recipe", "Braid")
            for count in sorted({2, len(paths)})
        }
    ratio = [a / b for a, b in zip(seconds["Braid"], seconds["reference recipe"], strict=True)]
    bounds = [a / b for a, b in zip(seconds["Braid"], seconds["read+write bound"], strict=True)]
    median = {merge: statistics.median(values) for merge, values in seconds.items()}
    cpu_median = {merge: statistics.median(values) for merge, values in cpu_seconds.items()}
    report = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "files": f"{len(paths)} x {size / 1e6:.0f} MB bf16",
        "seconds, median": {merge: round(value, 3) for merge, value in median.items()},
        "time / reference recipe, each round": [round(value, 3) for value in ratio],
        "time / reference recipe, median": round(statistics.median(ratio), 3),
        "CPU time / reference recipe": round(
            cpu_median["Braid"] / cpu_median["reference recipe"], 3
        ),
        "time / bound, each round": [round(value, 2) for value in bounds],
        "time / bound, median": round(statistics.median(bounds), 2),
        "CPU time / bound": round(cpu_median["Braid"] / cpu_median["read+write bound"], 2),
        "peak private memory / file size": {key: round(x, 3) for key, x in memory.items()},
        "bit-equal to the recipe": equal,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
