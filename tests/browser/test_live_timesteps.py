"""The live timestep chart in a real browser against a real ComfyUI, in both node renderers."""

import json

import pytest
from host.browse import act

RENDERERS = pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes-2.0"])
BUILD = """(mode) => {
  const add = (type, x, y) => {
    const node = LiteGraph.createNode(type);
    node.pos = [x, y];
    app.graph.add(node);
    return node;
  };
  const sampling = add("BraidTimestepSampling", 0, 0);
  const preview = add("BraidTimestepPreview", 440, 0);
  const text = add("PreviewAny", 860, 0);
  sampling.connect(0, preview, 0);
  preview.connect(2, text, 0);
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [120, 120];
  app.canvas.setDirty(true, true);
  sampling.widgets.find((w) => w.name === "timestep_sampling").value = mode;
  window.braid = { sampling, preview, text };
}"""
SET = """([node, name, value]) => {
  window.braid[node].widgets.find((w) => w.name === name).value = value;
}"""
CHART = """(node) => {
  const widget = window.braid[node].widgets.find((w) => w.name === "braid_live");
  const bins = widget.element.querySelectorAll(".braid-bin");
  return [...bins].map((bin) => Number(bin.dataset.count));
}"""
SENTENCE = """(node) => {
  const widget = window.braid[node].widgets.find((w) => w.name === "braid_live");
  return widget.element.querySelector("p")?.textContent ?? "";
}"""
CHANGED = f"""([node, before]) => {{
  const now = ({CHART})(node);
  return now.length > 0 && JSON.stringify(now) !== before;
}}"""
NUMBER_WIDGET = """([node, name]) => {
  const [x, y] = window.braid[node].pos;
  const widget = window.braid[node].widgets.find((w) => w.name === name);
  const { scale, offset } = app.canvas.ds;
  const { left, top } = app.canvas.canvas.getBoundingClientRect();
  const middle = [x + 0.5 * window.braid[node].size[0], y + widget.last_y + 10];
  return [(middle[0] + offset[0]) * scale + left, (middle[1] + offset[1]) * scale + top];
}"""


@pytest.fixture
def vue():
    """Whether nodes are drawn by Vue (Nodes 2.0)."""
    return False


@pytest.fixture
def page(open_page, vue):
    """A page with a linked sampling and preview node, its chart drawn."""
    opened = open_page({"Comfy.VueNodes.Enabled": vue})
    opened.evaluate(BUILD, "shift")
    wait_for_change(opened, "preview", [])
    return opened


def wait_for_change(page, node: str, before: list[int]) -> list[int]:
    page.wait_for_function(CHANGED, arg=[node, json.dumps(before, separators=(",", ":"))])
    return page.evaluate(CHART, node)


def wait_for_counts(page, counts: list[int]) -> None:
    wanted = json.dumps(counts, separators=(",", ":"))
    page.wait_for_function(
        f"(wanted) => JSON.stringify(({CHART})('preview')) === wanted", arg=wanted
    )


def wait_for_sentence(page, node: str, start: str) -> str:
    page.wait_for_function(
        f"([node, start]) => ({SENTENCE})(node).startsWith(start)", arg=[node, start]
    )
    return page.evaluate(SENTENCE, node)


def run_statistics(page, server) -> dict:
    """Queue the graph as it is on the page; the node's `statistics`."""
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    node_id = str(page.evaluate("window.braid.text.id"))
    return json.loads(server.queue(prompt)["outputs"][node_id]["text"][0])


@RENDERERS
def test_the_chart_follows_a_widget_and_equals_the_statistics_of_a_run(page, server, vue):
    before = page.evaluate(CHART, "preview")
    page.evaluate(SET, ["sampling", "timestep_sampling.discrete_flow_shift", 7.0])
    after = wait_for_change(page, "preview", before)
    assert len(after) == 50 and sum(after) == 100_000
    assert after == run_statistics(page, server)["counts"]


@RENDERERS
def test_the_chart_follows_the_mode_the_size_and_the_bins(page, server, vue):
    counts = page.evaluate(CHART, "preview")
    for node, name, value in (
        ("sampling", "timestep_sampling", "qinglong_flux"),
        ("preview", "width", 512),
        ("sampling", "num_timestep_buckets", 8),
        ("preview", "bins", 20),
    ):
        page.evaluate(SET, [node, name, value])
        counts = wait_for_change(page, "preview", counts)
    assert len(counts) == 20
    statistics = run_statistics(page, server)
    assert counts == statistics["counts"] and statistics["width"] == 512


