"""A small FLUX (Black Forest Labs, 2024) in plain torch, with the names of ComfyUI's class.

    image tokens + text tokens -> double-stream blocks -> single-stream blocks -> velocity

The playground runs its weights without ComfyUI; tests/comfyui shows both give the same output.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights" / "playground.safetensors"
PATCH = 2  # latent cells per token side


@dataclass(frozen=True, kw_only=True, slots=True)
class FluxShape:
    """The widths and depths of a FLUX."""

    hidden_size: int = 128
    depth: int = 2
    """Double-stream blocks."""
    depth_single_blocks: int = 4
    context_dim: int = 64
    pooled_dim: int = 32
    channels: int = 16
    mlp_ratio: int = 4
    rope_axes: tuple[int, ...] = (16, 56, 56)
    """Head width per axis (index, row, column); their sum is the head width."""
    rope_theta: int = 10000

    @property
    def heads(self) -> int:
        return self.hidden_size // sum(self.rope_axes)


class Flux(nn.Module):
    """Predicts the velocity noise - latents from noised latents, time and a caption."""

    def __init__(self, shape: FluxShape = FluxShape()):
        super().__init__()
        self.shape = shape
        width, token = shape.hidden_size, shape.channels * PATCH * PATCH
        self.img_in = nn.Linear(token, width)
        self.txt_in = nn.Linear(shape.context_dim, width)
        self.time_in = Embedder(256, width)
        self.vector_in = Embedder(shape.pooled_dim, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(shape) for _ in range(shape.depth))
        self.single_blocks = nn.ModuleList(
            SingleBlock(shape) for _ in range(shape.depth_single_blocks)
        )
        self.final_layer = FinalLayer(width, token)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """x (B, 16, H, W), t (B,) in [0, 1] with 1 = noise, context (B, L, D), pooled (B, P)."""
        rows, columns = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        image = rearrange(x, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=PATCH, pw=PATCH)
        image, text = self.img_in(image), self.txt_in(context)
        vector = self.time_in(time_embedding(t).to(x.dtype)) + self.vector_in(pooled)
        rotation = rope(positions(text.shape[1], rows, columns, x.device), self.shape)
        for block in self.double_blocks:
            image, text = block(image, text, vector, rotation)
        tokens = torch.cat([text, image], dim=1)
        for block in self.single_blocks:
            tokens = block(tokens, vector, rotation)
        velocity = self.final_layer(tokens[:, text.shape[1] :], vector)
        return rearrange(
            velocity, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=rows, ph=PATCH, pw=PATCH
        )


class DoubleBlock(nn.Module):
    """Image and text keep their own weights and attend jointly."""

    def __init__(self, shape: FluxShape):
        super().__init__()
        self.img_mod = Modulation(shape.hidden_size, 6)
        self.img_attn = SelfAttention(shape)
        self.img_mlp = mlp(shape)
        self.txt_mod = Modulation(shape.hidden_size, 6)
        self.txt_attn = SelfAttention(shape)
        self.txt_mlp = mlp(shape)

    def forward(
        self, image: Tensor, text: Tensor, vector: Tensor, rotation: Tensor
    ) -> tuple[Tensor, Tensor]:
        i_shift, i_scale, i_gate, i_shift2, i_scale2, i_gate2 = self.img_mod(vector)
        t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = self.txt_mod(vector)
        image_qkv = self.img_attn.heads(modulated(image, i_shift, i_scale))
        text_qkv = self.txt_attn.heads(modulated(text, t_shift, t_scale))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text_qkv, image_qkv, strict=True))
        mixed = attention(q, k, v, rotation)
        text_mixed, image_mixed = mixed[:, : text.shape[1]], mixed[:, text.shape[1] :]
        image = image + i_gate * self.img_attn.proj(image_mixed)
        image = image + i_gate2 * self.img_mlp(modulated(image, i_shift2, i_scale2))
        text = text + t_gate * self.txt_attn.proj(text_mixed)
        text = text + t_gate2 * self.txt_mlp(modulated(text, t_shift2, t_scale2))
        return image, text


class SingleBlock(nn.Module):
    """Attention and MLP in parallel over all tokens (arXiv 2302.05442)."""

    def __init__(self, shape: FluxShape):
        super().__init__()
        width = shape.hidden_size
        self.width, self.num_heads = width, shape.heads
        self.linear1 = nn.Linear(width, width * (3 + shape.mlp_ratio))
        self.linear2 = nn.Linear(width * (1 + shape.mlp_ratio), width)
        self.norm = QKNorm(sum(shape.rope_axes))
        self.modulation = Modulation(width, 3)

    def forward(self, tokens: Tensor, vector: Tensor, rotation: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(vector)
        joint = self.linear1(modulated(tokens, shift, scale))
        qkv, hidden = joint[..., : 3 * self.width], joint[..., 3 * self.width :]
        q, k, v = split_heads(qkv, self.num_heads)
        q, k = self.norm(q, k)
        mixed = attention(q, k, v, rotation)
        hidden = F.gelu(hidden, approximate="tanh")
        return tokens + gate * self.linear2(torch.cat([mixed, hidden], dim=-1))


class FinalLayer(nn.Module):
    def __init__(self, width: int, token: int):
        super().__init__()
        self.linear = nn.Linear(width, token)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, tokens: Tensor, vector: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vector)[:, None].chunk(2, dim=-1)
        return self.linear(modulated(tokens, shift, scale))


class Embedder(nn.Module):
    def __init__(self, features: int, width: int):
        super().__init__()
        self.in_layer = nn.Linear(features, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """Shifts, scales and gates of a block, each (B, 1, D), from the time and caption vector."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.count = count
        self.lin = nn.Linear(width, count * width)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vector))[:, None].chunk(self.count, dim=-1)


