"""Nodes of Braid/magcache: calibrate, plan, skip, report."""

import json
from typing import Any

import torch
from comfy_api.latest import io, ui

from ...engine.canvas import as_image
from ...engine.comfyui.magcache.calibrate import Calibrator
from ...engine.comfyui.magcache.conditions import network_settings
from ...engine.comfyui.magcache.patch import MagCachePatch, MagCacheSettings, magcache_of
from ...engine.magcache.figure import calibration_picture, schedule_picture
from ...engine.magcache.plan import MagCachePlan, ratios_text
from ...engine.magcache.presets import preset_for
from ...engine.magcache.report import schedule_dict
from ...engine.magcache.schedule import plan_schedule
from ...engine.writing import replaced_when_whole
from .. import sockets
from ..outputs import next_file, shown_picture
from .inputs import (
    MOST_DRAWN,
    SUBFOLDER,
    calibration_file,
    calibration_files,
    levels_for,
    load_calibration,
    parse_rule,
    plan_from_widgets,
    plan_input,
    preset_input,
    ratios_input,
    rule_input,
)
from .live import planned_strip, strip


def _measure_input(meaning: str) -> io.Combo.Input:
    return io.Combo.Input(
        "measure",
        options=["latent", "blocks"],
        default="latent",
        optional=True,
        advanced=True,
        tooltip=f"{meaning} latent: the whole model's output; any model, two latents of memory per "
        "conditioning. blocks: the residual of the block stack, as the paper; FLUX, Chroma, Wan "
        "(not VACE), Qwen-Image and Hunyuan.",
    )


def _percent_input(name: str, default: float, meaning: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=default,
        min=0.0,
        max=1.0,
        step=0.01,
        optional=True,
        advanced=True,
        tooltip=f"{meaning} this part of the sampling process every step is computed, 0 to 1.",
    )


class BraidMagCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidMagCache",
            display_name="MagCache",
            category=sockets.MAGCACHE,
            description="Skips sampling steps whose output can be predicted. Decided once per run.",
            search_aliases=["braid", "cache", "speed up", "teacache", "easycache", "skip steps"],
            not_idempotent=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with; LoRAs go before it."),
                preset_input(auto=True),
                ratios_input(),
                rule_input(),
                plan_input(),
                _measure_input("What is remembered of a computed step."),
                _percent_input("start_percent", 0.0, "Before"),
                _percent_input("end_percent", 1.0, "After"),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with the cache, for any sampler."),
                sockets.MagCachePlan.Output("plan", tooltip="The plan in use."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        preset: str,
        mag_ratios: str,
        rule: dict[str, Any],
        plan: MagCachePlan | None = None,
        measure: str = "latent",
        start_percent: float = 0.0,
        end_percent: float = 1.0,
    ) -> io.NodeOutput:
        plan = plan or plan_from_widgets(preset, mag_ratios)
        if plan is None:
            plan = preset_for(type(model.model).__name__, network_settings(model))
        settings = MagCacheSettings(
            plan=plan,
            rule=parse_rule(rule),
            measure=measure,
            start_percent=start_percent,
            end_percent=end_percent,
        )
        planned = planned_strip(settings, plan.conditions.steps)
        patched = MagCachePatch(settings).attach(model)
        return io.NodeOutput(patched, plan, ui={"braid_live": [planned]})


class BraidMagCacheCalibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidMagCacheCalibrate",
            display_name="MagCache Calibrate",
            category=sockets.MAGCACHE,
            description="The sampler that uses this model runs every step in full and is measured.",
            search_aliases=["braid", "mag ratios", "measure"],
            not_idempotent=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to measure, with the LoRAs you will sample with."
                ),
                _measure_input("What the ratios are measured on; use the same in MagCache."),
            ],
            outputs=[
                io.Model.Output("model", tooltip="Goes to the sampler of the calibration run."),
                sockets.Calibrator.Output(
                    "calibrator", tooltip="Goes to MagCache Calibration; filled by the sampler."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, measure: str = "latent") -> io.NodeOutput:
        calibrator = Calibrator(measure)
        return io.NodeOutput(calibrator.attach(model), calibrator)


class BraidMagCacheCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidMagCacheCalibration",
            display_name="MagCache Calibration",
            category=sockets.MAGCACHE,
            description="The measurement of the runs that the calibrating model has done.",
            search_aliases=["braid", "mag ratios"],
            is_output_node=True,
            inputs=[
                sockets.Calibrator.Input("calibrator", tooltip="From MagCache Calibrate."),
                io.Latent.Input(
                    "latent",
                    tooltip="From the sampler that used the calibrating model, so that this node "
                    "runs after it. With several samplers, the last one's.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="calibration",
                    tooltip="File name under output/magcache; empty does not save.",
                ),
            ],
            outputs=[
                sockets.MagCachePlan.Output("plan", tooltip="Everything measured; to MagCache."),
                io.String.Output(
                    "mag_ratios",
                    tooltip="Ratios of the positive conditioning, comma-separated, as musubi-tuner "
                    "prints them.",
                ),
                io.Image.Output(
                    "image", tooltip="Ratio, spread and cosine distance over the steps."
                ),
                io.Latent.Output("latent", tooltip="The latent that came in."),
            ],
        )

    @classmethod
    def execute(cls, calibrator: Calibrator, latent: dict, filename_prefix: str) -> io.NodeOutput:
        plan = calibrator.result()
        if filename_prefix.strip():
            _save(plan, filename_prefix.strip())
        image = as_image(calibration_picture(plan))
        return io.NodeOutput(plan, ratios_text(plan), image, latent, ui=shown_picture(image, cls))


