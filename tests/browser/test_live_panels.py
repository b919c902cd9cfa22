"""What all live charts share: quiet, sparing, readable by keyboard, honest without a server."""

import pytest
from host.browse import TRACKER, act, remember
from host.live_nodes import KINDS

RENDERERS = pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes-2.0"])
PREPARE = """(kinds) => {
  const { setInterval, clearInterval } = window;
  const clocks = new Set();
  window.setInterval = (call, ms, ...rest) => {
    const id = setInterval(call, ms, ...rest);
    if (new Error().stack.includes("/live/panel.js")) clocks.add(id);
    return id;
  };
  window.clearInterval = (id) => (clocks.delete(id), clearInterval(id));
  window.rejected = [];
  window.addEventListener("unhandledrejection", (event) => rejected.push(String(event.reason)));
  const nodes = () => app.graph.nodes.filter((node) => kinds.includes(node.type));
  const add = (type, x = 0) => {
    const node = LiteGraph.createNode(type);
    node.pos = [x, 0];
    app.graph.add(node);
    return node;
  };
  const set = (node, name, value) => {
    node.widgets.find((widget) => widget.name === name).value = value;
  };
  const slot = (node, name) => node.inputs.findIndex((input) => input.name === name);
  const panel = (node) => node?.widgets?.find((widget) => widget.name === "braid_live")?.element;
  const text = (node) => panel(node)?.textContent ?? ""; // undo empties the graph first
  window.live = { clocks, nodes, add, set, slot, panel, text };
  app.canvas.ds.scale = 0.5;
  app.canvas.ds.offset = [200, 200];
}"""
ADD_ALL = """(kinds) => {
  kinds.forEach((kind, index) => live.add(kind, 440 * index));
  const [sampling, preview] = live.nodes();
  sampling.connect(0, preview, 0);
  live.set(live.nodes()[3], "preset", "FLUX.1-dev");
}"""
DRAWN = """(count) => {
  const shown = [...document.querySelectorAll(".braid-live")].filter((each) => each.clientWidth);
  return shown.length === count && shown.every((each) => each.querySelector("svg"));
}"""
CENTRE = """(node) => {
  const { x, y, width, height } = live.panel(node).getBoundingClientRect();
  return [x + 0.6 * width, y + 0.6 * height];
}"""


@pytest.fixture
def vue():
    """Whether nodes are drawn by Vue (Nodes 2.0)."""
    return False


@pytest.fixture
def page(open_page, vue):
    """A page on an empty graph with `live`, helpers to build and read nodes."""
    opened = open_page({"Comfy.VueNodes.Enabled": vue})
    opened.evaluate(PREPARE, KINDS)
    return opened


@pytest.fixture
def messages(page):
    """Everything the page prints from now on, of any kind, but for the front end's first template,
    which asks for its models' sizes."""
    printed = []

    def heard(message):
        if "Content Security Policy" not in message.text:
            printed.append(message.text)

    def raised(error):
        printed.append(str(error))

    page.on("console", heard)
    page.on("pageerror", raised)
    yield printed
    page.remove_listener("console", heard)
    page.remove_listener("pageerror", raised)


def wait_for_charts(page, count: int = len(KINDS)) -> None:
    page.wait_for_function(DRAWN, arg=count)


def wait_for_text(page, node: str, part: str) -> str:
    """Until the panel of the node (an expression) says `part`; its whole text."""
    said = f"(part) => live.text({node}).includes(part) && live.text({node})"
    return page.wait_for_function(said, arg=part, timeout=30_000).json_value()


def switch_renderer(page, vue: bool) -> None:
    act(page, f"app.extensionManager.setting.set('Comfy.VueNodes.Enabled', {str(vue).lower()})")


def settle(page) -> None:
    page.wait_for_timeout(400)


