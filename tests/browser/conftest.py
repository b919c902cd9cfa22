"""A real server and a real browser for the tests in this folder; skipped, aloud, without either."""

import pytest
from host.browse import CHROMIUM_ARGUMENTS, READY, chromium
from host.find import find_comfyui
from host.serve import PACK_FOLDER, Server

HOST_ERRORS = (
    "Failed to load resource",  # a fresh installation lacks the user's own css and settings
    "Content Security Policy",  # the template shown at first start asks for its models' sizes
)
OURS = (f"/extensions/{PACK_FOLDER}/", "/braid/")
"""In the addresses of our files and answers."""


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
    """Errors that the pages of this test print once they are ready, and what of ours they did not
    get; without those that ComfyUI itself prints."""
    return []


@pytest.fixture
def open_page(server, browser, console_errors):
    """open_page(settings) -> a page with every node registered, on an empty graph."""
    contexts = []

    def note_console(message):
        if message.type == "error" and not any(known in message.text for known in HOST_ERRORS):
            console_errors.append(message.text)

    def note_response(response):
        if response.status >= 400 and any(part in response.url for part in OURS):
            console_errors.append(f"{response.status} {response.url}")

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
        page.on("console", note_console)
        page.on("response", note_response)
        page.on("pageerror", lambda error: console_errors.append(str(error)))
        return page

    yield open_one
    for context in contexts:
        context.close()