class QKNorm(nn.Module):
    def __init__(self, head_width: int):
        super().__init__()
        self.query_norm = nn.RMSNorm(head_width)
        self.key_norm = nn.RMSNorm(head_width)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class SelfAttention(nn.Module):
    def __init__(self, shape: FluxShape):
        super().__init__()
        self.num_heads = shape.heads
        self.qkv = nn.Linear(shape.hidden_size, 3 * shape.hidden_size)
        self.norm = QKNorm(sum(shape.rope_axes))
        self.proj = nn.Linear(shape.hidden_size, shape.hidden_size)

    def heads(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_heads(self.qkv(tokens), self.num_heads)
        return *self.norm(q, k), v


def mlp(shape: FluxShape) -> nn.Sequential:
    width = shape.hidden_size
    return nn.Sequential(
        nn.Linear(width, width * shape.mlp_ratio),
        nn.GELU(approximate="tanh"),
        nn.Linear(width * shape.mlp_ratio, width),
    )


def modulated(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm: (1 + scale) * norm(x) + shift."""
    return (1 + scale) * F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) + shift


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = rearrange(qkv, "b l (k h d) -> k b h l d", k=3, h=heads).unbind(0)
    return q, k, v


def attention(q: Tensor, k: Tensor, v: Tensor, rotation: Tensor) -> Tensor:
    """Rotary attention over (B, heads, L, D), as (B, L, heads * D)."""
    mixed = F.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v)
    return rearrange(mixed, "b h l d -> b l (h d)")


def time_embedding(t: Tensor, features: int = 256, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of 1000 t, cosines first: (B,) -> (B, features)."""
    half = features // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angle = (1000.0 * t.float())[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def positions(text_tokens: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """(index, row, column) of every token, text first and at the origin: (L, 3)."""
    image = torch.zeros(rows, columns, 3, device=device)
    image[..., 1] = torch.arange(rows, device=device)[:, None]
    image[..., 2] = torch.arange(columns, device=device)
    return torch.cat([torch.zeros(text_tokens, 3, device=device), image.flatten(0, 1)])


def rope(position: Tensor, shape: FluxShape) -> Tensor:
    """Rotations of RoFormer per axis as unit complex numbers (L, head width / 2)."""
    angles = []
    for axis, width in enumerate(shape.rope_axes):
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device=position.device) / width
        angles.append(position[:, axis, None].double() / shape.rope_theta**exponent)
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x (B, heads, L, D) by rotation (L, D / 2, [cos, sin])."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = rotation[..., 0], rotation[..., 1]
    a, b = pairs[..., 0], pairs[..., 1]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)


def load_playground(path: Path = WEIGHTS) -> Flux:
    """The trained playground model, float32, in eval mode, on the CPU."""
    model = Flux()
    state = safetensors.torch.load_file(path)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model.eval().requires_grad_(False)


def read_record(path: Path = WEIGHTS) -> dict[str, Any]:
    """How the weights were made: steps, data, loss, versions."""
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["record"])