@RENDERERS
def test_a_graphs_life_prints_nothing_and_leaves_nothing_running(page, messages, vue):
    page.evaluate(ADD_ALL, KINDS)
    wait_for_charts(page)
    page.evaluate("""() => {
      app.canvas.selectItems(live.nodes());
      app.canvas.copyToClipboard();
      app.canvas.pasteFromClipboard();
    }""")
    wait_for_charts(page, 10)
    act(page, "app.canvas.deleteSelected()")
    wait_for_charts(page)
    page.evaluate("live.nodes().forEach((node) => node.collapse())")
    wait_for_charts(page, 0)
    assert page.evaluate("live.clocks.size") == 0
    page.evaluate("live.nodes().forEach((node) => node.collapse())")
    wait_for_charts(page)
    for size in ([220, 700], [700, 500]):
        page.evaluate("(size) => live.nodes().forEach((node) => node.setSize(size))", size)
        settle(page)
    act(page, "app.loadGraphData(structuredClone(app.graph.serialize()))")
    wait_for_charts(page)
    switch_renderer(page, not vue)
    settle(page)
    wait_for_charts(page)
    switch_renderer(page, vue)
    settle(page)
    wait_for_charts(page)
    act(page, "app.graph.convertToSubgraph(new Set(live.nodes()))")
    wait_for_charts(page, 0)
    page.evaluate("""() => {
      const holder = app.graph.nodes.find((node) => node.subgraph);
      app.canvas.openSubgraph(holder.subgraph, holder);
    }""")
    wait_for_charts(page)
    assert page.evaluate("live.clocks.size") == len(KINDS)
    act(page, "app.canvas.setGraph(app.rootGraph)")
    wait_for_charts(page, 0)
    act(page, "app.graph.clear()")
    settle(page)
    assert page.evaluate("live.clocks.size") == 0
    assert messages + page.evaluate("rejected") == []


@RENDERERS
def test_undo_and_redo_bring_the_chart_of_their_value(page, messages, vue):
    """By what the keys call: their release takes a step too, and whether it comes before the redo,
    which it then ends, is the front end's race."""
    act(page, "live.add('BraidTimestepSampling')")
    act(page, "live.set(live.nodes()[0], 'timestep_sampling', 'shift')")
    wait_for_text(page, "live.nodes()[0]", "shift 3")
    remember(page)
    act(page, "live.set(live.nodes()[0], 'timestep_sampling.discrete_flow_shift', 9)")
    wait_for_text(page, "live.nodes()[0]", "shift 9")
    remember(page)
    act(page, f"{TRACKER}.undo()")
    wait_for_text(page, "live.nodes()[0]", "shift 3")
    act(page, f"{TRACKER}.redo()")
    wait_for_text(page, "live.nodes()[0]", "shift 9")
    assert page.evaluate("live.clocks.size") == 1
    assert messages + page.evaluate("rejected") == []


@RENDERERS
def test_a_chart_is_a_named_slider_that_the_arrow_keys_read(page, vue):
    act(page, "window.node = live.add('BraidTimestepPreview')")
    wait_for_text(page, "node", "Connect a Timestep Sampling node")
    assert page.evaluate("live.panel(node).tabIndex") == -1  # a sentence has nothing to operate
    assert page.evaluate("live.panel(node).firstChild.getAttribute('role')") == "status"
    act(page, "live.add('BraidTimestepSampling', -440).connect(0, node, 0)")
    wait_for_charts(page, 2)
    role, label = page.evaluate(
        "['role', 'aria-label'].map((name) => live.panel(node).getAttribute(name))"
    )
    assert role == "slider"
    assert label.startswith("Timestep distribution, sigma. mean 0.5")
    page.keyboard.press("Tab")  # from here on the browser shows focus
    act(page, "live.panel(node).focus()")
    assert page.evaluate("getComputedStyle(live.panel(node)).outlineStyle") == "solid"
    for key, start, now in (
        ("ArrowRight", "t 0.000 to 0.020: ", "1"),
        ("ArrowRight", "t 0.020 to 0.040: ", "2"),
        ("End", "t 0.980 to 1.000: ", "50"),
        ("ArrowLeft", "t 0.960 to 0.980: ", "49"),
    ):
        page.keyboard.press(key)
        value = page.evaluate("live.panel(node).getAttribute('aria-valuetext')")
        assert value.startswith(start)
        assert page.evaluate("live.panel(node).getAttribute('aria-valuenow')") == now
        assert (
            page.evaluate("live.panel(node).querySelector('.braid-reading').textContent") == value
        )
    act(page, "live.set(node, 'bins', 10)")
    page.wait_for_function("live.panel(node).getAttribute('aria-valuemax') === '10'")
    assert page.evaluate("document.activeElement === live.panel(node)")


@RENDERERS
def test_the_keys_of_the_graph_stay_the_graphs(page, vue):
    act(page, "window.node = live.add('BraidTimestepSampling')")
    wait_for_charts(page, 1)
    page.evaluate("""() => {
      window.heard = [];
      window.onkeydown = (event) => heard.push(event.key); // one, however many tests share the page
    }""")
    page.mouse.click(*page.evaluate(f"({CENTRE})(node)"))
    page.keyboard.press("ArrowRight")  # after a click, arrows move the selected nodes
    page.keyboard.press("Tab")
    act(page, "live.panel(node).focus()")
    page.keyboard.press("ArrowRight")  # after Tab, they read the chart
    page.keyboard.press("Escape")
    page.keyboard.press("x")
    assert page.evaluate("heard") == ["ArrowRight", "Tab", "Escape", "x"]


