"""What quantising did to each layer: numbers, advice and a chart."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

WORTH_EXEMPTING = 1.15
"""A layer is worth keeping in high precision from this multiple of the median error on."""
MEGABYTE = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """One Linear weight."""

    name: str
    shape: tuple[int, ...]
    quantized: bool
    reason: str
    """Why it was quantised or kept."""
    bytes_before: int
    """In the file."""
    bytes_after: int
    """Codes and scales, or the kept weight as the model holds it."""
    granularity: str | None = None
    """tensor, channel or block; block falls back to channel where the width does not divide."""
    relative_rms: float | None = None
    """‖weight - dequantised‖ / ‖weight‖; None where it was kept or the original is not known."""

    @property
    def error(self) -> float:
        """`relative_rms` of a layer whose original is known."""
        assert self.relative_rms is not None, self.name
        return self.relative_rms

    @property
    def decibel(self) -> float | None:
        """Signal-to-quantisation-noise ratio in dB."""
        return -20 * math.log10(self.relative_rms) if self.relative_rms else None

    def to_json(self) -> dict[str, object]:
        """Plain values for JSON; the error in percent and dB."""
        entry: dict[str, object] = {
            "shape": list(self.shape),
            "quantized": self.quantized,
            "reason": self.reason,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }
        if self.quantized:
            entry["granularity"] = self.granularity
        if self.relative_rms is not None:
            entry["relative_rms_percent"] = round(100 * self.relative_rms, 4)
            entry["decibel"] = None if self.decibel is None else round(self.decibel, 2)
        return entry


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Report:
    """One loaded model."""

    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()
    """Sentences: where the weights come from, what was merged, what was not done and why."""
    other_bytes: int = 0
    """In the file: biases, norms, embeddings and all else that is no Linear weight."""
    other_bytes_after: int | None = None
    """The same in the loaded model; None: as in the file."""

    def as_held(self, layers: Mapping[str, int], total: int) -> "Fp8Report":
        """The report with the bytes that the loaded model holds: `layers` by name of the layer,
        those that are not named as they are; `total` with all else."""
        updated = tuple(
            replace(layer, bytes_after=layers.get(layer.name, layer.bytes_after))
            for layer in self.layers
        )
        others = total - sum(layer.bytes_after for layer in updated)
        return replace(self, layers=updated, other_bytes_after=others)

    @property
    def _others_after(self) -> int:
        return self.other_bytes if self.other_bytes_after is None else self.other_bytes_after

    @property
    def measured(self) -> tuple[LayerReport, ...]:
        """The quantised layers whose error is known, in model order."""
        return tuple(layer for layer in self.layers if layer.relative_rms is not None)

    def worth_exempting(self) -> tuple[LayerReport, ...]:
        """The layers that lost clearly more than the median one, worst first."""
        if not self.measured:
            return ()
        median = statistics.median(layer.error for layer in self.measured)
        worse = [la for la in self.measured if la.error > WORTH_EXEMPTING * median]
        return tuple(sorted(worse, key=lambda layer: -layer.error))

    def to_json(self) -> dict[str, Any]:
        """The whole report as plain values for JSON."""
        quantized = [layer for layer in self.layers if layer.quantized]
        errors = [layer.error for layer in self.measured]
        return {
            "notes": list(self.notes),
            "quantized_layers": len(quantized),
            "kept_layers": len(self.layers) - len(quantized),
            "bytes_before": sum(la.bytes_before for la in self.layers) + self.other_bytes,
            "bytes_after": sum(la.bytes_after for la in self.layers) + self._others_after,
            "median_relative_rms_percent": (
                round(100 * statistics.median(errors), 4) if errors else None
            ),
            "worth_exempting": [
                {
                    "layer": layer.name,
                    "relative_rms_percent": round(100 * layer.error, 4),
                    "costs_megabytes": round(
                        (layer.bytes_before - layer.bytes_after) / MEGABYTE, 3
                    ),
                }
                for layer in self.worth_exempting()
            ],
            "layers": {layer.name: layer.to_json() for layer in self.layers},
        }
