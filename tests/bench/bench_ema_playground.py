"""Held-out loss of averages on the playground: last file, musubi's merge, exact weights, shadows.

    python tests/bench/bench_ema_playground.py [--seeds 3] [--steps 300] [--rate 2e-3]

Each seed trains one LoRA at a constant learning rate, keeping ten checkpoints and five shadows.
Every candidate is measured on the same held-out pictures at the same noise; losses are reported
relative to the last checkpoint of their own run, in per cent, with the standard error over the
seeds.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conftest  # noqa: E402, F401
import torch  # noqa: E402

from comfyui_braid.engine.checkpoints import Checkpoints  # noqa: E402
from comfyui_braid.engine.ema.average import averaged, plan_average  # noqa: E402
from comfyui_braid.engine.ema.reconstruction import plan_reconstruction, reconstructed  # noqa: E402
from comfyui_braid.engine.ema.schedule import MusubiPower, Power  # noqa: E402
from comfyui_braid.engine.ema.shadows import Shadows  # noqa: E402
from comfyui_braid.engine.network.adapter_file import (  # noqa: E402
    load_weights,
    read_adapter,
    state_dict_of,
    weights_of,
    write_adapter,
)
from comfyui_braid.engine.network.architectures import architecture_of  # noqa: E402
from comfyui_braid.engine.network.attach import (  # noqa: E402
    attached,
    build_network,
    parameter_groups,
)
from comfyui_braid.engine.network.keys import encoded  # noqa: E402
from comfyui_braid.engine.network.layers import layer_shapes  # noqa: E402
from comfyui_braid.engine.network.metadata import adapter_metadata  # noqa: E402
from comfyui_braid.engine.network.targets import select_targets  # noqa: E402
from comfyui_braid.engine.playground.demo.training import (  # noqa: E402
    PLAN,
    SAMPLING,
    SPEC,
    model_latents,
)
from comfyui_braid.engine.playground.denoiser import PlaygroundDenoiser  # noqa: E402
from comfyui_braid.engine.playground.glyphs import draw_dataset, pictures_of  # noqa: E402
from comfyui_braid.engine.playground.model import load_playground  # noqa: E402
from comfyui_braid.engine.timesteps.stream import TimestepStream  # noqa: E402
from comfyui_braid.engine.training.dataset import Dataset, TrainingItem  # noqa: E402
from comfyui_braid.engine.training.loop import TrainingRun  # noqa: E402
from comfyui_braid.engine.training.optimizers.optimizer import Optimization, OptimizerSpec  # noqa: E402
from comfyui_braid.engine.training.options import Checkpointing, Validation  # noqa: E402
from comfyui_braid.engine.training.states.identity import Identity  # noqa: E402
from comfyui_braid.engine.training.states.saving import Saver, saved  # noqa: E402
from comfyui_braid.engine.training.validation import Validator  # noqa: E402

STYLE = "outlined"
WIDTHS = (0.05, 0.075, 0.1, 0.15, 0.2, 0.25)
ARCHITECTURE = architecture_of({"image_model": "flux"})


def items(count: int, seed: int) -> list[TrainingItem]:
    glyphs = draw_dataset(count, STYLE, seed=seed)
    latents = model_latents(pictures_of(glyphs))
    return [
        TrainingItem(latents=latent, conditioning=glyph.caption, batch_key=latent.shape)
        for latent, glyph in zip(latents, glyphs, strict=True)
    ]


def train(model, folder: Path, plan):
    """A run, its network and its checkpoints with shadows."""
    network = build_network(select_targets(model, SPEC, ARCHITECTURE).selected, SPEC, plan.seed)
    run = TrainingRun(
        plan=plan,
        dataset=Dataset(items(40, seed=1)),
        denoiser=PlaygroundDenoiser(model),
        network=network,
        timesteps=TimestepStream(SAMPLING, 40, plan.seed),
        optimization=Optimization(
            OptimizerSpec(), parameter_groups(network, plan.learning_rate), plan.steps
        ),
        device=torch.device("cpu"),
    )
    metadata = adapter_metadata(SPEC, ARCHITECTURE, title=STYLE, created=datetime.now())
    saver = Saver(
        folder,
        "run",
        Checkpointing(save_every_n_steps=plan.steps // 10),
        lambda path, extra: write_adapter(
            path, state_dict_of(network, ARCHITECTURE), metadata | dict(extra)
        ),
        identity=Identity(named={}),
    )
    tensors = encoded(weights_of(network), "comfyui", ARCHITECTURE)
    constants = {key: value for key, value in tensors.items() if key.endswith(".alpha")}
    shadows = Shadows({key: value for key, value in tensors.items() if key not in constants})
    with attached(model, network):
        for step in saved(run.steps(), run, saver):
            shadows.update(step.step)
    shadows.catch_up(run.step)
    path = folder / "run-shadows.safetensors"
    shadows.write(path, constants, metadata)
    return run, network, Checkpoints(files=saver.checkpoints().files, shadows=path)


def finished(steps):
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def candidates(run: Checkpoints):
    """(name, adapter) of everything that is compared; the last checkpoint first."""
    last = plan_average(run, Power(sigma_rel=0.2), first=len(run.files))
    yield "last checkpoint", finished(averaged(last)).lora
    for width in WIDTHS:
        for name, schedule in (
            ("musubi", MusubiPower(sigma_rel=width)),
            ("exact", Power(sigma_rel=width)),
        ):
            yield f"{name} {width}", finished(averaged(plan_average(run, schedule))).lora
        plan = plan_reconstruction(run, width)
        yield f"shadows {width}", finished(reconstructed(run, plan))


def measure(seed: int, options, validator: Validator) -> dict[str, float]:
    """Held-out loss of each candidate of one run."""
    model = load_playground()
    plan = replace(PLAN, steps=options.steps, learning_rate=options.rate, seed=seed)
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        run, network, checkpoints = train(model, Path(folder), plan)
        for name, lora in candidates(checkpoints):
            load_weights(network, read_adapter(lora, layer_shapes(model), ARCHITECTURE))
            with attached(model, network):
                losses[name] = validator.measure(run).loss
    return losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    validator = Validator(items(40, seed=1000), Validation(every_n_steps=1))
    started = time.perf_counter()
    runs = [measure(42 + seed, options, validator) for seed in range(options.seeds)]
    changes = {
        name: [100 * (run[name] / run["last checkpoint"] - 1) for run in runs]
        for run in runs[:1]
        for name in run
    }
    report = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "run": f"{options.steps} steps of 8 at a constant {options.rate:g}, {options.seeds} seeds, "
        f"40 held-out pictures x 8 noise levels, {time.perf_counter() - started:.0f} s in all",
        "loss of the last checkpoint": [round(run["last checkpoint"], 5) for run in runs],
        "change of the held-out loss in %, mean ± standard error": {
            name: f"{statistics.mean(values):+.2f} ± {_standard_error(values):.2f}"
            for name, values in changes.items()
        },
    }
    print(json.dumps(report, indent=1, ensure_ascii=False))


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


if __name__ == "__main__":
    main()