def test_on_the_canvas_the_chart_lets_the_graph_zoom_pan_and_open_the_nodes_menu(page, messages):
    act(page, "window.node = live.add('BraidTimestepSampling')")
    wait_for_charts(page, 1)
    x, y = page.evaluate(f"({CENTRE})(node)")
    page.mouse.move(x, y)
    page.mouse.wheel(0, -100)
    page.wait_for_function("app.canvas.ds.scale > 0.5")
    before = page.evaluate("[...app.canvas.ds.offset]")
    page.mouse.down(button="middle")
    page.mouse.move(x + 60, y + 30, steps=3)
    page.mouse.up(button="middle")
    assert page.evaluate("[...app.canvas.ds.offset]") != before
    page.mouse.click(x + 60, y + 30, button="right")
    page.wait_for_selector(".litecontextmenu")
    assert messages == []


@RENDERERS
def test_pointing_at_a_column_says_its_numbers(page, vue):
    act(page, "window.node = live.add('BraidMagCachePlan')")
    wait_for_charts(page, 1)
    page.mouse.move(*page.evaluate(f"({CENTRE})(node)"))
    page.wait_for_function("live.panel(node).querySelector('.braid-reading').textContent")
    reading = page.evaluate("live.panel(node).querySelector('.braid-reading').textContent")
    assert reading.startswith("step 1") and " of 28, σ 0." in reading


@RENDERERS
def test_a_fast_drag_asks_one_at_a_time_and_the_last_value_wins(page, vue):
    act(page, "window.node = live.add('BraidTimestepSampling')")
    act(page, "live.set(node, 'timestep_sampling', 'shift')")
    wait_for_text(page, "node", "shift 3")
    held = []
    page.route("**/braid/live/timesteps", lambda route: held.append(route))
    for step in range(20):
        value = f"live.set(node, 'timestep_sampling.discrete_flow_shift', {4 + step})"
        page.evaluate(value)
        page.wait_for_timeout(50)
    assert len(held) == 1
    page.wait_for_function("live.panel(node).getAttribute('aria-busy') === 'true'")
    held.pop().continue_()
    page.wait_for_timeout(300)
    assert len(held) == 1
    held.pop().continue_()
    wait_for_text(page, "node", "shift 23")
    assert page.evaluate("live.panel(node).getAttribute('aria-busy')") == "false"
    assert held == []


@RENDERERS
def test_a_removed_node_leaves_no_request(page, vue):
    act(page, "window.node = live.add('BraidTimestepSampling')")
    wait_for_charts(page, 1)
    held, failed = [], []
    page.route("**/braid/live/timesteps", lambda route: held.append(route))
    page.on("requestfailed", lambda request: failed.append(request.failure))
    act(page, "live.set(node, 'min_timestep', 300)")
    settle(page)
    assert len(held) == 1 and failed == []
    act(page, "app.graph.remove(node)")
    settle(page)
    assert len(failed) == 1 and page.evaluate("live.clocks.size") == 0


@RENDERERS
def test_without_a_server_every_panel_says_so_one_tries_and_all_come_back(page, vue):
    page.evaluate(ADD_ALL, KINDS)
    wait_for_charts(page)
    tries = []
    page.route("**/braid/live/*", lambda route: (tries.append(route), route.abort()))
    page.evaluate("""() => {
      live.set(live.nodes()[0], "min_timestep", 300);
      live.set(live.nodes()[2], "first", 3);
    }""")
    for index in range(3):
        wait_for_text(page, f"live.nodes()[{index}]", "Waiting for the ComfyUI server")
    page.wait_for_timeout(3500)
    assert len(tries) <= 3 + 2  # each once, then one for all after three seconds
    page.unroute("**/braid/live/*")
    wait_for_charts(page)
    wait_for_text(page, "live.nodes()[2]", "8 checkpoints")
    page.route("**/braid/live/*", lambda route: route.fulfill(status=502, body="bad gateway"))
    act(page, "live.set(live.nodes()[2], 'first', 4)")
    wait_for_text(page, "live.nodes()[2]", "The ComfyUI server answers 502")
    assert page.evaluate("rejected") == []


