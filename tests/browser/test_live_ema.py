"""The live chart of Post-Hoc EMA in a real browser against a real ComfyUI, in both renderers."""

import json

import pytest
import safetensors.torch
import torch
from host.browse import act

RENDERERS = pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes-2.0"])
STEPS = [100, 200, 300, 600, 1000]
BUILD = """() => {
  const add = (type, x) => {
    const node = LiteGraph.createNode(type);
    node.pos = [x, 0];
    app.graph.add(node);
    return node;
  };
  const load = add("BraidLoadCheckpoints", 0);
  const ema = add("BraidPostHocEma", 340);
  const text = add("PreviewAny", 900);
  load.widgets.find((w) => w.name === "folder").value = "live";
  ema.widgets.find((w) => w.name === "filename_prefix").value = "";
  load.connect(0, ema, 0);
  ema.connect(2, text, 0);
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [60, 120];
  app.canvas.setDirty(true, true);
  window.braid = { load, ema, text };
}"""
SET = """([name, value]) => {
  window.braid.ema.widgets.find((w) => w.name === name).value = value;
}"""
WEIGHTS = """() => {
  const widget = window.braid.ema.widgets.find((w) => w.name === "braid_live");
  return [...widget.element.querySelectorAll(".braid-weight")].map((bar) => +bar.dataset.weight);
}"""
SENTENCE = """() => {
  const widget = window.braid.ema.widgets.find((w) => w.name === "braid_live");
  return widget.element.querySelector("p")?.textContent ?? "";
}"""


@pytest.fixture(scope="module")
def run_folder(server):
    """A run of five checkpoints, unevenly spaced, in the server's output/loras/live."""
    folder = server.base / "output" / "loras" / "live"
    folder.mkdir(parents=True, exist_ok=True)
    for step in STEPS:
        tensors = {
            "lora_unet_a.lora_down.weight": torch.full((2, 3), float(step)),
            "lora_unet_a.lora_up.weight": torch.ones(3, 2),
        }
        path = folder / f"live-step{step:08d}.safetensors"
        safetensors.torch.save_file(tensors, path, {"ss_steps": str(step)})
    return folder


@pytest.fixture
def page(open_page, run_folder, vue):
    """A page with a linked loader and EMA node, its chart drawn."""
    opened = open_page({"Comfy.VueNodes.Enabled": vue})
    opened.evaluate(BUILD)
    wait_for_weights(opened, [], len(STEPS))
    return opened


def wait_for_weights(page, before: list[float], count: int) -> list[float]:
    page.wait_for_function(
        f"""([before, count]) => {{
          const now = ({WEIGHTS})();
          return now.length === count && JSON.stringify(now) !== JSON.stringify(before);
        }}""",
        arg=[before, count],
    )
    return page.evaluate(WEIGHTS)


def run_report(page, server) -> dict:
    """Queue the graph as it is on the page; the report of the node."""
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    node_id = str(page.evaluate("window.braid.text.id"))
    return json.loads(server.queue(prompt)["outputs"][node_id]["text"][0])


def wait_for_these(page, weights: list[float]) -> None:
    """Until the chart shows these weights; a dynamic combo changes its fields one by one."""
    page.wait_for_function(
        f"""(expected) => {{
          const now = ({WEIGHTS})();
          return now.length === expected.length
            && now.every((weight, index) => Math.abs(weight - expected[index]) < 1e-12);
        }}""",
        arg=weights,
    )


@RENDERERS
def test_the_chart_follows_the_widgets_and_equals_the_report_of_a_run(
    page, server, console_errors, vue
):
    for name, value, count in (
        ("method.sigma_rel", 0.1, 5),
        ("first", 2, 4),
        ("method", "beta", 4),
        ("method.beta", 0.5, 4),
    ):
        page.evaluate(SET, [name, value])
        report = run_report(page, server)
        assert report["steps"] == STEPS[-count:]
        wait_for_these(page, report["weights"])
    assert report["weights"] == [0.125, 0.125, 0.25, 0.5]
    assert console_errors == []


@RENDERERS
def test_a_width_that_has_no_average_shows_the_nodes_own_sentence(page, vue):
    page.evaluate(SET, ["method.sigma_rel", 0.4])
    page.wait_for_function(f"() => ({SENTENCE})().includes('has no average')")
    page.evaluate(SET, ["method.sigma_rel", 0.25])
    wait_for_weights(page, [], len(STEPS))


def test_without_a_link_the_chart_is_an_example_of_ten(page):
    act(page, "window.braid.ema.disconnectInput(0)")
    wait_for_weights(page, [], 10)
    act(page, "window.braid.load.connect(0, window.braid.ema, 0)")
    wait_for_weights(page, [], len(STEPS))


@pytest.fixture
def vue():
    """Whether nodes are drawn by Vue (Nodes 2.0)."""
    return False
