"""What a user does with a graph, done with every live node at once, in both renderers.

One page for each renderer serves all of these tests: `host.live_nodes` has one row for each node.
"""

import json
import re

import pytest
from host.browse import READY, TRACKER, act, remember
from host.find import PACK
from host.live_nodes import KINDS, LIVE_NODES, PICTURED, PREPARE, ROWS
from host.workflows import EXAMPLES, read_workflow

RENDERERS = pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes-2.0"])
SHOWN = "(wanted) => JSON.stringify(live.headings()) === JSON.stringify(wanted)"
CHANGED = """(before) =>
  Object.entries(live.headings()).every(([id, said]) => said && said !== before[id])"""
DRAWN = "() => Object.values(live.headings()).every(Boolean)"


@pytest.fixture
def page(open_page, vue):
    """A page with all live nodes, their widgets at values[0], in a workflow that was opened: only
    of such a one does Nodes 2.0 keep what it has drawn."""
    opened = open_page({"Comfy.VueNodes.Enabled": vue})
    opened.evaluate(PREPARE, ROWS)
    act(opened, "live.build(0)")
    act(opened, "app.loadGraphData(structuredClone(app.graph.serialize()))")
    opened.wait_for_function(DRAWN)
    return opened


@pytest.fixture
def headings(page):
    """What all charts say with their widgets at values[0], [1] and [2]; left at [0]."""
    read = [page.evaluate("live.headings()")]
    for step in (1, 2, 0):
        read.append(turned(page, step, read[-1]))
    assert read.pop() == read[0]
    assert all(len({each[kind] for each in read}) == 3 for kind in KINDS), read
    return read


def turned(page, step: int, before: dict[str, str]) -> dict[str, str]:
    """Turn every widget; what the charts say once each says something else than before."""
    act(page, f"live.turn({step})")
    page.wait_for_function(CHANGED, arg=before)
    page.wait_for_timeout(300)  # a chart that flickers on, or goes back, is caught
    return page.evaluate("live.headings()")


def wait_for(page, headings: dict[str, str]) -> None:
    """Until every chart says this; which do not, where some do not."""
    try:
        page.wait_for_function(SHOWN, arg=headings, timeout=15_000)
    except Exception as error:  # Playwright's own says nothing about the page
        raise AssertionError(f"not {headings} but {page.evaluate('live.headings()')}") from error


def test_the_table_has_every_live_node():
    script = (PACK / "web" / "extension.js").read_text()
    charts = script.split("const CHARTS = {")[1].split("\n};")[0]
    assert re.findall(r"^  (Braid\w+):", charts, re.MULTILINE) == sorted(KINDS, key=charts.index)
    assert re.search(r"const PICTURED = (\[.*\])", script)[1] == json.dumps(PICTURED)


@RENDERERS
def test_undo_and_redo_bring_the_charts_of_their_values_and_leave_them_alive(
    page, headings, console_errors, vue
):
    remember(page)
    for step in (1, 2):
        act(page, f"live.turn({step})")
        wait_for(page, headings[step])
        remember(page)
    for call, step in (("undo", 1), ("undo", 0), ("redo", 1), ("redo", 2), ("undo", 1)):
        act(page, f"{TRACKER}.{call}()")
        page.wait_for_function("(step) => live.steps().every((each) => each === step)", arg=step)
        wait_for(page, headings[step])
    act(page, "live.turn(0)")
    wait_for(page, headings[0])
    assert page.locator(".braid-live:visible").count() == len(LIVE_NODES) + 1  # one source
    assert console_errors == []


@RENDERERS
def test_a_copy_has_charts_of_its_own(page, headings, console_errors, vue):
    page.evaluate("""() => {
      app.canvas.selectItems(app.graph.nodes);
      app.canvas.copyToClipboard();
      app.canvas.pasteFromClipboard();
      live.nth = 1;
    }""")
    wait_for(page, headings[0])
    assert turned(page, 1, headings[0]) == headings[1]
    act(page, "live.nth = 0")
    assert page.evaluate("live.headings()") == headings[0]
    assert turned(page, 2, headings[0]) == headings[2]
    act(page, "live.nth = 1")
    assert page.evaluate("live.headings()") == headings[1]
    assert console_errors == []


