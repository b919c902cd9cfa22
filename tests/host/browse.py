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
READY = "!!window.app?.graph?.nodes?.length"
"""The host has opened its own first workflow, so every node is registered."""


def chromium() -> str | None:
    """The path of a Chromium: BRAID_CHROMIUM, else what is installed; None without one."""
    named = os.environ.get("BRAID_CHROMIUM")
    return named or shutil.which("chromium") or shutil.which("google-chrome")


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
        page.evaluate("app.graph.clear()")
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
