"""Nodes of Braid/timesteps: choose the noise levels of a run, and see them."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ...engine.canvas import as_image
from ...engine.texts import Text, told
from ...engine.timesteps.figure import draw_preview, subtitle, title
from ...engine.timesteps.preview import (
    MAX_BINS,
    MAX_PIXELS,
    MAX_SAMPLES,
    DrawnRun,
    Preview,
    PreviewSettings,
    measure_preview,
    measure_run,
)
from ...engine.timesteps.sampling import TimestepSampling
from .. import sockets
from ..live_node import LiveNode
from .fields import MODE_FIELDS

LIVE_SAMPLES = 200_000
"""Draws of the live chart, a few hundredths of a second."""


def build_sampling(
    timestep_sampling: Mapping[str, Any] | str,
    min_timestep: int,
    max_timestep: int,
    preserve_distribution_shape: bool,
    num_timestep_buckets: int,
) -> TimestepSampling:
    """The node's widgets as the engine's settings; ValueError says what is wrong."""
    chosen = timestep_sampling
    mode = {"timestep_sampling": chosen} if isinstance(chosen, str) else dict(chosen)
    return TimestepSampling(
        mode=mode.pop("timestep_sampling"),
        min_timestep=min_timestep,
        max_timestep=max_timestep,
        preserve_distribution_shape=preserve_distribution_shape,
        num_timestep_buckets=num_timestep_buckets,
        **mode,
    )


class BraidTimestepSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidTimestepSampling",
            display_name="Timestep Sampling",
            category=sockets.TIMESTEPS,
            description="Which noise levels a run trains on: style lives at high noise, structure "
            "in the middle, detail at low noise. t = 1 is pure noise in every mode.",
            search_aliases=["timesteps", "flow shift", "noise level", "logsnr", "style friendly"],
            inputs=[
                io.DynamicCombo.Input(
                    "timestep_sampling",
                    options=[
                        io.DynamicCombo.Option(key, inputs) for key, inputs in MODE_FIELDS.items()
                    ],
                    tooltip="The distribution of the noise level, by musubi-tuner's names. sigma: "
                    "flat, or what weighting_scheme says. uniform: flat. sigmoid: a bell. shift: a "
                    "bell moved by discrete_flow_shift. flux/qwen/flux2/krea2/ideogram4_shift: "
                    "moved by the size of the training image. logsnr: Style-Friendly. qinglong: a "
                    "mixture of shift, logsnr and a low-noise bell.",
                ),
                io.Int.Input(
                    "min_timestep",
                    default=0,
                    min=0,
                    max=999,
                    tooltip="Low end of 1000·t, 0 = clean. The same end in every mode (in "
                    "musubi-tuner, sigma counts from the other end).",
                ),
                io.Int.Input(
                    "max_timestep",
                    default=1000,
                    min=1,
                    max=1000,
                    tooltip="High end of 1000·t, 1000 = pure noise, in every mode. 0–500 trains "
                    "detail, 500–1000 structure and style.",
                ),
                io.Boolean.Input(
                    "preserve_distribution_shape",
                    default=False,
                    tooltip="Off: the whole shape is squeezed into the range. On: the shape stays "
                    "and is cut at the range's ends, exactly; in every mode, and with buckets.",
                ),
                io.Int.Input(
                    "num_timestep_buckets",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip="Every epoch draws equally often from this many equal shares of the "
                    "distribution, and each item meets them all in turn: a smoother loss on small "
                    "datasets. 4 to 10 is a start; 0 or 1 = off.",
                ),
            ],
            outputs=[
                sockets.Timesteps.Output(
                    "timesteps",
                    tooltip="The noise levels of a run, for Train LoRA and the preview.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, timestep_sampling: Mapping[str, Any] | str = "", **widgets: Any
    ) -> io.NodeOutput:
        # "": the host leaves a dynamic combo out when the API sent a key that it does not have
        return io.NodeOutput(build_sampling(timestep_sampling, **widgets))


class BraidTimestepPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidTimestepPreview",
            display_name="Timestep Distribution Preview",
            category=sockets.TIMESTEPS,
            description="Exactly what the trainer will draw for an image of this size, live while "
            "a widget moves; with a run's loss_map also what it did draw, and its loss there.",
            search_aliases=["show timesteps", "timestep histogram", "noise distribution"],
            is_output_node=True,
            inputs=[
                sockets.Timesteps.Input("timesteps", tooltip="From Timestep Sampling."),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=16,
                    max=MAX_PIXELS,
                    step=8,
                    tooltip="Width of a training image in pixels; the resolution shifts use it.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=16,
                    max=MAX_PIXELS,
                    step=8,
                    tooltip="Height of a training image in pixels; the resolution shifts use it.",
                ),
                io.Int.Input(
                    "bins",
                    default=50,
                    min=1,
                    max=MAX_BINS,
                    advanced=True,
                    tooltip="Equal bins of t from 0 to 1.",
                ),
                io.Int.Input(
                    "samples",
                    default=100_000,
                    min=1,
                    max=MAX_SAMPLES,
                    advanced=True,
                    tooltip="Draws that are counted: one epoch of a dataset of this many items. "
                    "Set it to your own number of items to see how uneven one epoch is.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    advanced=True,
                    control_after_generate=False,
                    tooltip="Seed of the draw. 0 to 2^64 − 1.",
                ),
                io.LossMap.Input(
                    "loss_map",
                    optional=True,
                    tooltip="From Train LoRA (Braid): overlays the timesteps the run really drew "
                    "and its loss per bin.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image",
                    tooltip="Density, drawn bins, loss weight and product over t and log-SNR.",
                ),
                io.Histogram.Output("histogram", tooltip="Count of draws in each bin."),
                io.String.Output(
                    "statistics",
                    tooltip="JSON: mean, std, min, max, deciles, acceptance_rate (share of the "
                    "shape that a cut range keeps), bins (edges of t), counts; and loss per bin of "
                    "a run.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        timesteps: TimestepSampling,
        width: int,
        height: int,
        bins: int,
        samples: int,
        seed: int,
        loss_map: Mapping[str, Any] | None = None,
    ) -> io.NodeOutput:
        preview = measure_preview(
            PreviewSettings(
                sampling=timesteps,
                width=width,
                height=height,
                bins=bins,
                samples=samples,
                seed=seed,
            )
        )
        run = None if loss_map is None else _measure_loss_map(loss_map, bins)
        chart = chart_json(preview, run)
        statistics = preview.statistics | ({"run": chart["run"]} if run else {})
        return io.NodeOutput(
            as_image(draw_preview(preview, run)),
            preview.counts.tolist(),
            json.dumps(statistics, indent=1),
            ui={"braid_live": [told(chart)]},
        )


def _measure_loss_map(loss_map: Mapping[str, Any], bins: int) -> DrawnRun:
    """LOSS_MAP of Train LoRA (Braid): beside core's `loss`, `timesteps` holds the noise level t of
    every drawn sample and `timestep_losses` its own loss, in the same order."""
    if "timesteps" not in loss_map or "timestep_losses" not in loss_map:
        raise ValueError(
            "loss_map carries no timesteps: connect the one of Train LoRA (Braid), "
            "or leave it empty to see the plan alone"
        )
    return measure_run(loss_map["timesteps"], loss_map["timestep_losses"], bins)


def chart_json(preview: Preview, run: DrawnRun | None = None) -> dict[str, Any]:
    """What web/timesteps/chart.js draws: numbers, and the parts of the heading."""
    sampling = preview.settings.sampling
    weighted = bool(preview.weight.std() > 0)
    return {
        "title": title(preview),
        "subtitle": subtitle(preview),
        "range": [sampling.low, sampling.high],
        "t": _rounded(preview.t.tolist()),
        "density": _rounded(preview.density.tolist()),
        "weight": _rounded(preview.weight.tolist()) if weighted else None,
        "effective": _rounded(preview.effective.tolist()) if weighted else None,
        "expected": _rounded(preview.expected.tolist()),
        "statistics": preview.statistics,
        "run": None
        if run is None
        else {
            "samples": int(run.counts.sum()),
            "counts": run.counts.tolist(),
            "loss": _rounded(run.loss.tolist()),
            "loss_error": _rounded(run.loss_error.tolist()),
        },
    }


def _rounded(values: list[float]) -> list[float | None]:
    """Six significant digits; None for what is not a number, which JSON cannot say."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def live_timesteps(node: LiveNode) -> dict[str, Any]:
    """The chart of a sampling node at the preview's defaults, or of a preview as it is set; of an
    epoch that would take long to draw, a part that is said to be one."""
    source = node if node.node_id == "BraidTimestepSampling" else node.input("timesteps")
    if source is None or source.node_id != "BraidTimestepSampling":
        return {"message": Text("Connect a Timestep Sampling node to timesteps to see its chart.")}
    shown = {} if source is node else node.values
    epoch = PreviewSettings(sampling=build_sampling(**source.values), **shown)
    drawn = replace(epoch, samples=min(epoch.samples, LIVE_SAMPLES))
    chart = chart_json(measure_preview(drawn))
    if drawn.samples < epoch.samples:
        counts = {"drawn": f"{drawn.samples:,}", "all": f"{epoch.samples:,}"}
        chart["subtitle"].append(Text("{drawn} of {all} items; a run draws all", **counts))
    return chart


NODES: list[type[io.ComfyNode]] = [BraidTimestepSampling, BraidTimestepPreview]