def test_a_bypassed_or_muted_source_counts_as_none(page):
    act(page, "window.node = live.add('BraidTimestepPreview')")
    act(page, "window.source = live.add('BraidTimestepSampling', -440)")
    act(page, "source.connect(0, node, 0)")
    wait_for_charts(page, 2)
    for mode in (4, 2):
        page.evaluate("(mode) => { source.mode = mode; }", mode)
        wait_for_text(page, "node", "Connect a Timestep Sampling node")
        act(page, "source.mode = 0")
        wait_for_charts(page, 2)


OTHER_PACKS = """() => {
  const register = (type, make) => {
    class Other extends LiteGraph.LGraphNode {
      constructor(title) {
        super(title);
        this.addInput("", "*");
        this.addOutput("", "*");
        make(this);
      }
    }
    Other.title = type;
    LiteGraph.registerNodeType(type, Other);
  };
  live.complaints = 0;
  const virtual = (node) => { node.isVirtualNode = true; };
  register("test/set", virtual);
  register("test/get", (node) => {
    virtual(node);
    node.getInputLink = (slot) => {
      const set = node.graph.nodes.find((each) => each.type === "test/set");
      if (!set) live.complaints += 1;
      return set ? node.graph.getLink(set.inputs[slot].link) : null;
    };
  });
  register("test/reroute", virtual);
  register("test/switch", () => {});
  register("test/slider", (node) => {
    node.addWidget("number", "value", 30, () => {});
    node.addWidget("number", "min", 10, () => {});
  });
}"""
"""Nodes as other packs make them: some exist in the browser alone, some decide while they run."""


def test_nodes_that_are_never_queued_are_followed_and_asked_once_when_they_lead_nowhere(page):
    page.evaluate(OTHER_PACKS)
    page.evaluate("""() => {
      window.source = live.add("BraidTimestepSampling", -440);
      window.set = live.add("test/set");
      source.connect(0, set, 0);
      const reroute = live.add("test/reroute", 200);
      live.add("test/get", 100).connect(0, reroute, 0);
      window.node = live.add("BraidTimestepPreview", 440);
      reroute.connect(0, node, 0);
    }""")
    wait_for_charts(page, 2)
    act(page, "app.graph.remove(set)")
    wait_for_text(page, "node", "Connect a Timestep Sampling node")
    settle(page)
    assert page.evaluate("live.complaints") == 1
    act(page, "source.connect(0, live.add('test/set'), 0)")
    wait_for_charts(page, 2)


def test_a_link_that_use_everywhere_will_add_is_followed(page):
    act(page, "window.node = live.add('BraidTimestepPreview')")
    act(page, "window.source = live.add('BraidTimestepSampling', -440)")
    wait_for_text(page, "node", "Connect a Timestep Sampling node")
    page.evaluate("""() => {
      const from = { upstream: source.id, upstream_slot: 0 };
      app.graph.extra.ue_links = [{ ...from, downstream: node.id, downstream_slot: 0 }];
    }""")
    wait_for_charts(page, 2)
    act(page, "app.graph.extra.ue_links = []")
    wait_for_text(page, "node", "Connect a Timestep Sampling node")


@pytest.mark.parametrize(
    ("source", "kind", "name"),
    [
        ("test/switch", "BraidTimestepPreview", "timesteps"),
        ("test/switch", "BraidPostHocEma", "checkpoints"),
        ("test/slider", "BraidTimestepPreview", "bins"),
    ],
)
def test_what_another_packs_node_hands_on_is_left_to_the_run(page, source, kind, name):
    page.evaluate(OTHER_PACKS)
    page.evaluate(
        """([source, kind, name]) => {
          window.node = live.add(kind);
          if (name === "bins") live.add("BraidTimestepSampling", -440).connect(0, node, 0);
          live.add(source, -880).connect(0, node, live.slot(node, name));
        }""",
        [source, kind, name],
    )
    wait_for_text(page, "node", f"{name} comes from a linked node: run the graph")


def test_a_plan_that_another_packs_node_hands_on_outweighs_the_preset(page):
    page.evaluate(OTHER_PACKS)
    act(page, "window.node = live.add('BraidMagCache')")
    act(page, "live.set(node, 'preset', 'FLUX.1-dev')")
    wait_for_text(page, "node", "steps computed")
    act(page, "live.add('test/switch', -440).connect(0, node, live.slot(node, 'plan'))")
    wait_for_text(page, "node", "once the connected plan has been measured")


