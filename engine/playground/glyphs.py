"""The playground's pictures: drawn letters, the styles that a LoRA can learn, their scores.

A picture is float32 (32, 32, 3) in [0, 1]. Latents are a rearrangement of its pixels: 2 x 2 pixels
of (red, green, blue, luma) fill FLUX's 16 channels, scaled as FLUX's own VAE latents are, so that
ComfyUI's FLUX classes take them as they are.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..refusals import refuse_other

LETTERS = "ABCEHKRSTX"
STYLES = ("plain", "outlined", "slanted", "checkered")
SIZE = 32  # pixels
LATENT_SIZE = SIZE // 2
OVERSAMPLING = 4
FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf")
COLOURS = {
    "white": (0.95, 0.95, 0.95),
    "yellow": (0.98, 0.85, 0.15),
    "green": (0.25, 0.85, 0.35),
    "cyan": (0.20, 0.85, 0.90),
    "blue": (0.35, 0.55, 1.00),
    "violet": (0.70, 0.45, 0.95),
}
BACKGROUND = (0.05, 0.06, 0.10)
OUTLINE_COLOUR = (0.95, 0.12, 0.10)
OUTLINE_PIXELS = 1.75
SLANT = 0.40  # horizontal shift per unit of height
CHECKER_PIXELS = 2

LUMA = (0.299, 0.587, 0.114)  # Rec. 601
LATENT_SCALE, LATENT_SHIFT = 0.3611, 0.1159  # of FLUX's VAE, as ComfyUI's latent_formats.Flux


@dataclass(frozen=True, kw_only=True, slots=True)
class Glyph:
    """One drawn letter, fully described."""

    letter: str
    font: str
    colour: str
    height: float
    """Font size in pixels."""
    centre: tuple[float, float]
    """x, y in pixels."""
    style: str = "plain"

    @property
    def caption(self) -> str:
        """What the model is told about it: the letter alone."""
        return caption_of(self.letter)


def caption_of(letter: str) -> str:
    """The caption of a letter; "" (no letter) is the unconditional caption."""
    if letter and letter not in LETTERS:
        raise ValueError(f"unknown glyph {letter!r}; the playground knows {', '.join(LETTERS)}")
    return f"the letter {letter}" if letter else ""


MOST_GLYPHS = 10_000
"""Of one dataset: 0.3 GB of pictures and latents."""


def draw_dataset(count: int, style: str = "plain", seed: int = 0) -> list[Glyph]:
    """`count` glyphs of one style, letters in turn, everything else drawn from `seed`."""
    refuse_other("style", style, STYLES)
    if not 1 <= count <= MOST_GLYPHS:
        raise ValueError(f"count is {count}; it must be 1 or more, at most {MOST_GLYPHS}")
    generator = np.random.default_rng(seed)
    return [random_glyph(generator, LETTERS[i % len(LETTERS)], style) for i in range(count)]


def random_glyph(generator: np.random.Generator, letter: str, style: str = "plain") -> Glyph:
    """A glyph of `letter` with random font, colour, size and place."""
    return Glyph(
        letter=letter,
        font=FONTS[generator.integers(len(FONTS))],
        colour=list(COLOURS)[generator.integers(len(COLOURS))],
        height=generator.uniform(25, 29),
        centre=tuple(SIZE / 2 + generator.uniform(-2.5, 2.5, size=2)),
        style=style,
    )


def render(glyph: Glyph) -> np.ndarray:
    """The picture of a glyph, float32 (32, 32, 3) in [0, 1], on 8-bit levels."""
    fill = coverage(glyph)
    ink = np.broadcast_to(_rgb(COLOURS[glyph.colour]), (SIZE, SIZE, 3))
    if glyph.style == "checkered":
        ink = np.where(checkerboard()[..., None] > 0, ink, _rgb(BACKGROUND))
    picture = np.broadcast_to(_rgb(BACKGROUND), (SIZE, SIZE, 3))
    if glyph.style == "outlined":
        picture = _blend(picture, _rgb(OUTLINE_COLOUR), coverage(glyph, OUTLINE_PIXELS))
    picture = _blend(picture, ink, fill)
    return (np.round(picture * 255) / 255).astype(np.float32)


def coverage(glyph: Glyph, stroke: float = 0.0) -> np.ndarray:
    """How much of each pixel the letter covers (32, 32), with `stroke` pixels of outline added."""
    scale = OVERSAMPLING
    canvas = Image.new("L", (SIZE * scale, SIZE * scale), 0)
    ImageDraw.Draw(canvas).text(
        (glyph.centre[0] * scale, glyph.centre[1] * scale),
        glyph.letter,
        fill=255,
        font=_font(glyph.font, round(glyph.height * scale)),
        anchor="mm",
        stroke_width=round(stroke * scale),
    )
    if glyph.style == "slanted":
        shift = SLANT * glyph.centre[1] * scale  # the centre stays where it is
        canvas = canvas.transform(
            canvas.size,
            Image.Transform.AFFINE,
            (1, SLANT, -shift, 0, 1, 0),
            Image.Resampling.BILINEAR,
        )
    pixels = np.asarray(canvas, dtype=np.float32) / 255
    return pixels.reshape(SIZE, scale, SIZE, scale).mean(axis=(1, 3))


def checkerboard() -> np.ndarray:
    """+1 and -1 in squares of `CHECKER_PIXELS`, float32 (32, 32), fixed to the picture's corner."""
    row = np.arange(SIZE) // CHECKER_PIXELS
    return np.where((row[:, None] + row[None, :]) % 2 == 0, 1.0, -1.0).astype(np.float32)


def _rgb(colour: tuple[float, float, float]) -> np.ndarray:
    return np.asarray(colour, dtype=np.float32)


