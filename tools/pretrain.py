"""Makes the playground's weights: `python -m comfyui_braid.engine.playground.pretrain`.

Rectified-flow training on plain glyphs; captions dropped 10 % of the time, weights averaged.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import write_safetensors
from .glyphs import (
    LETTERS,
    decode,
    model_latents,
    pictures_of,
    random_glyph,
    recognise,
)
from .model import WEIGHTS, Flux
from .sampling import embed_letters, sample

CAPTION_DROPOUT = 0.1
EMA_HALF_LIFE_FRACTION = 0.03  # of the whole run
WARMUP_STEPS = 200


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def make_pool(count: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """`count` glyph latents in the model's own scale, and the index of each one's letter."""
    letters = generator.integers(len(LETTERS), size=count)
    glyphs = [random_glyph(generator, LETTERS[i]) for i in letters]
    return model_latents(pictures_of(glyphs)), torch.from_numpy(letters)


def velocity_loss(
    model,
    latents: Tensor,
    letters: Tensor,
    captions: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the velocity at logit-normal times (arXiv 2403.03206)."""
    count = len(latents)
    t = torch.sigmoid(torch.randn(count, generator=generator))
    noise = torch.randn(latents.shape, generator=generator)
    noised = latents + t[:, None, None, None] * (noise - latents)
    dropped = torch.rand(count, generator=generator) < CAPTION_DROPOUT
    caption = torch.where(dropped, len(LETTERS), letters)
    context, pooled = captions
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(noised, t, context[caption], pooled[caption])
    return (velocity.float() - (noise - latents)).square().mean()


def accuracy(model: Flux, seed: int, repeats: int = 3) -> float:
    """Share of samples in which the letter asked for is recognised."""
    letters = LETTERS * repeats
    pictures = decode(sample(model, letters, seed=seed)).numpy()
    return float(
        np.mean([recognise(p)[0] == asked for p, asked in zip(pictures, letters, strict=True)])
    )


def pretrain(
    steps: int, batch: int, learning_rate: float, seed: int, out: Path, pool: int, report_every: int
) -> None:
    torch.manual_seed(seed)
    numpy_generator = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Flux()
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps)
    )
    captions = embed_letters([*LETTERS, ""])
    latents, letters = make_pool(pool, numpy_generator)
    smooth, started = math.nan, time.perf_counter()
    for step in range(1, steps + 1):
        pick = torch.randint(pool, (batch,), generator=generator)
        loss = velocity_loss(model, latents[pick], letters[pick], captions, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        half_life = max(10.0, EMA_HALF_LIFE_FRACTION * step)
        for name, p in model.named_parameters():
            average[name].lerp_(p.detach(), 1 - 0.5 ** (1 / half_life))
        smooth = loss.item() if math.isnan(smooth) else smooth + 0.01 * (loss.item() - smooth)
        if step % report_every == 0 or step == steps:
            averaged = Flux()
            averaged.load_state_dict(average)
            right = accuracy(averaged.eval(), seed=step)
            minutes = (time.perf_counter() - started) / 60
            record = {
                "script": "engine/playground/pretrain.py",
                "steps": step,
                "of": steps,
                "batch": batch,
                "learning_rate": learning_rate,
                "seed": seed,
                "pool": pool,
                "loss": round(smooth, 5),
                "recognised": right,
                "minutes": round(minutes, 1),
                "torch": torch.__version__,
            }
            write_safetensors(
                out,
                {k: v.to(torch.bfloat16) for k, v in average.items()},
                {"record": json.dumps(record), "format": "pt"},
            )
            sys.stdout.write(json.dumps(record) + "\n")
            sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=20000, help="glyphs drawn before training")
    parser.add_argument("--report-every", type=int, default=500)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    pretrain(
        arguments.steps,
        arguments.batch,
        arguments.learning_rate,
        arguments.seed,
        arguments.out,
        arguments.pool,
        arguments.report_every,
    )


if __name__ == "__main__":
    main()