def _save(plan: MagCachePlan, prefix: str) -> None:
    data = plan.to_json().encode()
    with replaced_when_whole(next_file(prefix, ".json", SUBFOLDER), len(data)) as file:
        file.write(data)


class BraidMagCachePlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidMagCachePlan",
            display_name="MagCache Plan",
            category=sockets.MAGCACHE,
            description="Which steps a run will skip with these settings, before it runs.",
            search_aliases=["braid", "preview", "schedule"],
            is_output_node=True,
            inputs=[
                preset_input(auto=False),
                ratios_input(),
                io.Int.Input(
                    "steps", default=28, min=1, max=MOST_DRAWN, tooltip="Steps of the run to plan."
                ),
                rule_input(),
                plan_input(),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Noise levels of the run; wins over steps. Without it the plan's own "
                    "schedule is taken, or even spacing where a published list has none.",
                ),
            ],
            outputs=[
                io.Image.Output("image", tooltip="Skipped steps, and the error gathered on them."),
                io.String.Output(
                    "report", tooltip="JSON: skipped, computed, speedup, error, warnings."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        preset: str,
        mag_ratios: str,
        steps: int,
        rule: dict[str, Any],
        plan: MagCachePlan | None = None,
        sigmas: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        plan = plan or plan_from_widgets(preset, mag_ratios)
        levels = levels_for(plan, steps, None if sigmas is None else sigmas.tolist())
        schedule = plan_schedule(plan, levels, parse_rule(rule))
        image = as_image(schedule_picture(schedule, plan.name))
        report = json.dumps(schedule_dict(schedule), indent=1)
        return io.NodeOutput(image, report, ui={"braid_live": [strip(schedule, plan)]})


class BraidMagCacheReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidMagCacheReport",
            display_name="MagCache Report",
            category=sockets.MAGCACHE,
            description="What the last run with this model computed and skipped, and how long it "
            "took.",
            search_aliases=["braid", "statistics"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model from the MagCache node."),
                io.Latent.Input("latent", tooltip="From the sampler that used that model."),
            ],
            outputs=[
                io.String.Output(
                    "report",
                    tooltip="JSON: steps computed and skipped of every conditioning, evaluations, "
                    "speedup, seconds, warnings.",
                ),
                io.Latent.Output("latent", tooltip="The latent that came in."),
            ],
        )

    @classmethod
    def execute(cls, model, latent: dict) -> io.NodeOutput:
        report = magcache_of(model).last_report
        if report is None:
            raise ValueError(
                "no finished run with this model yet: connect the latent of the sampler that "
                "used it. "
                "If it is connected, the sampler's result came from ComfyUI's cache: change its "
                "seed and queue again"
            )
        text = json.dumps(report.to_dict(), indent=1)
        return io.NodeOutput(text, latent, ui=ui.PreviewText(text))


class BraidLoadCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidLoadCalibration",
            display_name="Load MagCache Calibration",
            category=sockets.MAGCACHE,
            description="A calibration that MagCache Calibration has saved.",
            search_aliases=["braid", "mag ratios"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=calibration_files(),
                    tooltip="JSON file under output/magcache, newest first.",
                )
            ],
            outputs=[sockets.MagCachePlan.Output("plan", tooltip="The saved plan.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        """Any saved calibration may be typed; None where a linked node names it."""
        try:
            return file is None or bool(calibration_file(str(file)))
        except ValueError as refusal:
            return str(refusal)

    @classmethod
    def fingerprint_inputs(cls, file: str) -> float:
        return calibration_file(file).stat().st_mtime

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(load_calibration(file))


NODES = [
    BraidMagCache,
    BraidMagCacheCalibrate,
    BraidMagCacheCalibration,
    BraidMagCachePlan,
    BraidMagCacheReport,
    BraidLoadCalibration,
]