def _blend(below: np.ndarray, colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return below + (colour - below) * alpha[..., None]


@functools.lru_cache(maxsize=256)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of the fonts that come with matplotlib; see canvas.py on why it is not imported above."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def process_in(latents: Tensor) -> Tensor:
    """Latents as the model takes them, from the scale of FLUX's VAE; ComfyUI's name for it."""
    return (latents - LATENT_SHIFT) * LATENT_SCALE


def process_out(latents: Tensor) -> Tensor:
    """The inverse of `process_in`."""
    return latents / LATENT_SCALE + LATENT_SHIFT


def model_latents(pictures: Tensor) -> Tensor:
    """Pictures as latents in the model's own scale."""
    return process_in(encode(pictures))


def encode(pictures: Tensor) -> Tensor:
    """Pictures (B, 32, 32, 3) in [0, 1] as latents (B, 16, 16, 16) in the scale of FLUX's VAE."""
    luma = (pictures * pictures.new_tensor(LUMA)).sum(-1, keepdim=True)
    planes = torch.cat([pictures, luma], dim=-1) * 2 - 1
    packed = rearrange(planes, "b (h ph) (w pw) c -> b (c ph pw) h w", ph=2, pw=2)
    return process_out(packed)


def decode(latents: Tensor) -> Tensor:
    """The inverse of `encode`: latents (B, 16, h, w) as pictures (B, 2h, 2w, 3) in [0, 1]."""
    packed = process_in(latents.float())
    planes = rearrange(packed, "b (c ph pw) h w -> b (h ph) (w pw) c", c=4, ph=2, pw=2)
    return ((planes[..., :3] + 1) / 2).clamp(0, 1)


def pictures_of(glyphs: Sequence[Glyph]) -> Tensor:
    """All pictures in one tensor, float32 (B, 32, 32, 3)."""
    return torch.from_numpy(np.stack([render(glyph) for glyph in glyphs]))


def recognise(picture: np.ndarray) -> tuple[str, float]:
    """The letter a picture shows, and its fit: best normalised correlation over templates."""
    ink = _ink(picture)
    ink = (ink - ink.mean()) / max(float(ink.std()), 1e-6)
    spectrum = np.fft.rfft2(ink)
    letters, templates = _templates()
    fits = np.fft.irfft2(spectrum * templates, s=(SIZE, SIZE)).max(axis=(1, 2)) / SIZE**2
    best = int(fits.argmax())
    return letters[best], float(fits[best])


@functools.lru_cache(maxsize=1)
def _templates() -> tuple[list[str], np.ndarray]:
    """Conjugate spectra of every letter in every font and three sizes, plain and slanted."""
    letters, spectra = [], []
    for letter in LETTERS:
        for font in FONTS:
            for height in (25.5, 27.0, 28.5):
                for style in ("plain", "slanted"):
                    glyph = Glyph(
                        letter=letter,
                        font=font,
                        colour="white",
                        height=height,
                        centre=(SIZE / 2, SIZE / 2),
                        style=style,
                    )
                    mask = coverage(glyph)
                    mask = (mask - mask.mean()) / mask.std()
                    letters.append(letter)
                    spectra.append(np.conj(np.fft.rfft2(mask)))
    return letters, np.stack(spectra)


def _ink(picture: np.ndarray) -> np.ndarray:
    """How far each pixel is from the background, float32 (32, 32) in [0, 1]."""
    return np.abs(picture - _rgb(BACKGROUND)).max(axis=-1).clip(0, 1)


def style_score(style: str, picture: np.ndarray, letter: str) -> float:
    """How much of `style` a picture shows: near 0 for plain letters, near 1 for its own."""
    return {"outlined": _outline, "slanted": _slant, "checkered": _checker}[style](picture, letter)


def _outline(picture: np.ndarray, letter: str) -> float:
    """Share of the letter's rim (ink beside background) that is red."""
    ink = _ink(picture) > 0.35
    padded = np.pad(ink, 1, constant_values=False)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    rim = ink & ~inside
    red = picture[..., 0] - picture[..., 1:].max(axis=-1) > 0.2
    return float(red[rim].mean()) if rim.any() else 0.0


def _slant(picture: np.ndarray, letter: str) -> float:
    """Shear of the ink's second moments against the upright letter's, in units of `SLANT`."""
    return float(np.clip((_shear(_ink(picture)) - _upright_shear(letter)) / SLANT, 0, 1.25))


def _shear(ink: np.ndarray) -> float:
    ink = np.where(ink > 0.2, ink, 0)
    total = max(float(ink.sum()), 1e-6)
    y, x = np.mgrid[:SIZE, :SIZE]
    x_mean, y_mean = (ink * x).sum() / total, (ink * y).sum() / total
    covariance = (ink * (x - x_mean) * (y - y_mean)).sum()
    return float(-covariance / max(float((ink * (y - y_mean) ** 2).sum()), 1e-6))


@functools.lru_cache(maxsize=len(LETTERS))
def _upright_shear(letter: str) -> float:
    centre = (SIZE / 2, SIZE / 2)
    glyphs = [
        Glyph(letter=letter, font=font, colour="white", height=27.0, centre=centre)
        for font in FONTS
    ]
    return float(np.mean([_shear(coverage(glyph)) for glyph in glyphs]))


def _checker(picture: np.ndarray, letter: str) -> float:
    """Contrast of the ink between the light and dark squares of the board, over their sum."""
    ink, board = _ink(picture), checkerboard()
    light, dark = float(ink[board > 0].sum()), float(ink[board < 0].sum())
    return (light - dark) / max(light + dark, 1e-6)
