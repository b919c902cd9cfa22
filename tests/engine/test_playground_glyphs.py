import numpy as np
import pytest
import torch

from comfyui_braid.engine.playground.captions import embed_caption
from comfyui_braid.engine.playground.glyphs import (
    LETTERS,
    STYLES,
    caption_of,
    decode,
    draw_dataset,
    encode,
    pictures_of,
    recognise,
    style_score,
)


@pytest.mark.parametrize("style", STYLES)
def test_decode_inverts_encode_exactly_on_8_bit_pictures(style):
    pictures = pictures_of(draw_dataset(20, style, seed=3))
    latents = encode(pictures)
    assert latents.shape == (20, 16, 16, 16)
    assert torch.equal((decode(latents) * 255).round(), (pictures * 255).round())


@pytest.mark.parametrize("style", STYLES[1:])
def test_each_style_scores_high_on_its_own_pictures_and_low_on_plain_ones(style):
    def mean_score(shown):
        glyphs = draw_dataset(60, shown, seed=5)
        pictures = pictures_of(glyphs).numpy()
        return np.mean(
            [style_score(style, p, g.letter) for p, g in zip(pictures, glyphs, strict=True)]
        )

    assert mean_score(style) > 0.85
    assert mean_score("plain") < 0.12


@pytest.mark.parametrize("style", ["plain", "slanted"])
def test_every_drawn_letter_is_recognised(style):
    glyphs = draw_dataset(40, style, seed=9)
    pictures = pictures_of(glyphs).numpy()
    assert [recognise(p)[0] for p in pictures] == [g.letter for g in glyphs]


def test_a_dataset_is_a_function_of_its_seed():
    assert draw_dataset(12, "outlined", 4) == draw_dataset(12, "outlined", 4)
    assert draw_dataset(12, "outlined", 4) != draw_dataset(12, "outlined", 5)


def test_captions_name_the_letter_only_and_no_two_share_an_embedding():
    contexts = [embed_caption(caption_of(letter))[0] for letter in LETTERS]
    assert len({tuple(c.flatten()[:8].tolist()) for c in contexts}) == len(LETTERS)
    assert embed_caption("")[0].abs().sum() == 0
    with pytest.raises(ValueError, match="unknown caption"):
        embed_caption("a horse")


def test_unknown_style_is_refused_and_names_the_known_ones():
    with pytest.raises(ValueError, match="outlined"):
        draw_dataset(1, "cubist")
