"""A Japanese and a Chinese user's first minute: nodes, tooltips and help in their language."""

import contextlib
import re

import pytest
from host.browse import act
from host.find import PACK
from host.live_nodes import PREPARE, ROWS
from host.locales import LANGUAGES, translated
from host.texts import translations

DOCS = PACK / "web" / "docs"
SAMPLING = "BraidTimestepSampling"
IN_EACH_LANGUAGE = pytest.mark.parametrize("language", LANGUAGES)
RENDERERS = pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes-2.0"])
BUILD = """(type) => {
  const node = LiteGraph.createNode(type);
  node.pos = [0, 0];
  app.graph.add(node);
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [120, 200];
  app.canvas.setDirty(true, true);
  window.node = node;
}"""
LABELS = """() => ({
  title: node.title,
  widgets: Object.fromEntries(node.widgets.filter((w) => w.label).map((w) => [w.name, w.label])),
  outputs: node.outputs.map((output) => output.localized_name),
})"""
SET = """([end, value]) => {
  node.widgets.find((w) => w.name.endsWith(end)).value = value;
}"""
CHART = """() => {
  const { element } = node.widgets.find((w) => w.name === "braid_live");
  return [...element.querySelectorAll(".braid-bin")].map((bin) => bin.dataset.count).join();
}"""
PLACE = """(name) => {
  const widget = node.widgets.find((w) => w.name === name);
  const { scale, offset } = app.canvas.ds;
  const { left, top } = app.canvas.canvas.getBoundingClientRect();
  const down = widget ? widget.last_y + 10 : -15;  // else the title
  const at = [node.pos[0] + 0.5 * node.size[0], node.pos[1] + down];
  return [(at[0] + offset[0]) * scale + left, (at[1] + offset[1]) * scale + top];
}"""
SENTENCES = """() => {
  const add = (type, values = {}) => live.add(type, 460 * app.graph.nodes.length, 1400, values);
  const panel = (name, node) => Object.assign(node, { title: name });
  panel("unlinked", add("BraidTimestepPreview"));
  panel("auto", add("BraidMagCache"));
  panel("few steps", add("BraidMagCachePlan", { steps: 8 }));
  panel("no calibration", add("BraidMagCachePlan", { rule: "planned" }));
  panel("no checkpoints between", add("BraidPostHocEma", { first: 5, last: 2 }));
  const train = add("BraidTrainLora");
  train.connect(2, panel("one file", add("BraidPostHocEma")), 0);
  app.canvas.ds.scale = 0.2; // all of them on screen
}"""
ALL_SAY = """() => {
  const panels = app.graph.nodes.map(live.panel).filter(Boolean);
  return panels.every((panel) => panel.clientWidth && panel.querySelector("header, p"));
}"""
"""Every chart is drawn, or says why not."""
TEXTS = """() => {
  const nodesOf = (root) => {
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    return Array.from({ length: 1e4 }, () => walker.nextNode()).filter(Boolean);
  };
  const spoken = ["aria-label", "aria-valuetext", "data-reading", "data-waiting"];
  const texts = (panel) => [
    ...nodesOf(panel).map((node) => node.textContent),
    ...[panel, ...panel.querySelectorAll("*")].flatMap((element) =>
      spoken.map((name) => element.getAttribute(name)).filter(Boolean)),
  ];
  const charts = app.graph.nodes.filter(live.panel);
  return Object.fromEntries(charts.map((node) => [node.title, texts(live.panel(node))]));
}"""
"""All that the charts show, and say to a screen reader, by the title of the node."""
WORD = re.compile(r"[A-Za-z](?:[\w.-]*\w)?", re.ASCII)
NAMES = set(
    "sigma sigma_rel flux_shift log-SNR t T k px LoRA Braid MagCache FLUX.1-dev magcache planned "
    "reuse auto".split()
)
"""Words in every language: symbols, products, and what a widget chooses among."""
HELP = ".node-help-content"
UNLOADED = f"""() => [...document.querySelectorAll("{HELP} img")]
  .filter((picture) => picture.complete && !picture.naturalWidth).map((picture) => picture.src)"""


@pytest.fixture
def speak(server, open_page):
    """speak(language, vue) -> a page of a user with those settings."""
    yield lambda language, vue: open_page({"Comfy.Locale": language, "Comfy.VueNodes.Enabled": vue})
    server.post("/settings/Comfy.Locale", "en")


def first_heading(node_id: str, language: str) -> str:
    path = DOCS / f"{node_id}.md" if language == "en" else DOCS / node_id / f"{language}.md"
    return path.read_text(encoding="utf-8").split("\n")[0].removeprefix("# ").replace("`", "")


