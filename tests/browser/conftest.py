"""A real server and a real browser for the tests in this folder; skipped, aloud, without either."""

from importlib.metadata import version

import pytest
from host.browse import CHROMIUM_ARGUMENTS, READY, chromium
from host.find import find_comfyui
from host.serve import PACK_FOLDER, Server
from host.workflows import lacking, read_workflow

HOST_ERRORS = (
    "Failed to load resource",  # a fresh installation lacks the user's own css and settings
    "Content Security Policy",  # the template shown at first start asks for its models' sizes
)
OURS = (f"/extensions/{PACK_FOLDER}/", "/braid/")
"""In the addresses of our files and answers."""


TODAYS_FRONT_END = (1, 49)
VIEWPORT = {"width": 1500, "height": 1000}
DEFAULTS = {
    "Comfy.VueNodes.Enabled": False,
    "Comfy.ColorPalette": "dark",
    "Comfy.Locale": "en",
}
EMPTY = """async (settings) => {
  app.canvas.setGraph(app.rootGraph);
  app.graph.clear();
  app.graph.id = crypto.randomUUID();
  for (const [name, value] of Object.entries(settings))
    if (name !== "Comfy.Locale") await app.extensionManager.setting.set(name, value);
  document.activeElement?.blur();
}"""
"""Newer front ends keep a widget's value under its graph and node id, beyond the graph's end: a
graph of another id starts without them."""


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


@pytest.fixture(scope="session")
def without_todays_front_end():
    """without_todays_front_end(what) skips, aloud, on a front end older than core 0.33's."""

    def skip_if_older(what: str) -> None:
        has = version("comfyui-frontend-package")
        if tuple(map(int, has.split(".")[:2])) < TODAYS_FRONT_END:
            pytest.skip(f"front end {has}: {what}")

    return skip_if_older


@pytest.fixture(scope="session")
def example(server):
    """example(path) -> the workflow; skipped, aloud, where this ComfyUI lacks a node of core."""

    object_info = server.object_info()

    def read(path) -> dict:
        workflow = read_workflow(path)
        missing = lacking(workflow, object_info)
        if missing and not any(kind.startswith("Braid") for kind in missing):
            pytest.skip(f"{path.stem} needs a newer ComfyUI: this one lacks {', '.join(missing)}")
        return workflow

    return read


@pytest.fixture
def console_errors():
    """Errors that the pages of this test print once they are ready, and what of ours they did not
    get; without those that ComfyUI itself prints."""
    return []


@pytest.fixture(scope="session")
def pages(server, browser):
    """The one page that is open, by its language: loading the front end takes longer than most
    tests. pages(language) -> it, or a new one where the language is another."""
    opened = {}

    def page_in(language: str):
        if language not in opened:
            for other in opened.values():
                other.context.close()
            opened.clear()
            context = browser.new_context(viewport=VIEWPORT)
            opened[language] = context.new_page()
            opened[language].set_default_timeout(60_000)
            opened[language].goto(server.url)
            wait_until_ready(opened[language])
        return opened[language]

    yield page_in
    for page in opened.values():
        page.context.close()


def wait_until_ready(page) -> None:
    page.wait_for_function(READY)
    page.wait_for_function("!document.querySelector('.p-blockui-mask')")  # it takes the mouse


@pytest.fixture
def open_page(server, pages, console_errors):
    """open_page(settings) -> a page with every node registered, on an empty graph.

    Tests share it: what one of them does to the page beyond its graph it takes back.
    """
    heard = []

    def note_console(message):
        if message.type == "error" and not any(known in message.text for known in HOST_ERRORS):
            console_errors.append(message.text)

    def note_response(response):
        if response.status >= 400 and any(part in response.url for part in OURS):
            console_errors.append(f"{response.status} {response.url}")

    def note_exception(error):
        console_errors.append(str(error))

    def open_one(settings: dict | None = None):
        wanted = DEFAULTS | (settings or {})
        for name, value in wanted.items():
            server.post(f"/settings/{name}", value)
        page = pages(wanted["Comfy.Locale"])
        page.unroute_all(behavior="ignoreErrors")
        page.set_viewport_size(VIEWPORT)
        page.mouse.move(5, 500)
        page.evaluate(EMPTY, wanted)
        for event, note in (
            ("console", note_console),
            ("response", note_response),
            ("pageerror", note_exception),
        ):
            page.on(event, note)
            heard.append((page, event, note))
        return page

    yield open_one
    for page, event, note in heard:
        page.remove_listener(event, note)
