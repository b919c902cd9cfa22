"""The live strip of MagCache, and calibration in one graph, in a real ComfyUI."""

import json

import pytest

ADD = """([type, x]) => {
  const node = LiteGraph.createNode(type);
  node.pos = [x, 0];
  app.graph.add(node);
  return node.id;
}"""
SET = """([id, name, value]) => {
  app.graph.getNodeById(id).widgets.find((w) => w.name === name).value = value;
}"""
STRIP = """(id) => {
  const element = app.graph.getNodeById(id).widgets.find((w) => w.name === "braid_live").element;
  const count = (kind) => element.querySelectorAll(`.braid-${kind}`).length;
  return [count("computed"), count("skipped")];
}"""
SENTENCE = """(id) => app.graph.getNodeById(id).widgets.find((w) => w.name === "braid_live")
  .element.querySelector("p")?.textContent ?? "" """


def wait_for_strip(page, node, computed, skipped):
    page.wait_for_function(
        f"([id, wanted]) => JSON.stringify(({STRIP})(id)) === wanted",
        arg=[node, json.dumps([computed, skipped], separators=(",", ":"))],
    )


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes-2.0"])
def test_the_strip_follows_the_settings_and_the_steps_of_the_sampler(open_page, vue):
    page = open_page({"Comfy.VueNodes.Enabled": vue})
    cache = page.evaluate(ADD, ["BraidMagCache", 0])
    sampler = page.evaluate(ADD, ["KSampler", 500])
    page.evaluate("(id) => { app.canvas.ds.scale = 1; app.canvas.ds.offset = [80, 80]; }", cache)
    page.wait_for_function(f"(id) => ({SENTENCE})(id).startsWith('Preset auto')", arg=cache)
    page.evaluate(SET, [cache, "preset", "HunyuanVideo-T2V 544p"])
    page.evaluate(SET, [cache, "rule.interpolation", "nearest"])
    wait_for_strip(page, cache, 19, 31)
    connect = "([a, b]) => { app.graph.getNodeById(a).connect(0, app.graph.getNodeById(b), 0); }"
    page.evaluate(connect, [cache, sampler])
    page.evaluate(SET, [sampler, "steps", 20])
    wait_for_strip(page, cache, 7, 13)  # as musubi-tuner at 20 steps
    page.evaluate(SET, [cache, "rule.threshold", 0])
    wait_for_strip(page, cache, 20, 0)
    page.evaluate(SET, [cache, "mag_ratios", "1,oops"])
    page.wait_for_function(f"(id) => ({SENTENCE})(id).includes(\"'oops'\")", arg=cache)


SKIPPED = """(id) => {
  const element = app.graph.getNodeById(id).widgets.find((w) => w.name === "braid_live").element;
  const cells = [...element.querySelectorAll(".braid-computed, .braid-skipped")];
  return cells.flatMap((cell, index) => (cell.matches(".braid-skipped") ? [index] : []));
}"""


def test_the_strip_skips_only_in_the_range_and_at_the_steps_that_reach_the_sampler(open_page):
    page = open_page({"Comfy.VueNodes.Enabled": False})
    cache = page.evaluate(ADD, ["BraidMagCache", 0])
    sampler = page.evaluate(ADD, ["KSampler", 500])
    steps = page.evaluate(ADD, ["PrimitiveInt", 0])
    page.evaluate(
        """([cache, sampler, steps]) => {
          const node = (id) => app.graph.getNodeById(id);
          const slot = node(sampler).inputs.findIndex((input) => input.name === "steps");
          node(cache).connect(0, node(sampler), 0);
          node(steps).connect(0, node(sampler), slot);
          app.canvas.ds.scale = 1;
          app.canvas.ds.offset = [80, 80];
        }""",
        [cache, sampler, steps],
    )
    for node, name, value in (
        (steps, "value", 50),
        (cache, "preset", "HunyuanVideo-T2V 544p"),
        (cache, "rule.interpolation", "nearest"),
        (cache, "rule.retention_ratio", 0.0),
        (cache, "start_percent", 0.4),
        (cache, "end_percent", 0.6),
    ):
        page.evaluate(SET, [node, name, value])
    page.wait_for_function(
        f"(id) => {{ const s = ({SKIPPED})(id); return s.length && s[0] >= 20 && s.at(-1) < 30; }}",
        arg=cache,
    )
    page.evaluate(SET, [steps, "value", 20])
    page.evaluate(
        "(id) => { app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)])); }", sampler
    )
    page.wait_for_function(
        f"(id) => {{ const s = ({SKIPPED})(id); return s.length && s[0] >= 8 && s.at(-1) < 12; }}",
        arg=cache,
    )
    page.evaluate(SET, [cache, "end_percent", 0.2])
    page.wait_for_function(f"(id) => ({SENTENCE})(id).includes('start <= end')", arg=cache)