def test_the_chart_changes_while_the_mouse_drags_a_value(page, server):
    before = page.evaluate(CHART, "preview")
    x, y = page.evaluate(NUMBER_WIDGET, ["sampling", "max_timestep"])
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 60, y, steps=6)
    during = wait_for_change(page, "preview", before)
    page.mouse.move(x - 90, y, steps=6)
    wait_for_change(page, "preview", during)
    page.mouse.up()
    value = page.evaluate("braid.sampling.widgets.find((w) => w.name === 'max_timestep').value")
    assert value < 1000
    wait_for_counts(page, run_statistics(page, server)["counts"])


@RENDERERS
def test_a_broken_setting_shows_the_nodes_own_sentence_and_mending_it_the_chart(page, vue):
    page.evaluate(SET, ["sampling", "min_timestep", 700])
    page.evaluate(SET, ["sampling", "max_timestep", 300])
    sentence = (
        "min_timestep is 700 and max_timestep is 300; they must satisfy 0 <= min < max <= 1000"
    )
    shown = [wait_for_sentence(page, node, sentence) for node in ("preview", "sampling")]
    assert shown[0] == shown[1]
    assert page.evaluate(CHART, "preview") == []
    page.evaluate(SET, ["sampling", "max_timestep", 1000])
    wait_for_change(page, "preview", [])


def test_an_unlinked_preview_says_what_to_connect(page):
    act(page, "window.braid.preview.disconnectInput(0)")
    wait_for_sentence(page, "preview", "Connect a Timestep Sampling node")


def test_the_chart_follows_through_a_reroute_and_a_subgraph(page):
    page.evaluate("""() => {
      const { sampling, preview } = window.braid;
      const reroute = LiteGraph.createNode("Reroute");
      app.graph.add(reroute);
      sampling.connect(0, reroute, 0);
      reroute.connect(0, preview, 0);
    }""")
    before = page.evaluate(CHART, "preview")
    page.evaluate(SET, ["sampling", "min_timestep", 400])
    before = wait_for_change(page, "preview", before)
    page.evaluate("""() => {
      app.graph.convertToSubgraph(new Set([window.braid.sampling]));
      const holder = app.graph.nodes.find((node) => node.subgraph);
      window.braid.sampling = holder.subgraph.nodes[0];
    }""")
    page.evaluate(SET, ["sampling", "max_timestep", 800])
    wait_for_change(page, "preview", before)


def test_a_size_that_only_a_run_knows_says_so(page):
    page.evaluate("""() => {
      const size = LiteGraph.createNode("GetImageSize");
      app.graph.add(size);
      const { preview } = window.braid;
      size.connect(0, preview, preview.inputs.findIndex((input) => input.name === "width"));
    }""")
    wait_for_sentence(page, "preview", "width comes from a linked node")


@RENDERERS
def test_a_saved_workflow_opens_with_the_same_widgets_and_chart(page, server, vue):
    page.evaluate(SET, ["sampling", "timestep_sampling", "qinglong_qwen"])
    page.evaluate(SET, ["sampling", "timestep_sampling.mid_ratio", 0.5])
    page.evaluate(SET, ["sampling", "num_timestep_buckets", 6])
    counts = run_statistics(page, server)["counts"]
    wait_for_counts(page, counts)
    page.evaluate("""async () => {
      const find = (type) => app.graph.nodes.find((node) => node.type === type);
      await app.loadGraphData(JSON.parse(JSON.stringify(app.graph.serialize())));
      const [sampling, preview] = ["Sampling", "Preview"].map((end) => find(`BraidTimestep${end}`));
      window.braid = { sampling, preview };
    }""")
    wait_for_counts(page, counts)
    assert page.evaluate(
        "braid.sampling.widgets.find((w) => w.name === 'timestep_sampling.mid_ratio').value"
    ) == pytest.approx(0.5)


@RENDERERS
def test_the_chart_prints_nothing_to_the_console(page, console_errors, vue):
    page.evaluate(SET, ["sampling", "min_timestep", 1000])
    wait_for_sentence(page, "preview", "min_timestep is 1000")
    act(page, "window.braid.preview.graph.remove(window.braid.preview)")
    page.wait_for_timeout(300)
    assert console_errors == []


@pytest.mark.parametrize("node_id", ["BraidTimestepSampling", "BraidTimestepPreview"])
def test_the_nodes_help_page_is_served(server, node_id):
    page = server.get_bytes(f"/extensions/My-Pack/docs/{node_id}.md").decode()
    assert page.startswith("# ")
