"""Nodes that measure a model: the run that is measured, what it measured, what was saved of it."""

from typing import Any

from comfy_api.latest import io

from ...engine.canvas import as_image
from ...engine.comfyui.magcache.calibrate import Calibrator
from ...engine.disk.writing import replaced_when_whole
from ...engine.magcache.figure import draw_calibration
from ...engine.magcache.plan import MagCachePlan, ratios_text
from .. import sockets
from ..outputs import next_file, shown_picture
from .inputs import (
    SUBFOLDER,
    calibration_file,
    calibration_files,
    load_calibration,
    measure_input,
)


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
                measure_input("What the ratios are measured on; use the same in MagCache."),
            ],
            outputs=[
                io.Model.Output("model", tooltip="Goes to the sampler of the calibration run."),
                sockets.Calibrator.Output(
                    "calibrator", tooltip="Goes to MagCache Calibration; filled by the sampler."
                ),
            ],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, measure: str = "latent") -> io.NodeOutput:
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
    def execute(
        cls, calibrator: Calibrator, latent: dict[str, Any], filename_prefix: str
    ) -> io.NodeOutput:
        plan = calibrator.result()
        if filename_prefix.strip():
            _save(plan, filename_prefix.strip())
        image = as_image(draw_calibration(plan))
        return io.NodeOutput(plan, ratios_text(plan), image, latent, ui=shown_picture(image, cls))


def _save(plan: MagCachePlan, prefix: str) -> None:
    data = plan.to_json().encode()
    with replaced_when_whole(next_file(prefix, ".json", SUBFOLDER), len(data)) as file:
        file.write(data)


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
