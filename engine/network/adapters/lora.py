"""LoRA, arXiv 2106.09685."""

import torch
from torch import Tensor, nn

from ..layers import LayerShape
from .adapter import Adapter, kaiming_


class LoRA(Adapter):
    """Two thin layers: down to `rank`, up again. For a convolution, down has its kernel."""

    KEYS = {"down": "lora_down.weight", "up": "lora_up.weight"}
    down: nn.Parameter
    up: nn.Parameter

    @staticmethod
    def parameter_shapes(shape: LayerShape, rank: int) -> dict[str, tuple[int, ...]]:
        ones = (1,) * len(shape.kernel)
        return {
            "down": (rank, shape.in_features, *shape.kernel),
            "up": (shape.out_features, rank, *ones),
        }

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """down uniform in ±1/√fan_in (Kaiming with a = √5), up zero, as kohya and musubi."""
        kaiming_(self.down, generator)
        nn.init.zeros_(self.up)

    def delta(self, x: Tensor) -> Tensor:
        return self._raised(self._hidden(x)) * self._scale_in_use

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        if self.shape.kernel or output.dtype != self._arithmetic_dtype or not output.numel():
            return super().add_to(output, x)
        if self._skips_this_call():
            return output
        hidden = self._hidden(x)
        base = output.reshape(-1, self.shape.out_features)
        return self._summed(base, hidden.reshape(-1, hidden.shape[-1])).view_as(output)

    def delta_weight(self) -> Tensor:
        flat = torch.cat([up.flatten(1) @ down.flatten(1) for up, down in self.pairs()])
        return flat.reshape(self._weight_shape) * self.scale

    def pairs(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(up, down) of each row block of the weight, from the top: views of the parameters."""
        return ((self.up, self.down),)

    def _raised(self, hidden: Tensor) -> Tensor:
        """The ranks' activations through the up matrix, not scaled."""
        return self._pointwise(hidden, self._cast("up"))

    def _summed(self, base: Tensor, hidden: Tensor) -> Tensor:
        """base (positions, out) + the scaled delta of hidden (positions, ranks).

        One kernel for scale, matmul and sum: no temporary of the output's size.
        """
        return torch.addmm(base, hidden, self._cast("up").t(), alpha=self._scale_in_use)

    def _hidden(self, x: Tensor) -> Tensor:
        hidden = self._apply_weight(self._input(x), self._cast("down"))
        return self._dropped_ranks(self._dropped_neurons(hidden))

    def _dropped_ranks(self, hidden: Tensor) -> Tensor:
        """One mask over the ranks for each item of the batch, the same at every position."""
        if not self.training or not self.rank_dropout:
            return hidden
        batch, positions = hidden.shape[0], (1,) * (hidden.ndim - 2)
        ranks = self.down.shape[0]
        mask = torch.rand((batch, ranks), device=hidden.device) > self.rank_dropout
        return hidden * (
            mask.view(batch, ranks, *positions)
            if self.shape.kernel
            else mask.view(batch, *positions, ranks)
        )

    @property
    def _scale_in_use(self) -> float:
        """The scale, with the kept ranks scaled up by 1 / (1 - p) while training."""
        return self.scale / (1.0 - self.rank_dropout if self.training else 1.0)

    @property
    def _arithmetic_dtype(self) -> torch.dtype:
        return self.compute_dtype or self.up.dtype
