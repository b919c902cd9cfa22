"""Chapters 1 and 2: which noise levels are trained, and a LoRA that learns a style."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from ...checkpoints import Checkpoints
from ...network.adapter_file import state_dict_of, write_adapter
from ...network.architectures import architecture_of
from ...network.attach import Network, attached, build_network, parameter_groups
from ...network.metadata import adapter_metadata
from ...network.spec import NetworkSpec
from ...network.targets import TargetReport, select_targets
from ...timesteps.figure import draw_preview
from ...timesteps.preview import PreviewSettings, measure_preview
from ...timesteps.sampling import TimestepSampling
from ...timesteps.stream import TimestepStream
from ...training.dataset import Dataset, TrainingItem
from ...training.figure import draw_history
from ...training.loop import TrainingRun
from ...training.optimizers.optimizer import Optimization, OptimizerSpec
from ...training.options import Checkpointing
from ...training.plan import TrainingPlan
from ...training.states.identity import Identity
from ...training.states.saving import Saver, free_folder, saved
from ..denoiser import PlaygroundDenoiser
from ..glyphs import (
    LETTERS,
    decode,
    draw_dataset,
    model_latents,
    pictures_of,
    recognise,
    style_score,
)
from ..model import Flux
from ..sampling import sample
from .report import Picture, Section, tiled

Step = TypeVar("Step")

STYLE = "outlined"
SEEDS = (11, 12)
SAMPLING = TimestepSampling(mode="sigmoid", num_timestep_buckets=8)
SPEC = NetworkSpec(rank=16, alpha=16, loraplus_lr_ratio=4.0)
PLAN = TrainingPlan(
    steps=300,
    batch_size=8,
    learning_rate=2e-3,
    seed=42,
    mixed_precision="no",
    gradient_checkpointing=False,
    output_name=STYLE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A finished run of the demo."""

    network: Network
    targets: TargetReport
    checkpoints: Checkpoints
    run: TrainingRun
    seconds: float


def noise_levels() -> Section:
    preview = measure_preview(PreviewSettings(sampling=SAMPLING, width=32, height=32))
    return Section(
        title="Which noise levels are trained",
        text="The distribution of the noise level t (1 = pure noise) and a draw of it through the "
        "trainer's own call path, in eight buckets per epoch.",
        pictures=[Picture(pixels=draw_preview(preview), caption="Planned and drawn t.")],
    )


def train(model: Flux, folder: Path) -> Trained:
    """Train the style on forty pictures, keeping ten checkpoints."""
    started = time.perf_counter()
    targets = select_targets(model, SPEC, architecture_of({"image_model": "flux"}))
    network = build_network(targets.selected, SPEC, PLAN.seed)
    dataset = Dataset(style_items(40, seed=1))
    run = TrainingRun(
        plan=PLAN,
        dataset=dataset,
        denoiser=PlaygroundDenoiser(model),
        network=network,
        timesteps=TimestepStream(SAMPLING, len(dataset), PLAN.seed),
        optimization=Optimization(
            OptimizerSpec(), parameter_groups(network, PLAN.learning_rate), PLAN.steps
        ),
        device=torch.device("cpu"),
    )
    saver = Saver(
        free_folder(folder, STYLE),
        STYLE,
        Checkpointing(save_every_n_steps=PLAN.steps // 10),
        lambda path, extra: write_adapter(
            path,
            state_dict_of(network, targets.architecture),
            adapter_metadata(SPEC, targets.architecture, title=STYLE, created=datetime.now())
            | dict(extra),
        ),
        identity=Identity(named={}),
    )
    with attached(model, network):
        for _ in shown(saved(run.steps(), run, saver), PLAN.steps):
            pass
        saver.save_final(run)
    return Trained(
        network=network.eval(),
        targets=targets,
        checkpoints=saver.checkpoints(),
        run=run,
        seconds=time.perf_counter() - started,
    )


def training_section(model: Flux, trained: Trained) -> Section:
    plain = sampled(model)
    with attached(model, trained.network):
        learned = sampled(model)
    losses = trained.run.history.losses
    curve = draw_history(trained.run.history, steps=PLAN.steps, caption="training loss")
    taught = pictures_of(draw_dataset(10, STYLE, seed=1)).numpy()
    return Section(
        title="A LoRA learns a style",
        text=f"{len(trained.targets.selected)} layers, {trained.targets.parameters:,} parameters, "
        f"rank {SPEC.rank}, LoRA+ ratio {SPEC.loraplus_lr_ratio:g}; {PLAN.steps} steps of "
        f"{PLAN.batch_size} pictures in {trained.seconds:.0f} s.",
        pictures=[
            Picture(pixels=tiled([taught], 6), caption="Training pictures: outlined in red."),
            Picture(pixels=curve, caption="Loss of each step."),
            Picture(
                pixels=tiled([*plain, *learned], 6),
                caption="The same noise without (above) and with the LoRA (below).",
            ),
        ],
        table=[
            ["", "without LoRA", "with LoRA"],
            [f"style score ({STYLE}), 0 to 1", *(f"{style(p):.2f}" for p in (plain, learned))],
            ["letters recognised", *(f"{recognised(p):.0%}" for p in (plain, learned))],
            [
                "loss, first and last 30 steps",
                *(f"{np.mean(x):.4f}" for x in (losses[:30], losses[-30:])),
            ],
        ],
    )


def sampled(model: Flux) -> list[np.ndarray]:
    """All letters, one row (10, 32, 32, 3) per seed."""
    return [decode(sample(model, LETTERS, seed=seed)).numpy() for seed in SEEDS]


def style(rows: list[np.ndarray]) -> float:
    """Mean style score over rows of letters."""
    scores = [style_score(STYLE, p, c) for row in rows for p, c in zip(row, LETTERS, strict=True)]
    return float(np.mean(scores))


def recognised(rows: list[np.ndarray]) -> float:
    """Share of letters that are read as what was asked for."""
    hits = [recognise(p)[0] == c for row in rows for p, c in zip(row, LETTERS, strict=True)]
    return float(np.mean(hits))


def style_items(count: int, seed: int) -> list[TrainingItem]:
    """`count` pictures of the style with their captions, ready to train or to measure on."""
    glyphs = draw_dataset(count, STYLE, seed)
    latents = model_latents(pictures_of(glyphs))
    return [
        TrainingItem(latents=latent, conditioning=glyph.caption, batch_key=latent.shape)
        for latent, glyph in zip(latents, glyphs, strict=True)
    ]


def shown(steps: Iterator[Step], total: int) -> Iterator[Step]:
    """Pass steps through, showing progress on one terminal line."""
    for done, step in enumerate(steps, start=1):
        if done % 10 == 0 or done == total:
            sys.stdout.write(f"\r  {done}/{total}")
            sys.stdout.flush()
        yield step
    sys.stdout.write("\n")
