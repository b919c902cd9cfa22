"""A headless Chromium at a running ComfyUI."""

import base64
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PICTURED = [
    "BraidEmaReconstruct",
    "BraidFp8Loader",
    "BraidMagCacheCalibration",
    "BraidTrainLora",
    "LossGraphNode",
    "PreviewImage",
    "SaveImage",
]
"""Nodes in which the front end shows a picture once they have run."""
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
"""A PNG."""
MEASURE = """async ([workflow, vue, pictured]) => {
    await app.extensionManager.setting.set("Comfy.VueNodes.Enabled", vue);
    await app.loadGraphData(workflow);
    for (const { id, type } of app.graph.nodes.filter((node) => pictured.includes(node.type))) {
        const images = [{ filename: "measured.png", subfolder: "", type: "temp" }];
        const detail = { node: String(id), output: { images } };
        app.api.dispatchEvent(new CustomEvent("executed", { detail }));
    }
    await new Promise((done) => setTimeout(done, 1500));
    return app.graph.nodes.map((node) => {
        const least = node.computeSize();
        return [node.id, Math.max(node.size[0], least[0]), Math.max(node.size[1], least[1])];
    });
}"""
MISPLACED = """() => {
    const below = (node) => {
        const drawn = document.querySelector(`[data-node-id="${node.id}"]`);
        return node.pos[1] + (drawn ? drawn.offsetHeight - 30 : node.size[1]);
    };
    const boxes = app.graph.nodes.map((node) => ({
        name: `${node.id} ${node.title}`,
        left: node.pos[0],
        right: node.pos[0] + node.size[0],
        top: node.pos[1] - 30,  // its title
        bottom: below(node),
    }));
    const apart = (a, b) =>
        a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
    const inside = ({ left, right, top, bottom }) => app.graph.groups.some(({ pos, size }) =>
        pos[0] <= left && right <= pos[0] + size[0] && pos[1] <= top && bottom <= pos[1] + size[1]);
    return [
        ...boxes.filter((box) => !inside(box)).map(({ name }) => `${name} is in no group`),
        ...boxes.flatMap((a, index) => boxes.slice(index + 1)
            .filter((b) => !apart(a, b)).map((b) => `${a.name} overlaps ${b.name}`)),
    ];
}"""
"""Nodes of an example workflow that lie in no group, or over another; [] when all is well."""
SETTLED = """async () => {
    const sizes = () => app.graph.nodes.map(({ id, size }) =>
        [...size, document.querySelector(`[data-node-id="${id}"]`)?.offsetHeight]);
    const isDrawn = (all) => !LiteGraph.vueNodesMode || all.every(([, , height]) => height);
    for (let last = "", since = performance.now(); performance.now() - since < 400;) {
        await new Promise((done) => setTimeout(done, 50));
        const all = sizes();
        const now = isDrawn(all) ? JSON.stringify(all) : Math.random();
        if (now !== last) [last, since] = [now, performance.now()];
    }
}"""
"""Until every node is drawn and none has changed its size for a while: Nodes 2.0 measures what it
has drawn."""
FIT = """() => {
    const { left, top, right, bottom } = app.graph.groups.reduce((all, { pos, size }) => ({
        left: Math.min(all.left, pos[0]),
        top: Math.min(all.top, pos[1]),
        right: Math.max(all.right, pos[0] + size[0]),
        bottom: Math.max(all.bottom, pos[1] + size[1]),
    }), { left: Infinity, top: Infinity, right: -Infinity, bottom: -Infinity });
    const scale = Math.min(innerWidth / (right - left), innerHeight / (bottom - top));
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [-left, -top];
    app.canvas.setDirty(true, true);
}"""
"""The whole workflow into the window: what is out of sight is not laid out under Nodes 2.0."""
TRACKER = "app.extensionManager.workflow.activeWorkflow.changeTracker"
"""Has undo() and redo(), as the keys call them."""
READY = "!!window.app?.graph?.nodes?.length"
"""The host has opened its own first workflow, so every node is registered."""


def chromium() -> str | None:
    """The path of a Chromium: BRAID_CHROMIUM, else what is installed; None without one."""
    named = os.environ.get("BRAID_CHROMIUM")
    return named or shutil.which("chromium") or shutil.which("google-chrome")


def act(page, statement: str) -> None:
    """Do this in the page, and wait for it; what it comes to stays there, because newer front ends
    have nodes that no message can carry."""
    page.evaluate(f"async () => {{ await ({statement}); }}")


def remember(page) -> None:
    """A step of undo. What takes it had another name in older front ends, and it adds to the step
    what changes within the next 50 ms."""
    act(page, f"({TRACKER}.captureCanvasState ?? {TRACKER}.checkState).call({TRACKER})")
    page.wait_for_timeout(400)


@contextmanager
def browsing(url: str, width: int = 1600, height: int = 1000, density: float = 1) -> Iterator:
    """A page with ComfyUI's graph ready, on an empty graph; `density` is pixels per CSS pixel."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as api:
        browser = api.chromium.launch(executable_path=chromium(), args=CHROMIUM_ARGUMENTS)
        page = browser.new_page(
            viewport={"width": width, "height": height}, device_scale_factor=density
        )
        page.goto(url)
        page.wait_for_function(READY)
        act(page, "app.graph.clear()")
        yield page
        browser.close()


def measured(page, workflow: dict) -> dict[int, tuple[float, float]]:
    """(width, height) that each node needs after a run, by id: the larger of both renderers."""
    page.route("**/view?*measured.png*", lambda route: route.fulfill(body=PICTURE))
    sizes: dict[int, tuple[float, float]] = {}
    for vue in (True, False):
        for number, *size in page.evaluate(MEASURE, [workflow, vue, PICTURED]):
            before = sizes.get(int(number), (0.0, 0.0))
            sizes[int(number)] = (max(before[0], size[0]), max(before[1], size[1]))
    return sizes
