"""Nodes that skip steps: the cache on a model, its plan before a run, its report after one."""

import json
from typing import Any

import torch
from comfy_api.latest import io, ui

from ...engine.canvas import as_image
from ...engine.comfyui.magcache.conditions import network_settings
from ...engine.comfyui.magcache.patch import MagCachePatch, magcache_of
from ...engine.magcache.figure import draw_schedule
from ...engine.magcache.plan import MagCachePlan
from ...engine.magcache.presets import preset_for
from ...engine.magcache.rules import MagCacheSettings
from ...engine.magcache.schedule import plan_schedule
from ...engine.texts import told
from .. import sockets
from .inputs import (
    MOST_DRAWN,
    levels_for,
    measure_input,
    parse_rule,
    plan_from_widgets,
    plan_input,
    preset_input,
    ratios_input,
    rule_input,
)
from .live import planned_strip, strip


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
                measure_input("What is remembered of a computed step."),
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
        model: io.Model.Type,
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
        return io.NodeOutput(patched, plan, ui={"braid_live": [told(planned)]})


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
        assert plan is not None, "this node's preset has no auto"
        levels = levels_for(plan, steps, None if sigmas is None else sigmas.tolist())
        schedule = plan_schedule(plan, levels, parse_rule(rule))
        image = as_image(draw_schedule(schedule, plan.name))
        report = json.dumps(schedule.to_dict(), indent=1)
        return io.NodeOutput(image, report, ui={"braid_live": [told(strip(schedule, plan))]})


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
    def execute(cls, model: io.Model.Type, latent: dict[str, Any]) -> io.NodeOutput:
        report = magcache_of(model).last_report
        if report is None:
            raise ValueError(
                "no finished run with this model yet: connect the latent of the sampler that "
                "used it. If it is connected, the sampler's result came from ComfyUI's cache: "
                "change its seed and queue again"
            )
        text = json.dumps(report.to_dict(), indent=1)
        return io.NodeOutput(text, latent, ui=ui.PreviewText(text))