@RENDERERS
def test_in_a_subgraph_the_charts_live_on_and_so_after_undo(page, headings, console_errors, vue):
    page.evaluate("""() => {
      app.graph.convertToSubgraph(new Set(app.graph.nodes));
      const holder = app.graph.nodes.find((node) => node.subgraph);
      app.canvas.openSubgraph(holder.subgraph, holder);
    }""")
    wait_for(page, headings[0])
    remember(page)
    assert turned(page, 1, headings[0]) == headings[1]
    remember(page)
    act(page, f"{TRACKER}.undo()")
    page.wait_for_function("live.steps().every((step) => step === 0)")
    wait_for(page, headings[0])
    assert turned(page, 2, headings[0]) == headings[2]
    act(page, "app.canvas.setGraph(app.rootGraph)")
    page.wait_for_function("!document.querySelector('.braid-live')?.clientWidth")
    assert console_errors == []


@RENDERERS
def test_a_workflow_that_gives_the_ids_to_other_nodes_shows_their_charts(
    page, headings, console_errors, vue
):
    """As another tab does: Nodes 2.0 knows a node by its id alone."""
    page.evaluate("""async () => {
      const workflow = app.graph.serialize();
      const ids = workflow.nodes.map((node) => node.id);
      const next = (id) => ids[(ids.findIndex((each) => each == id) + 1) % ids.length];
      for (const node of workflow.nodes) node.id = next(node.id);
      for (const link of workflow.links) [link[1], link[3]] = [next(link[1]), next(link[3])];
      await app.loadGraphData(structuredClone(workflow));
    }""")
    wait_for(page, headings[0])
    assert turned(page, 1, headings[0]) == headings[1]
    assert console_errors == []


@RENDERERS
def test_after_a_reload_of_the_page_the_charts_are_as_they_were(
    page, headings, console_errors, vue
):
    assert turned(page, 1, headings[0]) == headings[1]
    remember(page)
    page.wait_for_timeout(1500)  # until the front end has noted the workflow
    page.reload()
    page.wait_for_function(READY)
    page.evaluate(PREPARE, ROWS)
    wait_for(page, headings[1])
    assert turned(page, 2, headings[1]) == headings[2]
    assert [text for text in console_errors if "graph accessed before" not in text] == []


CONTRASTS = """(selector) => {
  const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const base = rgba(app.graph.nodes[0].renderingBgColor).slice(0, 3);
  const over = ([r, g, b, a], under) => [r, g, b].map((each, i) => each * a + under[i] * (1 - a));
  const around = (element) => element ? [...around(element.parentElement), element] : [];
  const light = (rgb) => {
    const [r, g, b] = rgb.map((each) => each / 255)
      .map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (element) => {
    const ground = around(element)
      .reduce((under, each) => over(rgba(getComputedStyle(each).backgroundColor), under), base);
    const style = getComputedStyle(element);
    const ink = over(rgba(element.matches("text") ? style.fill : style.color), ground);
    const [low, high] = [light(ink), light(ground)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  return [...document.querySelectorAll(selector)]
    .filter((element) => [...element.childNodes].some((node) => node.nodeType === 3))
    .map((element) => [element.textContent, contrast(element)]);
}"""
"""[text, contrast with what is behind it] of each element with text that the selector finds. What
the canvas draws below all elements is taken from the first node."""


def contrasts(page, selector: str) -> list[tuple[float, str]]:
    """(contrast, text), the worst first, in the theme that is on."""
    found = page.evaluate(CONTRASTS, selector)
    return sorted((round(contrast, 2), text) for text, contrast in found)


@pytest.fixture
def themed(page):
    """themed(palette): switch the theme while the page is open; the dark one comes back."""

    def switch(palette: str) -> None:
        act(page, f"app.extensionManager.setting.set('Comfy.ColorPalette', '{palette}')")
        page.wait_for_timeout(500)

    yield switch
    switch("dark")


@RENDERERS
def test_the_text_of_every_chart_is_readable_in_both_themes(page, themed, vue):
    for palette in ("dark", "light"):
        themed(palette)
        found = contrasts(page, ".braid-live *")
        assert len(found) > 20 * len(LIVE_NODES) and found[0][0] >= 4.5, (palette, found[:5])