def pages_with_pictures() -> list[str]:
    return [page.stem for page in sorted(DOCS.glob("*.md")) if "](pictures/" in page.read_text()]


def tooltip_of(page, name: str, label: str, vue: bool) -> str:
    """What is shown where the mouse rests on a widget."""
    if vue:
        page.get_by_text(label, exact=True).first.hover()
        shown = page.locator("[role=tooltip]").last
    else:
        page.mouse.move(*page.evaluate(PLACE, name))
        shown = page.locator(".node-tooltip")
    shown.wait_for()
    text = shown.text_content()
    page.mouse.move(5, 500)
    shown.wait_for(state="hidden")
    return text


def open_help(page) -> None:
    """Click the node's title until its toolbox shows, because a first click may come before the
    first frame; then the info button in it."""
    from playwright.sync_api import TimeoutError  # without playwright these tests are skipped

    button = page.get_by_test_id("info-button")
    for _ in range(20):
        page.mouse.click(*page.evaluate(PLACE, "title"))
        with contextlib.suppress(TimeoutError):
            return button.click(timeout=1000)
    raise AssertionError("no toolbox appears above the node")


@RENDERERS
@IN_EACH_LANGUAGE
def test_title_labels_and_tooltips_are_translated_and_the_chart_lives(
    language, vue, speak, console_errors
):
    texts = translated(language)[SAMPLING]
    page = speak(language, vue)
    page.evaluate(BUILD, SAMPLING)
    page.wait_for_function(f"() => ({CHART})() !== ''")
    before = page.evaluate(CHART)
    page.evaluate(
        "() => { node.widgets.find((w) => w.name === 'timestep_sampling').value = 'shift' }"
    )
    page.wait_for_function(f"(before) => !['', before].includes(({CHART})())", arg=before)
    before = page.evaluate(CHART)
    page.evaluate(SET, [".discrete_flow_shift", 7])
    page.wait_for_function(f"(before) => !['', before].includes(({CHART})())", arg=before)

    shown = page.evaluate(LABELS)
    assert shown["title"] == texts["display_name"]
    assert shown["outputs"] == [texts["outputs"]["0"]["name"]]
    for name, label in shown["widgets"].items():
        assert label == texts["inputs"][name.replace(".", "_")]["name"], name
    for name in ("min_timestep", "timestep_sampling.discrete_flow_shift"):
        expected = texts["inputs"][name.replace(".", "_")]["tooltip"]
        assert tooltip_of(page, name, shown["widgets"][name], vue) == expected
    assert console_errors == []


@RENDERERS
@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_the_info_button_opens_the_page_with_its_pictures(language, vue, speak, console_errors):
    page = speak(language, vue)
    for node_id in dict.fromkeys([SAMPLING, *pages_with_pictures()]):
        act(page, "app.graph.clear()")
        page.evaluate(BUILD, node_id)
        open_help(page)
        heading = page.locator(f"{HELP} h1").filter(has_text=first_heading(node_id, language))
        heading.wait_for()
        page.wait_for_function(
            f'() => [...document.querySelectorAll("{HELP} img")].every((p) => p.complete)'
        )
        pictures = page.locator(f"{HELP} img").count()
        assert pictures == count_of_pictures(node_id), node_id
        assert page.evaluate(UNLOADED) == []
    # The front end asks for docs/<id>/en.md before it takes docs/<id>.md.
    assert [error for error in console_errors if not error.endswith("/en.md")] == []


def count_of_pictures(node_id: str) -> int:
    return len(re.findall(r"!\[[^\]]*\]\(", (DOCS / f"{node_id}.md").read_text()))


@IN_EACH_LANGUAGE
def test_charts_and_their_sentences_have_no_english_but_names(language, speak, console_errors):
    page = speak(language, False)
    page.evaluate(PREPARE, ROWS)
    page.evaluate("() => live.build(0)")
    page.evaluate(SENTENCES)
    page.wait_for_function(ALL_SAY)
    shown = page.evaluate(TEXTS)
    assert len(shown) == len(ROWS) + 7, "the rows, a source of one, and the sentences"
    english = {
        title: sorted(words)
        for title, texts in shown.items()
        if (words := {word for text in texts for word in WORD.findall(text)} - NAMES)
    }
    assert english == {}
    assert console_errors == []


@IN_EACH_LANGUAGE
def test_a_server_that_is_away_is_said_in_the_users_language(language, speak):
    page = speak(language, False)
    page.route("**/braid/live/*", lambda route: route.abort())
    page.evaluate(BUILD, SAMPLING)
    sentence = translations(language)["Waiting for the ComfyUI server…"]
    page.get_by_text(sentence).wait_for()
