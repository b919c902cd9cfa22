"""The plan: what it holds, how it is written and read, what differs from the run."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from comfyui_braid.engine.disk.reading import DamagedFileError
from comfyui_braid.engine.magcache.plan import (
    Conditions,
    Curve,
    MagCachePlan,
    mismatches,
    plan_from_ratios,
    ratios_text,
    read_plan,
)
from comfyui_braid.engine.magcache.presets import preset_for, preset_named, presets
from tools.published_settings import PAGES, with_rows

TESTS = Path(__file__).parents[1]
RATIO_LISTS = json.loads((TESTS / "goldens" / "magcache_ratios.json").read_text())["lists"]
RENAMED = {
    "HunyuanVideo-T2V 544p (= musubi default)": "HunyuanVideo-T2V 544p",
    "ComfyUI pack flux_kontext": "FLUX.1-Kontext-dev (ComfyUI pack, 20 steps)",
    "ComfyUI pack chroma": "Chroma",
    "ComfyUI pack qwen_image": "Qwen-Image (ComfyUI pack, 40 steps)",
    "ComfyUI pack hunyuan_video1.5": "HunyuanVideo1.5 (20 steps)",
    "ComfyUI pack hunyuan_video1.5_40steps": "HunyuanVideo1.5 (40 steps)",
}
BRANCHES = {"cond": "positive", "uncond": "negative", "ref": "reference"}


def published(entry) -> list[float]:
    """The entry's list put together again from the preset's curves."""
    name = entry["model"]
    if name.startswith("OmniGen2"):
        family, branch = name.removeprefix("OmniGen2 ").split("_")
        curves = preset_named(f"OmniGen2 {family}").curves
        return next(list(c.ratios) for c in curves if c.label == BRANCHES[branch])
    if name.startswith("k5-"):
        curves = preset_named(f"Kandinsky5 {name.removeprefix('k5-')}").curves
        zeros = (0.0,) * 50
        negative = curves[1].ratios if len(curves) > 1 else zeros
        pairs = zip(curves[0].ratios, negative, strict=True)
        return [value for pair in pairs for value in pair][2:]
    curves = preset_named(RENAMED.get(name, name)).curves
    if not entry["interleaved"]:
        return list(curves[0].ratios)
    return [v for pair in zip(*(c.ratios for c in curves), strict=True) for v in pair]


@pytest.mark.parametrize("entry", RATIO_LISTS, ids=lambda e: e["model"])
def test_every_published_list_is_there_value_for_value(entry):
    if entry.get("identical"):
        entry = {**entry, "model": entry["identical"][0]}
    ratios = published(entry)
    assert len(ratios) == entry["count"]
    assert ratios[:6] == entry["first"] and ratios[-4:] == entry["last"]
    assert sum(ratios) == pytest.approx(entry["total"], abs=1e-4)


@pytest.mark.parametrize("name", presets())
def test_every_preset_names_its_source_and_survives_json(name):
    plan = preset_named(name)
    assert "commit" in plan.source
    assert MagCachePlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_help_has_the_settings_that_the_lists_were_published_with(page):
    """`make help-tables` writes them."""
    text = page.read_text(encoding="utf-8")
    assert with_rows(text) == text
    assert "| FLUX.1-dev | 0.24 | 0.1 | 5 |" in text


@pytest.mark.parametrize(
    ("model", "settings", "name"),
    [
        ("Flux", {"guidance_embed": True}, "FLUX.1-dev"),
        ("WAN21", {"model_type": "t2v", "dim": 1536}, "Wan2.1-T2V-1.3B"),
        ("WAN21", {"model_type": "t2v", "dim": 5120}, "Wan2.1-T2V-14B"),
        ("QwenImage", {}, "Qwen-Image"),
        ("HunyuanVideo15", {}, "HunyuanVideo1.5 (20 steps)"),
    ],
)
def test_auto_recognises_a_model(model, settings, name):
    assert preset_for(model, settings).name == name


def test_auto_says_what_to_do_for_a_model_without_published_ratios():
    with pytest.raises(ValueError, match="no published ratios for this Lumina2 model.*Calibrate"):
        preset_for("Lumina2", {})


def test_a_typed_list_prints_back_as_musubi_prints_it():
    text = "1.00000,1.26562,1.08594,0.77734"
    assert ratios_text(plan_from_ratios(text)) == text


def test_lines_of_a_typed_list_are_sections_of_a_video_and_averaged():
    plan = plan_from_ratios("1, 1.2, 0.8\n1, 1.0, 1.0\n")
    assert plan.curves[0].ratios == pytest.approx((1.0, 1.1, 0.9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mag_ratios is empty"),
        ("1,abc", "'abc' is not a number"),
        ("1,nan", "value 1 is nan"),
        ("1,-0.5", "value 1 is -0.5"),
        ("1,inf", "value 1 is inf"),
        ("1,1\n1,1,1", r"same number of values, got \[2, 3\]"),
    ],
)
def test_a_bad_list_is_refused_in_one_sentence(text, message):
    with pytest.raises(ValueError, match=message):
        plan_from_ratios(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "its format should be"),
        ('{"format": "other"}', "its format should be"),
        ('{"format": "braid.magcache/1"}', "damaged MagCache calibration"),
    ],
)
def test_another_file_is_not_read_as_a_calibration(text, message):
    with pytest.raises(ValueError, match=message):
        MagCachePlan.from_json(text)


def test_a_calibration_of_0_1_0_is_read_whole():
    text = (
        Path(__file__).parents[1] / "files_of_0_1_0/output/magcache/old_00001_.json"
    ).read_text()
    old, plan = json.loads(text), MagCachePlan.from_json(text)
    written = json.loads(plan.to_json())
    assert plan.calibrated
    assert old == written | {"sections": [], "recommended": None, "note": ""}


def edited(section, field, value):
    raw = json.loads(CALIBRATED.to_json())
    where = {"conditions": raw["conditions"], "curve": raw["curves"][0], "plan": raw}[section]
    where[field] = value
    return json.dumps(raw)


CALIBRATED = MagCachePlan(
    name="x",
    conditions=Conditions(steps=3, sigmas=(1.0, 0.6, 0.3, 0.0)),
    curves=(Curve(label="positive", ratios=(1.0, 0.9, 0.8), spread=(0.0, 0.1, 0.1)),),
    inner_products=((1.0,), (1.0, 1.0), (1.0, 1.0, 1.0)),
)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("conditions", "sigmas", [1.0, "a", 0.3, 0.0]), "'a' is not a number"),
        (("conditions", "sigmas", [0.0, 0.3, 0.6, 1.0]), "noise levels of a calibration must fall"),
        (("conditions", "sigmas", [1.0, 0.6, 0.6, 0.0]), "noise levels of a calibration must fall"),
        (("conditions", "sigmas", [1.0, math.nan, 0.3, 0.0]), "calibration must fall"),
        (("conditions", "steps", 4), "4 steps have 5 noise levels, got 4"),
        (("conditions", "steps", "3"), "damaged"),
        (("curve", "ratios", [1.0, "0.9", 0.8]), "'0.9' is not a number"),
        (("curve", "ratios", [1.0, 0.0, 0.8]), "value 1 is 0.0"),
        (("curve", "spread", [0.0]), "spread of positive: 3 steps need as many values, got 1"),
        (("plan", "inner_products", [[1.0], [1.0, math.nan], [1.0, 1.0, 1.0]]), "finite"),
        (("plan", "inner_products", [[1.0], [1.0, "x"], [1.0, 1.0, 1.0]]), "'x' is not a number"),
        (("plan", "curves", None), "damaged"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_calibration_edited_by_hand_is_read_whole_or_refused_in_one_sentence(edit, message):
    assert MagCachePlan.from_json(CALIBRATED.to_json()) == CALIBRATED
    with pytest.raises(ValueError, match=message):
        MagCachePlan.from_json(edited(*edit))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("conditions", "sigmas", [math.inf, 0.6, 0.3, 0.0]), "calibration must fall"),
        (("conditions", "sigmas", [1e9, 0.6, 0.3, 0.0]), "fall from at most"),
        (("conditions", "sigmas", [1.0, 0.3 + 1e-15, 0.3, 0.0]), "each by a part of"),
        (("conditions", "steps", True), "steps is True"),
        (("conditions", "model", 3), "model is 3"),
        (("conditions", "resolution", 3), "resolution is 3, not a list"),
        (("curve", "ratios", [1.0, 1e9, 0.8]), "value 1 is 1000000000.0"),
        (("curve", "ratios", [1.0, True, 0.8]), "True is not a number"),
        (("curve", "label", "a" * 1000), "label is 'aaa"),
        (("plan", "inner_products", [[1.0], [1.0, 1e300], [1.0, 1.0, 1.0]]), "below 1e.30"),
        (("plan", "inner_products", 3), "inner_products is 3, not a list"),
        (("plan", "conditions", []), r"Conditions is \[\]"),
        (("plan", "name", None), "name is None"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_numbers_and_texts_that_no_calibration_has_are_refused(edit, message, tmp_path):
    path = tmp_path / "edited.json"
    path.write_text(edited(*edit))
    with pytest.raises(DamagedFileError, match=f"edited.json: damaged .*{message}"):
        read_plan(path)


def test_a_calibration_is_read_from_its_file_with_the_mark_that_editors_add(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(CALIBRATED.to_json(), encoding="utf-8-sig")
    assert read_plan(path) == CALIBRATED
    for text in (b"\xff\xfe", b"[" * 100_000, b'{"a": 1, "a": 2}', b"", b"\0"):
        path.write_bytes(text)
        with pytest.raises(DamagedFileError, match="calibration.json: not a MagCache calibration"):
            read_plan(path)


def test_fields_of_another_version_are_left_out():
    raw = json.loads(plan_from_ratios("1,1,1").to_json())
    raw["conditions"]["from_the_future"] = 1
    raw |= {"sections": [[1.0, 1.0, 1.0]], "recommended": None, "note": ""}  # as 0.1.0 wrote
    assert MagCachePlan.from_json(json.dumps(raw)) == plan_from_ratios("1,1,1")


MEASURED = Conditions(
    steps=2,
    sigmas=(1.0, 0.5, 0.0),
    model="Flux",
    architecture="a",
    patches="none",
    sampler="euler",
    shift=1.15,
    resolution=(16, 16),
    frames=None,
    cfg=2.0,
    dtype="bfloat16",
    measure="latent",
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "WAN21"),
        ("architecture", "b"),
        ("patches", "12 layers 1234"),
        ("sampler", "dpmpp_2m"),
        ("shift", 3.0),
        ("resolution", (32, 16)),
        ("cfg", 4.0),
        ("dtype", "float32"),
        ("measure", "blocks"),
    ],
)
def test_a_run_under_other_conditions_is_told_which_field(field, value):
    (warning,) = mismatches(MEASURED, replace(MEASURED, **{field: value}))
    assert warning.startswith(f"{field}: calibrated with ")


def test_a_run_under_the_same_or_unknown_conditions_is_told_nothing():
    assert mismatches(MEASURED, MEASURED) == []
    assert mismatches(Conditions(steps=2), MEASURED) == []


def test_a_run_outside_the_calibrated_noise_levels_is_told_so():
    low = replace(MEASURED, sigmas=(0.8, 0.4, 0.2))
    (warning,) = mismatches(low, MEASURED)
    assert warning.startswith("sigmas: calibrated from 0.8 to 0.2, running from 1 to 0")


def test_curves_and_inner_products_must_have_one_entry_per_step():
    curve = Curve(label="positive", ratios=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="2 steps need 2 values, got 3"):
        MagCachePlan(name="x", conditions=Conditions(steps=2), curves=(curve,))
    with pytest.raises(ValueError, match="lower triangle of 3 rows"):
        MagCachePlan(
            name="x",
            conditions=Conditions(steps=3),
            curves=(curve,),
            inner_products=((1.0,), (1.0, 1.0)),
        )
