"""A headless Chromium at a running ComfyUI."""

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
