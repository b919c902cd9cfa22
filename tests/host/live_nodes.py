"""Every node that shows something live in the browser, one row each: what drives its browser tests.

A new live node is one row here; `tests/browser/test_live_nodes.py` does with it what a user does.
"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveNode:
    """A node with a live chart: how to bring it to draw, and how to bring it to draw another."""

    node_id: str
    """The class of the node."""
    widget: str
    """The widget that is turned."""
    values: tuple[float, float, float]
    """Of the widget: each has a heading of its own."""
    given: dict[str, Any]
    """Other widgets, set before anything is looked at."""
    source: tuple[str, dict[str, Any]] | None = None
    """A node whose first output feeds its first input, and its widgets."""


LIVE_NODES = (
    LiveNode(
        node_id="BraidTimestepSampling", widget="min_timestep", values=(100, 300, 500), given={}
    ),
    LiveNode(
        node_id="BraidTimestepPreview",
        widget="width",
        values=(512, 1024, 2048),
        given={},
        source=("BraidTimestepSampling", {"timestep_sampling": "flux_shift"}),
    ),
    LiveNode(
        node_id="BraidPostHocEma", widget="method.sigma_rel", values=(0.2, 0.15, 0.1), given={}
    ),
    LiveNode(
        node_id="BraidMagCache",
        widget="rule.threshold",
        values=(0.05, 0.1, 0.3),
        given={"preset": "FLUX.1-dev"},
    ),
    LiveNode(node_id="BraidMagCachePlan", widget="steps", values=(28, 20, 12), given={}),
)
KINDS = [row.node_id for row in LIVE_NODES]
PICTURED = ["BraidTrainLora"]
"""Nodes with a live picture of their run instead of a chart."""

ROWS = [asdict(row) for row in LIVE_NODES]
"""For the page."""
PREPARE = """(rows) => {
  const add = (type, x, y, values = {}) => {
    const node = LiteGraph.createNode(type);
    node.pos = [x, y];
    app.graph.add(node);
    for (const [name, value] of Object.entries(values)) set(node, name, value);
    return node;
  };
  const set = (node, name, value) => {
    node.widgets.find((widget) => widget.name === name).value = value;
  };
  const panel = (node) => node?.widgets?.find((widget) => widget.name === "braid_live")?.element;
  const heading = (node) => {
    const element = panel(node);
    const parts = element?.clientWidth ? element.querySelectorAll("header > div") : [];
    return [...parts].map((each) => each.textContent).join(" | ");
  };
  const find = (id) =>
    app.canvas.graph.nodes.filter((node) => node.title === `live ${id}`).at(live.nth);
  const build = (step) => rows.forEach(({ node_id, given, source, widget, values }, index) => {
    const node = add(node_id, 460 * index, 0, given);
    node.title = `live ${node_id}`;
    set(node, widget, values[step]);
    if (source) add(source[0], 460 * index, 800, source[1]).connect(0, node, 0);
  });
  const turn = (step) => rows.forEach(({ node_id, widget, values }) => {
    set(find(node_id), widget, values[step]);
  });
  const headings = () =>
    Object.fromEntries(rows.map(({ node_id }) => [node_id, heading(find(node_id))]));
  const steps = () => rows.map(({ node_id, widget, values }) => {
    const value = find(node_id)?.widgets?.find((each) => each.name === widget)?.value;
    return values.findIndex((each) => Math.abs(each - value) < 1e-9);
  });
  window.live = { add, set, panel, find, build, turn, headings, steps, nth: 0 };
  app.canvas.ds.scale = 0.5;
  app.canvas.ds.offset = [200, 200];
}"""
"""`live` on the page: build(step) adds all rows with their widgets at values[step], turn(step)
turns them, headings() are what the charts on screen say, by node id, and steps() where the widgets
are. Of nodes that are there twice these mean the one at `live.nth`, in the order of the graph."""
