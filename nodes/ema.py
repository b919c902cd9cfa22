"""Nodes of Braid/ema: averages over the training time of a run, made after it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..engine.checkpoints import Checkpoints
from ..engine.comfyui.progress import completed
from ..engine.ema.average import (
    SPACES,
    AveragePlan,
    averaged,
    plan_average,
    plan_for_order,
    planned_order,
    report_json,
)
from ..engine.ema.figure import cells, draw_reconstruction, draw_weights, ideal_curve
from ..engine.ema.order import SORTS, selected
from ..engine.ema.schedule import BetaRamp, MusubiPower, Power, Schedule
from ..engine.ema.shadows import plan_reconstruction, reconstructed
from . import live, sockets
from .outputs import next_file
from .training.checkpoints import load_checkpoints

EXAMPLE_COUNT = 10
"""Checkpoints that the live chart shows while no run is known."""


def _sigma_rel(default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        "sigma_rel",
        default=default,
        min=0.0,
        max=0.5,  # above 0.28868 the engine says why there is no such average
        step=0.005,
        round=0.0001,
        tooltip=tooltip,
    )


def _beta(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        name, default=default, min=0.0, max=1.0, step=0.01, round=0.0001, tooltip=tooltip
    )


_METHODS = {
    "sigma_rel": [
        _sigma_rel(
            0.2,
            "Width of the average: its standard deviation over training time, as a fraction of the "
            "run. Above 0, at most 0.28868 (all of the run alike). 0.05 follows the end, 0.2 is a "
            "good start, 0.25 is broad. Exact weights for these files at these steps.",
        )
    ],
    "beta": [
        _beta(
            "beta",
            0.95,
            "What is kept of the average at each further file, 0 to 1. Higher = more of the early "
            "files: 0.95 leaves 63 % on the first of 10.",
        )
    ],
    "beta_ramp": [
        _beta("beta", 0.9, "Decay at the first merge, 0 to 1."),
        _beta("beta2", 0.95, "Decay at the last merge, 0 to 1; linear in between."),
    ],
    "sigma_rel_musubi": [
        _sigma_rel(
            0.2,
            "As musubi-tuner computes it, bit for bit: drops the oldest file, takes the files as "
            "equally spaced. Above 0, at most 0.28868. For comparison; sigma_rel is better.",
        )
    ],
}


def parse_schedule(method: Mapping[str, Any]) -> Schedule:
    """The `method` widgets as a schedule; ValueError says what is wrong."""
    match dict(method):
        case {"method": "sigma_rel", "sigma_rel": sigma_rel}:
            return Power(sigma_rel=sigma_rel)
        case {"method": "sigma_rel_musubi", "sigma_rel": sigma_rel}:
            return MusubiPower(sigma_rel=sigma_rel)
        case {"method": "beta_ramp", "beta": beta, "beta2": beta2}:
            return BetaRamp(beta=beta, beta2=beta2)
        case {"method": "beta", "beta": beta}:
            return BetaRamp(beta=beta, beta2=beta)
    raise ValueError(f"method {dict(method)}: choose one of {', '.join(_METHODS)} with its values")


def _checkpoints_input() -> io.Input:
    return sockets.Checkpoints.Input(
        "checkpoints", tooltip="The files of one run, from Train LoRA or Load Checkpoints."
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
                    options=[io.DynamicCombo.Option(key, value) for key, value in _METHODS.items()],
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
            draw_weights(plan),
            report_json(average.report),
            str(path or ""),
            ui={"braid_live": [chart_json(plan)]},
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
                _sigma_rel(
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
        image = draw_reconstruction(reconstruction)
        report = report_json(reconstruction.report() | {"path": str(path or "")})
        return io.NodeOutput(lora, report, image, ui=ui.PreviewImage(image, cls=cls))


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
                    tooltip="Widths, separated by commas, spaces or lines; each above 0 and at "
                    "most 0.28868, as a fraction of the run.",
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
    try:
        widths = [float(part) for part in parts]
    except ValueError as error:
        raise ValueError(
            f"sigma_rels {text!r}: {error}; write numbers such as 0.1, 0.15, 0.2"
        ) from error
    return [Power(sigma_rel=width).sigma_rel for width in widths]


def chart_json(plan: AveragePlan) -> dict[str, Any]:
    """What web/ema/chart.js draws; numbers and names only."""
    curve = ideal_curve(plan)
    return plan.report() | {
        "borders": cells(plan.order.times, plan.order.windowed).tolist(),
        "ideal": None if curve is None else [axis.tolist() for axis in curve],
    }


AS_PLANNED = "as the linked run will save them"
EXAMPLE = "an example: no run is linked yet"
ONE_FILE = "The linked run saves only its finished LoRA, and one file is no average: "
"""What the chart says of files that do not exist yet."""


def live_ema(node: live.LiveNode) -> dict[str, Any]:
    """The chart for the widgets as they are, over the files of the linked run as far as known."""
    values = {name: node.value(name) for name in ("method", "sort", "first", "last")}
    schedule = parse_schedule(values["method"])
    source = node.input("checkpoints")
    if source is not None and source.node_id == "BraidLoadCheckpoints":
        checkpoints = load_checkpoints(**source.values)
        plan = plan_average(checkpoints, schedule, values["sort"], values["first"], values["last"])
        return chart_json(plan) | {"note": ""}
    if source is None:
        order, note = planned_order(range(1, EXAMPLE_COUNT + 1), "files"), EXAMPLE
    else:
        saved = _planned_steps(source)
        if len(saved) < 2:
            return {"message": ONE_FILE + _more_files(source)}
        order, note = planned_order(saved, "steps"), AS_PLANNED
    chosen = selected(order, values["first"], values["last"])
    return chart_json(plan_for_order(chosen, schedule)) | {"note": note}


def _checkpointing(train: live.LiveNode) -> live.LiveNode | None:
    """The Checkpoints and Resume node in the options of a Train LoRA node."""
    options = train.input("options")
    while options is not None and options.node_id != "BraidCheckpointing":
        options = options.input("options")
    return options


def _planned_steps(train: live.LiveNode) -> list[int]:
    """Steps at which a Train LoRA node will save: its checkpoints, and the finished LoRA."""
    steps, options = train.value("steps"), _checkpointing(train)
    every = options.value("save_every_n_steps") if options else 0
    last = options.value("save_last_n") if options else 0
    saved = list(range(every, steps + 1, every)) if every else []
    return sorted({*(saved[-last:] if last else saved), steps})


def _more_files(train: live.LiveNode) -> str:
    """What to set so that a run saves checkpoints on its way."""
    steps, options = train.value("steps"), _checkpointing(train)
    if options is None:
        return "link Checkpoints and Resume to the options of Train LoRA."
    every, wanted = options.value("save_every_n_steps"), max(1, steps // EXAMPLE_COUNT)
    told = f"save_every_n_steps is {every}" + (f" of {steps} steps" if every else "")
    return f"{told}; {wanted} saves about {EXAMPLE_COUNT} checkpoints."


live.LIVE["ema"] = live_ema
NODES: list[type[io.ComfyNode]] = [BraidPostHocEma, BraidEmaReconstruct, BraidEmaSweep]
