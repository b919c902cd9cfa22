"""Nodes of Braid/ema: averages over the training time of a run, made after it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ...engine.canvas import as_image
from ...engine.checkpoints import Checkpoints
from ...engine.comfyui.progress import completed
from ...engine.ema.average import SPACES, averaged, plan_average, report_json
from ...engine.ema.figure import draw_reconstruction, draw_weights
from ...engine.ema.order import SORTS
from ...engine.ema.reconstruction import plan_reconstruction, reconstructed
from ...engine.ema.schedule import Power
from ...engine.refusals import quoted
from ...engine.texts import told
from .. import sockets
from ..outputs import next_file, shown_picture
from .fields import METHODS, parse_schedule, sigma_rel_input
from .live import chart_json

MOST_WIDTHS = 64
"""LoRAs of a sweep: all of them are held in memory."""


def _checkpoints_input() -> io.Input:
    return sockets.Checkpoints.Input(
        "checkpoints", tooltip="The files of one run, from Train LoRA or Load Training Checkpoints."
    )


def _prefix_input(default: str) -> io.Input:
    return io.String.Input(
        "filename_prefix",
        default=default,
        tooltip="Path below the output folder and start of the file name; a number is added. "
        "Empty = do not save. What lies in loras/ can be chosen in Load LoRA at once.",
    )


def _lora_output(**options: Any) -> io.Output:
    return io.LoraModel.Output(
        "lora", tooltip="The averaged LoRA, for Load LoRA Model or a Save LoRA node.", **options
    )


def _next_path(filename_prefix: str) -> Path | None:
    """The next free numbered name under the output folder; None when nothing is to be saved."""
    return next_file(filename_prefix, ".safetensors") if filename_prefix.strip() else None


class BraidPostHocEma(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidPostHocEma",
            display_name="Post-Hoc EMA",
            category=sockets.EMA,
            description="Averages the checkpoints of a finished run with exponential or "
            "power-function weights: often a better LoRA than any single file, at no training.",
            search_aliases=["merge lora", "average checkpoints", "ema", "sigma rel", "swa"],
            is_output_node=True,
            inputs=[
                _checkpoints_input(),
                io.DynamicCombo.Input(
                    "method",
                    options=[io.DynamicCombo.Option(key, value) for key, value in METHODS.items()],
                    tooltip="How the weights come about. sigma_rel: exact power-function average "
                    "over the real steps. beta, beta_ramp, sigma_rel_musubi: musubi-tuner's "
                    "merges, bit for bit.",
                ),
                io.Combo.Input(
                    "sort",
                    options=list(SORTS),
                    default="step",
                    tooltip="What puts the files in order. step: step or epoch in metadata or "
                    "name, safe against copying. mtime: modification time, as musubi-tuner. given: "
                    "as they come.",
                ),
                io.Int.Input(
                    "first",
                    default=1,
                    min=1,
                    max=1_000_000,
                    advanced=True,
                    tooltip="First checkpoint to use, counted from 1 in training order. Above 1 "
                    "the average is cut there: earlier training counts nothing.",
                ),
                io.Int.Input(
                    "last",
                    default=0,
                    min=0,
                    max=1_000_000,
                    advanced=True,
                    tooltip="Last checkpoint to use, counted from 1; 0 = the newest. The average "
                    "ends there, as if training had.",
                ),
                io.Combo.Input(
                    "space",
                    options=list(SPACES),
                    default="factors",
                    advanced=True,
                    tooltip="factors: average the LoRA's parameters (the EMA of training; files of "
                    "one run only). product: average what the files add to the model and factor it "
                    "again to the rank; slower, plain LoRA only, any runs.",
                ),
                _prefix_input("loras/ema/ema"),
            ],
            outputs=[
                _lora_output(),
                io.Image.Output(
                    "image", tooltip="Weight of each checkpoint over training time, ideal behind."
                ),
                io.String.Output(
                    "report",
                    tooltip="JSON: files, steps, betas (decay per merge), weights (sum 1), "
                    "centre_of_mass and sigma_rel (fractions of the run), achieved and requested.",
                ),
                io.String.Output("path", tooltip="The file written; empty when none was."),
            ],
        )

    @classmethod
    def execute(
        cls,
        checkpoints: Checkpoints,
        method: Mapping[str, Any],
        sort: str,
        first: int,
        last: int,
        space: str,
        filename_prefix: str,
    ) -> io.NodeOutput:
        plan = plan_average(checkpoints, parse_schedule(method), sort, first, last)
        path = _next_path(filename_prefix)
        average = completed(averaged(plan, space, path))
        return io.NodeOutput(
            average.lora,
            as_image(draw_weights(plan)),
            report_json(average.report),
            str(path or ""),
            ui={"braid_live": [told(chart_json(plan))]},
        )


class BraidEmaReconstruct(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidEmaReconstruct",
            display_name="EMA from Shadows",
            category=sockets.EMA,
            description="Any power-function EMA of a run that kept shadows (five running "
            "averages): the whole run counts, not only the steps that were saved.",
            search_aliases=["post-hoc ema", "edm2", "ema shadows", "sigma rel"],
            is_output_node=True,
            inputs=[
                _checkpoints_input(),
                sigma_rel_input(
                    0.2,
                    "Width of the average as a fraction of the run, above 0, at most 0.28868. "
                    "0.05 to 0.25 come out within 0.8 % of the ideal profile; see report.",
                ),
                _prefix_input("loras/ema/ema_shadows"),
            ],
            outputs=[
                _lora_output(),
                io.String.Output(
                    "report",
                    tooltip="JSON: coefficients of the stored shadows (sum 1), profile_error "
                    "(fraction of the ideal profile), step, path of the file.",
                ),
                io.Image.Output(
                    "image", tooltip="Requested and reconstructed profile over training time."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, checkpoints: Checkpoints, sigma_rel: float, filename_prefix: str
    ) -> io.NodeOutput:
        reconstruction = plan_reconstruction(checkpoints, sigma_rel)
        path = _next_path(filename_prefix)
        lora = completed(reconstructed(checkpoints, reconstruction, path))
        image = as_image(draw_reconstruction(reconstruction))
        report = report_json(reconstruction.report() | {"path": str(path or "")})
        return io.NodeOutput(lora, report, image, ui=shown_picture(image, cls))


class BraidEmaSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidEmaSweep",
            display_name="EMA Sweep",
            category=sockets.EMA,
            description="Several EMA widths of one run at once: what follows runs once for each, "
            "so that a grid of one seed comes out of one graph.",
            search_aliases=["xy plot", "compare ema", "sigma rel", "grid"],
            inputs=[
                _checkpoints_input(),
                io.String.Input(
                    "sigma_rels",
                    default="0.05, 0.1, 0.15, 0.2, 0.25",
                    tooltip="Up to 64 widths, separated by commas, spaces or lines; each above 0 "
                    "and at most 0.28868, as a fraction of the run.",
                ),
                io.Combo.Input(
                    "source",
                    options=["checkpoints", "shadows"],
                    default="checkpoints",
                    optional=True,
                    advanced=True,
                    tooltip="checkpoints: exact weights of the saved files. shadows: from the "
                    "run's EMA shadows, which saw the whole run.",
                ),
            ],
            outputs=[
                _lora_output(is_output_list=True),
                io.String.Output(
                    "label", is_output_list=True, tooltip="'sigma_rel 0.2', one for each LoRA."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, checkpoints: Checkpoints, sigma_rels: str, source: str = "checkpoints"
    ) -> io.NodeOutput:
        widths = parse_sigma_rels(sigma_rels)
        if source == "shadows":
            plans = [plan_reconstruction(checkpoints, width) for width in widths]
            loras = [completed(reconstructed(checkpoints, plan)) for plan in plans]
        else:
            averages = [plan_average(checkpoints, Power(sigma_rel=width)) for width in widths]
            loras = [completed(averaged(plan)).lora for plan in averages]
        return io.NodeOutput(loras, [f"sigma_rel {width:g}" for width in widths])


def parse_sigma_rels(text: str) -> list[float]:
    """Widths in a text, each checked by the schedule; ValueError names what is not a number."""
    parts = text.replace(",", " ").split()
    if not parts:
        raise ValueError("sigma_rels is empty; write widths such as 0.1, 0.15, 0.2")
    if len(parts) > MOST_WIDTHS:
        raise ValueError(f"sigma_rels holds {len(parts)} widths; at most {MOST_WIDTHS} are swept")
    try:
        widths = [float(part) for part in parts]
    except ValueError as error:
        raise ValueError(
            f"sigma_rels is {quoted(text)}; write numbers such as 0.1, 0.15, 0.2"
        ) from error
    return [Power(sigma_rel=width).sigma_rel for width in widths]


NODES: list[type[io.ComfyNode]] = [BraidPostHocEma, BraidEmaReconstruct, BraidEmaSweep]
