"""Makes the playground's weights: `make pretrain`, which takes hours and replaces the file.

Rectified-flow training on plain glyphs; captions dropped 10 % of the time, weights averaged.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from comfyui_braid.engine.files import write_safetensors
from comfyui_braid.engine.playground.glyphs import (
    LETTERS,
    decode,
    model_latents,
    pictures_of,
    random_glyph,
    recognise,
)
from comfyui_braid.engine.playground.model import WEIGHTS, Flux
from comfyui_braid.engine.playground.sampling import embed_letters, sample

CAPTION_DROPOUT = 0.1
EMA_HALF_LIFE_FRACTION = 0.03  # of the run so far
WARMUP_STEPS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What decides the weights, up to the rounding of one torch and machine."""

    steps: int = 8000
    batch: int = 32
    learning_rate: float = 2e-3
    seed: int = 0
    pool: int = 20000
    """Glyphs drawn before training."""


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


def update_average(average: dict[str, Tensor], model: Flux, step: int) -> None:
    """Move the average towards the weights; its half-life is a share of the run so far."""
    half_life = max(10.0, EMA_HALF_LIFE_FRACTION * step)
    for name, p in model.named_parameters():
        average[name].lerp_(p.detach(), 1 - 0.5 ** (1 / half_life))


def averaged(average: dict[str, Tensor]) -> Flux:
    """A model for sampling with the averaged weights."""
    made = Flux()
    made.load_state_dict(average)
    return made.eval()


def report(recipe: Recipe, out: Path, average: dict[str, Tensor], figures: dict) -> None:
    """Write the weights so far with a record of their making, and print that record."""
    made = asdict(recipe)
    record = {"script": "tools/pretrain.py", "of": made.pop("steps"), **made, **figures}
    record["torch"] = torch.__version__
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in average.items()}
    write_safetensors(out, weights, {"record": json.dumps(record), "format": "pt"})
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def pretrain(recipe: Recipe, out: Path, report_every: int) -> None:
    """Train, and write `out` every `report_every` steps and at the end."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = Flux()
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, recipe.steps)
    )
    captions = embed_letters([*LETTERS, ""])
    latents, letters = make_pool(recipe.pool, np.random.default_rng(recipe.seed))
    smooth, started = math.nan, time.perf_counter()
    for step in range(1, recipe.steps + 1):
        pick = torch.randint(recipe.pool, (recipe.batch,), generator=generator)
        loss = velocity_loss(model, latents[pick], letters[pick], captions, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        update_average(average, model, step)
        smooth = loss.item() if math.isnan(smooth) else smooth + 0.01 * (loss.item() - smooth)
        if step % report_every == 0 or step == recipe.steps:
            figures = {
                "steps": step,
                "loss": round(smooth, 5),
                "recognised": accuracy(averaged(average), seed=step),
                "minutes": round((time.perf_counter() - started) / 60, 1),
            }
            report(recipe, out, average, figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in fields(Recipe):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), default=field.default)
    parser.add_argument("--report-every", type=int, default=500)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    given = vars(parser.parse_args())
    out, report_every = given.pop("out"), given.pop("report_every")
    pretrain(Recipe(**given), out, report_every)


if __name__ == "__main__":
    main()