def test_the_sampler_is_found_behind_nodes_that_are_never_queued(page):
    page.evaluate(OTHER_PACKS)
    page.evaluate("""() => {
      window.node = live.add("BraidMagCache");
      live.set(node, "preset", "FLUX.1-dev");
      node.connect(0, live.add("test/set", 440), 0);
      window.sampler = live.add("KSampler", 880);
      live.add("test/get", 660).connect(0, sampler, 0);
      live.set(sampler, "steps", 13);
    }""")
    wait_for_text(page, "node", "of 13 steps computed")
    act(page, "node.mode = 4")  # bypassed, its strip still says what it would do
    settle(page)
    wait_for_text(page, "node", "of 13 steps computed")
    act(page, "node.mode = 0")
    act(page, "live.add('test/switch', 660).connect(0, sampler, live.slot(sampler, 'steps'))")
    wait_for_text(page, "node", "The sampler's steps come from a linked node")


@pytest.mark.parametrize("primitive", ["PrimitiveFloat", "PrimitiveNode"])
def test_a_value_from_a_primitive_is_followed(page, primitive):
    act(page, "window.node = live.add('BraidTimestepSampling')")
    act(page, "live.set(node, 'timestep_sampling', 'shift')")
    wait_for_text(page, "node", "shift 3")
    page.evaluate(
        """(type) => {
          window.primitive = live.add(type, -440);
          primitive.connect(0, node, live.slot(node, "timestep_sampling.discrete_flow_shift"));
          primitive.widgets[0].value = 12;
        }""",
        primitive,
    )
    wait_for_text(page, "node", "shift 12")


@RENDERERS
def test_inside_a_subgraph_a_promoted_widget_is_followed(page, vue):
    page.evaluate("""() => {
      const primitive = live.add("PrimitiveFloat", -440);
      const node = live.add("BraidPostHocEma");
      primitive.connect(0, node, live.slot(node, "method.sigma_rel"));
      app.graph.convertToSubgraph(new Set([node]));
      window.holder = app.graph.nodes.find((each) => each.subgraph);
      window.node = holder.subgraph.nodes[0];
      app.graph.remove(primitive);
      live.set(holder, holder.widgets[0].name, 0.11);
      app.canvas.openSubgraph(holder.subgraph, holder);
    }""")
    wait_for_text(page, "node", "requested 0.110")
    act(page, "live.set(holder, holder.widgets[0].name, 0.22)")
    wait_for_text(page, "node", "requested 0.220")


def test_a_linked_widget_that_the_chart_does_not_need_does_not_stop_it(page):
    page.evaluate("""() => {
      window.node = live.add("BraidPostHocEma");
      live.add("StringConcatenate", -440).connect(0, node, live.slot(node, "filename_prefix"));
    }""")
    wait_for_text(page, "node", "10 checkpoints")


@RENDERERS
def test_a_run_of_other_widget_values_does_not_replace_the_live_chart(page, vue):
    page.evaluate("""() => {
      window.source = live.add("BraidTimestepSampling", -440);
      window.node = live.add("BraidTimestepPreview");
      source.connect(0, node, 0);
      window.finished = 0;
      const { onExecuted } = node;
      node.onExecuted = function (...args) {
        onExecuted.apply(this, args);
        window.finished += 1;
      };
    }""")
    wait_for_charts(page, 2)
    act(page, "live.set(node, 'samples', 4000000)")
    act(page, "app.queuePrompt(0, 1)")
    act(page, "live.set(node, 'samples', 1000)")
    page.wait_for_function("finished === 1")
    drawn = """() => {
      const bins = [...live.panel(node).querySelectorAll(".braid-bin")];
      return bins.reduce((sum, bin) => sum + Number(bin.dataset.count), 0) === 1000;
    }"""
    page.wait_for_function(drawn)
    settle(page)
    assert page.evaluate(drawn)


def test_the_colours_follow_the_theme(open_page):
    colours = {}
    for palette in ("dark", "light"):
        page = open_page({"Comfy.VueNodes.Enabled": False, "Comfy.ColorPalette": palette})
        page.evaluate(PREPARE, KINDS)
        act(page, "window.node = live.add('BraidPostHocEma')")
        wait_for_charts(page, 1)
        colours[palette] = page.evaluate("""() => ["title", "subtitle", "ideal"].map((name) => {
          const style = getComputedStyle(live.panel(node).querySelector(`.braid-${name}`));
          return name === "ideal" ? style.stroke : style.color;
        })""")
        act(page, "app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")
    assert all(d != b for d, b in zip(colours["dark"], colours["light"], strict=True))
