"""A real server and a real browser for the tests in this folder; skipped, aloud, without either."""

import pytest
from host.browse import CHROMIUM_ARGUMENTS, READY, chromium
from host.find import find_comfyui
from host.serve import Server


@pytest.fixture(scope="session")
def server():
    """One ComfyUI for the whole session."""
    if find_comfyui() is None:
        pytest.skip("browser tests need a ComfyUI checkout: set COMFYUI_PATH")
    with Server.start() as running:
        yield running


@pytest.fixture(scope="session")
def browser():
    """One headless Chromium for the whole session."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if chromium() is None:
        pytest.skip("browser tests need chromium: install it or set BRAID_CHROMIUM")
    with playwright.sync_playwright() as api:
        running = api.chromium.launch(executable_path=chromium(), args=CHROMIUM_ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def console_errors():
    """What the pages of this test print as errors once they are ready; ComfyUI's own start-up
    prints some."""
    return []


@pytest.fixture
def open_page(server, browser, console_errors):
    """open_page(settings) -> a page with every node registered, on an empty graph."""
    contexts = []

    def open_one(settings: dict | None = None):
        for name, value in (settings or {}).items():
            server.post(f"/settings/{name}", value)
        context = browser.new_context(viewport={"width": 1500, "height": 1000})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(server.url)
        page.wait_for_function(READY)
        page.wait_for_function("!document.querySelector('.p-blockui-mask')")  # it takes the mouse
        page.evaluate("app.graph.clear()")
        page.on("console", lambda m: m.type == "error" and console_errors.append(m.text))
        page.on("pageerror", lambda error: console_errors.append(str(error)))
        return page

    yield open_one
    for context in contexts:
        context.close()