@RENDERERS
def test_the_text_of_every_note_is_readable_in_both_themes(page, themed, vue):
    notes = [
        node
        for path in EXAMPLES.glob("*.json")
        for node in read_workflow(path)["nodes"]
        if node["type"] == "MarkdownNote"
    ]
    act(page, "app.graph.clear()")
    page.evaluate(
        """(notes) => notes.forEach((note, index) => {
          const node = live.add("MarkdownNote", 440 * index, 0);
          node.configure({ ...note, id: node.id, pos: [440 * index, 0] });
        })""",
        notes,
    )
    page.wait_for_function(
        "document.querySelectorAll(':is(.comfy-markdown-content, .tiptap) h2').length >= 9"
    )
    for palette in ("dark", "light"):
        themed(palette)
        found = contrasts(page, ":is(.comfy-markdown-content, .tiptap) *")
        assert len(found) > 4 * len(notes) and found[0][0] >= 4.5, (palette, found[:5])


TRAIN = """() => {
  app.graph.clear();
  const add = (type, values = {}) => live.add(type, 460 * app.graph.nodes.length, 0, values);
  const link = (from, output, to, input) =>
    from.connect(output, to, to.inputs.findIndex((each) => each.name === input));
  const short = { steps: 3, batch_size: 1, mixed_precision: "no", output_name: "pictured" };
  const train = add("BraidTrainLora", short);
  const data = add("BraidPlaygroundDataset", { count: 2 });
  link(add("BraidPlaygroundModel"), 0, train, "model");
  link(data, 0, train, "latents");
  link(data, 1, train, "positive");
  link(add("BraidNetwork", { network_dim: 1 }), 0, train, "network");
}"""
RUN = """async () => {
  const ended = new Promise((done) => {
    app.api.addEventListener("execution_success", () => done("success"));
    app.api.addEventListener("execution_error", ({ detail }) => done(detail.exception_message));
  });
  await app.queuePrompt(0);
  return ended;
}"""
PICTURES = """() => {
  const node = app.graph.nodes.find((each) => each.type === "BraidTrainLora");
  const element = document.querySelector(`[data-node-id="${node.id}"]`);
  return element ? element.querySelectorAll("img").length : node.imgs?.length ?? 0;
}"""


@RENDERERS
def test_train_lora_shows_one_picture_after_a_run_and_no_second_one_later(
    page, console_errors, vue
):
    page.evaluate(TRAIN)
    remember(page)
    assert page.evaluate(RUN) == "success"
    page.wait_for_function(f"({PICTURES})() > 0")
    page.wait_for_timeout(1000)
    assert page.evaluate(PICTURES) == 1
    act(page, "live.set(app.graph.nodes.at(-1), 'network_dim', 2)")
    remember(page)
    act(page, f"{TRACKER}.undo()")
    page.wait_for_timeout(1000)
    assert page.evaluate(PICTURES) == 1
    page.wait_for_timeout(1000)  # until the front end has noted the workflow
    page.reload()
    page.wait_for_function(READY)
    assert page.evaluate(PICTURES) <= 1
    assert page.evaluate(RUN) == "success"  # answered from the cache
    page.wait_for_function(f"({PICTURES})() > 0")
    page.wait_for_timeout(1000)
    assert page.evaluate(PICTURES) == 1


LISTED = """(folder) => app.graph.nodes.find((node) => node.type === "BraidLoadCheckpoints")
  .widgets.find((widget) => widget.name === "folder").options.values.includes(folder)"""


@RENDERERS
def test_a_list_of_files_has_what_a_run_wrote_without_a_refresh(page, console_errors, vue):
    folder = f"listed_{vue}"
    page.evaluate(TRAIN)
    act(page, f"live.set(app.graph.nodes[0], 'output_name', '{folder}')")
    act(page, "live.add('BraidLoadCheckpoints', 0, -400)")
    assert not page.evaluate(LISTED, folder)
    assert page.evaluate(RUN) == "success"
    page.wait_for_function(LISTED, arg=folder, timeout=10_000)
    assert console_errors == []
