import json
import math

from comfyui_braid.engine.fp8.figure import draw_errors
from comfyui_braid.engine.fp8.report import Fp8Report, LayerReport


def layer(name, error, quantized=True):
    return LayerReport(
        name=name,
        shape=(64, 64),
        quantized=quantized,
        reason="flux preset",
        bytes_before=8192,
        bytes_after=4352 if quantized else 8192,
        granularity="block" if quantized else None,
        relative_rms=error if quantized else None,
    )


REPORT = Fp8Report(
    layers=(layer("a", 0.025), layer("b", 0.0251), layer("c", 0.04), layer("d", None, False)),
    notes=("model.safetensors: flux",),
    other_bytes=100,
)


def test_the_layers_that_lost_most_are_named_with_what_keeping_them_costs():
    worth = REPORT.to_json()["worth_exempting"]
    assert [entry["layer"] for entry in worth] == ["c"]
    assert worth[0]["costs_megabytes"] == round((8192 - 4352) / 2**20, 3)


def test_the_json_counts_bytes_and_gives_percent_and_decibel():
    report = json.loads(json.dumps(REPORT.to_json()))
    assert report["bytes_before"] == 4 * 8192 + 100
    assert report["bytes_after"] == 3 * 4352 + 8192 + 100
    entry = report["layers"]["a"]
    assert entry["relative_rms_percent"] == 2.5
    assert entry["decibel"] == round(-20 * math.log10(0.025), 2)
    assert report["layers"]["d"]["quantized"] is False
    assert report["quantized_layers"] == 3 and report["kept_layers"] == 1


def test_the_bytes_of_the_loaded_model_replace_those_of_the_file_afterwards():
    report = REPORT.as_held({"a": 4352, "d": 16384}, total=3 * 4352 + 16384 + 250).to_json()
    assert report["layers"]["d"]["bytes_after"] == 16384
    assert report["layers"]["c"]["bytes_after"] == 4352
    assert report["bytes_after"] == 3 * 4352 + 16384 + 250
    assert report["bytes_before"] == 4 * 8192 + 100


def test_the_chart_draws_every_measured_layer_and_an_empty_report():
    drawn = draw_errors(REPORT)
    empty = draw_errors(Fp8Report(layers=()))
    assert drawn.shape == empty.shape and drawn.std() > empty.std()
