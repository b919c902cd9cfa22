"""What logging, history, checkpoints and EMA shadows add to a training step.

    python tests/bench/bench_training_overhead.py [--steps 60]

One process, one thread, CPU seconds of the whole process (TensorBoard's writer thread included).
Two runs of the playground FLUX (2.3 million parameters, batch 4, rank 16 on every layer) advance in
turn, step by step: one bare, one with TensorBoard at every step, five EMA shadows updated every 10
steps, adapter and state saved every 100 steps. Medians over the steps compare the two; each part is
also timed by itself, which is finer than their difference.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "engine")]
import conftest  # noqa: E402, F401  registers the package
import torch  # noqa: E402

from comfyui_braid.engine.ema.shadows import Shadows  # noqa: E402
from comfyui_braid.engine.files import write_safetensors  # noqa: E402
from comfyui_braid.engine.network.architectures import architecture_of  # noqa: E402
from comfyui_braid.engine.network.attach import (  # noqa: E402
    attached,
    build_network,
    parameter_groups,
)
from comfyui_braid.engine.network.spec import NetworkSpec  # noqa: E402
from comfyui_braid.engine.network.targets import select_targets  # noqa: E402
from comfyui_braid.engine.playground.denoiser import PlaygroundDenoiser  # noqa: E402
from comfyui_braid.engine.playground.glyphs import draw_dataset, encode, pictures_of  # noqa: E402
from comfyui_braid.engine.playground.model import Flux  # noqa: E402
from comfyui_braid.engine.timesteps.sampling import TimestepSampling  # noqa: E402
from comfyui_braid.engine.timesteps.stream import TimestepStream  # noqa: E402
from comfyui_braid.engine.training.dataset import Dataset, TrainingItem  # noqa: E402
from comfyui_braid.engine.training.figure import draw_history  # noqa: E402
from comfyui_braid.engine.training.logs import open_logs  # noqa: E402
from comfyui_braid.engine.training.loop import TrainingRun  # noqa: E402
from comfyui_braid.engine.training.optimizers.optimizer import Optimization, OptimizerSpec  # noqa: E402
from comfyui_braid.engine.training.options import Checkpointing, TrainingLog  # noqa: E402
from comfyui_braid.engine.training.plan import TrainingPlan  # noqa: E402
from comfyui_braid.engine.training.states.identity import Identity  # noqa: E402
from comfyui_braid.engine.training.states.saving import Saver  # noqa: E402

SAVE_EVERY = 100


def make_run(steps: int):
    torch.manual_seed(0)
    model = Flux().requires_grad_(False)
    spec = NetworkSpec(rank=16, alpha=16, loraplus_lr_ratio=4)
    targets = select_targets(model, spec, architecture_of({"image_model": "flux"}))
    network = build_network(targets.selected, spec, seed=1)
    plan = TrainingPlan(steps=steps, batch_size=4, seed=1, mixed_precision="no")
    glyphs = draw_dataset(40, "outlined", seed=1)
    items = [
        TrainingItem(latents=latent, conditioning=glyph.caption, batch_key=latent.shape)
        for latent, glyph in zip(encode(pictures_of(glyphs)), glyphs, strict=True)
    ]
    run = TrainingRun(
        plan=plan,
        dataset=Dataset(items),
        denoiser=PlaygroundDenoiser(model),
        network=network,
        timesteps=TimestepStream(TimestepSampling(mode="sigmoid"), len(items), plan.seed),
        optimization=Optimization(
            OptimizerSpec(lr_scheduler="cosine"), parameter_groups(network, 1e-3), steps
        ),
        device=torch.device("cpu"),
    )
    return run, model


class Watch:
    """CPU seconds by part."""

    def __init__(self):
        self.seconds = {}

    def call(self, part, function, *args):
        started = time.process_time()
        result = function(*args)
        self.seconds.setdefault(part, []).append(time.process_time() - started)
        return result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    count = parser.parse_args().steps
    torch.set_num_threads(1)
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        (bare, bare_model), (full, full_model) = make_run(count), make_run(count)
        logs = open_logs(
            TrainingLog(log_with="tensorboard", logging_dir=Path(folder)), {"steps": count}, full
        )
        shadows = Shadows({k: p.detach() for k, p in full.network.named_parameters()})
        saver = Saver(
            Path(folder),
            "lora",
            Checkpointing(save_every_n_steps=SAVE_EVERY, save_state=True),
            lambda path, extra: write_safetensors(path, full.network.state_dict(), extra),
            identity=Identity(named={}),
        )
        with attached(bare_model, bare.network), attached(full_model, full.network):
            bare_steps, full_steps = bare.steps(), full.steps()
            for _ in range(count):
                watch.call("bare step", next, bare_steps)
                started = time.process_time()
                step = watch.call("step with history", next, full_steps)
                watch.call("shadows", shadows.update, step.step)
                watch.call("is a save due", saver.is_due, step.step)
                watch.call("log", logs.record)
                watch.seconds.setdefault("full step", []).append(time.process_time() - started)
            watch.call("save adapter and state", saver.save_step, full)
            for _ in range(3):
                watch.call("picture", lambda: draw_history(full.history, steps=count))
        logs.close()
    report(watch.seconds, count)


def report(seconds: dict, count: int):
    median = {part: statistics.median(values[1:] or values) for part, values in seconds.items()}
    mean = {part: statistics.fmean(values[1:] or values) for part, values in seconds.items()}
    step = median["bare step"]
    print(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}")
    print(f"bare step {1e3 * step:.1f} ms CPU, {count} steps of each run, in turn")
    print(f"full / bare, medians: {median['full step'] / step:.3f}")
    print("share of a bare step, each part by itself:")
    log, shadow = mean["log"] / step, mean["shadows"] / step
    save = mean["save adapter and state"] / (SAVE_EVERY * step)
    print(f"  TensorBoard at every step      {100 * log:.2f} %")
    print(f"  adapter and state every {SAVE_EVERY}    {100 * save:.2f} %")
    print(f"  five shadows, every 10 steps   {100 * shadow:.2f} %")
    print(f"  all together                   {100 * (log + shadow + save):.2f} %")
    print(f"  a picture {1e3 * mean['picture']:.0f} ms; the trainer draws at most 1 % of the time")


if __name__ == "__main__":
    main()