def graph(prefix: str) -> dict:
    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    sampling = dict(
        seed=1,
        steps=20,
        cfg=2.0,
        sampler_name="euler",
        scheduler="simple",
        positive=["2", 0],
        negative=["3", 0],
        latent_image=["4", 0],
        denoise=1.0,
    )
    return {
        "1": node("BraidPlaygroundModel"),
        "2": node("BraidPlaygroundPrompt", glyph="A"),
        "3": node("BraidPlaygroundPrompt", glyph="none"),
        "4": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "5": node("BraidMagCacheCalibrate", model=["1", 0]),
        "6": node("KSampler", model=["5", 0], **sampling),
        "7": node(
            "BraidMagCacheCalibration",
            calibrator=["5", 1],
            latent=["6", 0],
            filename_prefix=prefix,
        ),
        "8": node(
            "BraidMagCache",
            **{
                "model": ["1", 0],
                "preset": "auto",
                "mag_ratios": "0",
                "plan": ["7", 0],
                "rule": "planned",
                "rule.speedup": 2.0,
                "rule.warmup_steps": 2,
                "rule.k": 6,
                "rule.predict": "extrapolate",
                "rule.max_error": 0.0,
            },
        ),
        "9": node("KSampler", model=["8", 0], **sampling),
        "10": node("BraidMagCacheReport", model=["8", 0], latent=["9", 0]),
    }


def test_calibrate_plan_use_and_report_in_one_graph_and_again_from_the_cache(server):
    first = server.queue(graph("one/run"))
    report = json.loads(first["outputs"]["10"]["text"][0])
    assert report["computed_steps"] == 10 and report["evaluations"] == 20
    assert report["warnings"] == []
    assert first["outputs"]["8"]["braid_live"][0]["computed"] == 10
    assert len(first["outputs"]["7"]["images"]) == 1
    again = server.queue(graph("two/run"))  # the sampler's result comes from the cache
    assert not {"6"} & executed(again)
    saved = sorted((server.base / "output" / "magcache").glob("*/run_*.json"))
    assert [path.parent.name for path in saved] == ["one", "two"]
    plans = [json.loads(path.read_text()) for path in saved]
    assert plans[0] == plans[1] and plans[0]["conditions"]["model"] == "Flux"
    loaded = graph("")
    for unused in ("5", "6", "7"):
        del loaded[unused]
    loaded["11"] = {"class_type": "BraidLoadCalibration", "inputs": {"file": "two/run_00001_.json"}}
    loaded["8"]["inputs"]["plan"] = ["11", 0]
    report_again = json.loads(server.queue(loaded)["outputs"]["10"]["text"][0])
    assert report_again["skipped_steps"] == report["skipped_steps"]


def executed(entry) -> set[str]:
    """Nodes that were not taken from the cache."""
    cached = next(m[1]["nodes"] for m in entry["status"]["messages"] if m[0] == "execution_cached")
    return {str(n) for n in range(1, 11)} - set(cached)
