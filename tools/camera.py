"""A camera in front of a real ComfyUI: runs a workflow in the browser, then pictures its nodes.

with camera() as seen:
    seen.run("01_train_a_lora")
    save(seen.node("Timestep Sampling"), path)
"""

import base64
import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from host.browse import READY, browsing
from host.serve import Server
from host.workflows import EXAMPLES, read_workflow
from PIL import Image

SETTINGS = {
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.NodeBadge.NodeIdBadgeMode": "None",
    "Comfy.NodeBadge.NodeLifeCycleBadgeMode": "None",
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.Graph.CanvasInfo": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
"""Nothing over the graph, and its text drawn however small."""
DENSITY = 1.5
LEFT, TOP, MARGIN = 420, 130, 12
"""Where a pictured area begins in the window, clear of ComfyUI's bars; pixels around it."""
SETTLE_MS = 1500
TOAST_MS = 7000
"""How long the front end says that the job is completed."""
BARE = "[data-testid=error-overlay] { display: none }"
"""The front end says over the graph that model files are missing."""

FIND = "(title) => app.graph.nodes.find((node) => node.getTitle() === title)"
AIM = """([x, y, scale, left, top]) => {
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [left / scale - x, top / scale - y];
    app.canvas.deselectAll();
    app.canvas.setDirty(true, true);
}"""
NODE_AREA = f"(title) => [...({FIND})(title).boundingRect]"
CHART_BOX = f"""(title) => {{
    const widget = ({FIND})(title).widgets.find((each) => each.name === "braid_live");
    const {{ x, y, width, height }} = widget.element.getBoundingClientRect();
    return [x, y, width, height];
}}"""
IMAGE_SHOWN = f"""(title) => {{
    const image = ({FIND})(title).imgs[0];
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL("image/png").split(",")[1];
}}"""
SHOW_LINKS = "(shown) => { app.canvas.links_render_mode = shown ? LiteGraph.SPLINE_LINK : -1; }"
GROUP_AREAS = """(titles) => app.graph.groups
    .filter((group) => !titles.length || titles.includes(group.title))
    .map((group) => [...group.pos, ...group.size])"""


@dataclass
class Camera:
    """One page at one server, and what the last run left."""

    server: Server
    page: object
    titles: list[tuple[str, str]] = field(default_factory=list)
    """(title, node id) of each node of the open workflow."""
    outputs: dict[str, dict] = field(default_factory=dict)
    """What each node of the last run showed, by node id."""

    def dress(self, **settings) -> None:
        """Reload with other settings: ColorPalette="light", VueNodes__Enabled=True."""
        for name, value in settings.items():
            self.server.post(f"/settings/Comfy.{name.replace('__', '.')}", value)
        self.page.reload()
        self.page.wait_for_function(READY)

    def open(self, name: str) -> None:
        """Open an example workflow."""
        self.page.evaluate(
            "(workflow) => app.loadGraphData(workflow)", read_workflow(EXAMPLES / f"{name}.json")
        )
        self.page.wait_for_timeout(SETTLE_MS)
        self.page.add_style_tag(content=BARE)
        self.page.evaluate(SHOW_LINKS, True)
        pairs = self.page.evaluate("app.graph.nodes.map((node) => [node.getTitle(), node.id])")
        self.titles = [(title, str(number)) for title, number in pairs]

    def run(self, name: str, timeout: float = 900) -> None:
        """Open an example workflow, press Run and wait for its end; RuntimeError when it fails."""
        self.open(name)
        before = set(self.server.get("/history"))
        self.page.evaluate("() => app.queuePrompt(0)")
        deadline = time.monotonic() + timeout
        while not (new := set(self.server.get("/history")) - before):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} took over {timeout:g} s")
            time.sleep(0.5)
        entry = self.server.get("/history")[new.pop()]
        if entry["status"]["status_str"] != "success":
            raise RuntimeError(f"{name} failed: {entry['status']}")
        self.outputs = entry["outputs"]
        self.page.wait_for_timeout(TOAST_MS)

    def node(self, title: str) -> Image.Image:
        """The node of that title, the first in the workflow, as it looks now, without links."""
        self.page.evaluate(SHOW_LINKS, False)
        picture = self._area(self.page.evaluate(NODE_AREA, title), 1.0, LEFT)
        self.page.evaluate(SHOW_LINKS, True)
        return picture

    def chart(self, title: str) -> Image.Image:
        """The live chart in the node of that title."""
        self.node(title)
        return self._shot(*self.page.evaluate(CHART_BOX, title), margin=0)

    def vue_node(self, title: str) -> Image.Image:
        """The same under Nodes 2.0, where a node is an element of the page."""
        x, y, *_ = self.page.evaluate(NODE_AREA, title)
        self.page.evaluate(SHOW_LINKS, False)
        self.page.evaluate(AIM, [x, y, 1.0, LEFT, TOP])
        self.page.wait_for_timeout(SETTLE_MS)
        number = next(number for named, number in self.titles if named == title)
        box = self.page.locator(f'[data-node-id="{number}"]').bounding_box()
        return self._shot(box["x"], box["y"], box["width"], box["height"])

    def graph(self, width: int, *titles: str) -> Image.Image:
        """The groups of these titles, all without any, fitted into `width` pixels of the window."""
        areas = self.page.evaluate(GROUP_AREAS, list(titles))
        left, top = min(a[0] for a in areas), min(a[1] for a in areas)
        right, bottom = max(a[0] + a[2] for a in areas), max(a[1] + a[3] for a in areas)
        return self._area([left, top, right - left, bottom - top], width / (right - left), 90)

    def results(self, title: str) -> list[Image.Image]:
        """The pictures that nodes of that title showed in the last run."""
        shown = [self.outputs.get(number, {}) for named, number in self.titles if named == title]
        files = [
            self.server.base / image["type"] / image["subfolder"] / image["filename"]
            for output in shown
            for image in output.get("images", [])
        ]
        return [Image.open(file).convert("RGB") for file in files]

    def shown(self, title: str) -> Image.Image:
        """The picture in the node of that title as it is now, also one of a run's progress."""
        pixels = base64.b64decode(self.page.evaluate(IMAGE_SHOWN, title))
        return Image.open(io.BytesIO(pixels)).convert("RGB")

    def _area(self, area: list[float], scale: float, left: int) -> Image.Image:
        """A part of the graph, (x, y, width, height) in its units; the window grows to hold it."""
        x, y, width, height = area
        width, height = width * scale, height * scale
        self.page.set_viewport_size(
            {"width": int(left + width + 120), "height": int(TOP + height + 120)}
        )
        self.page.evaluate(AIM, [x, y, scale, left, TOP])
        self.page.wait_for_timeout(SETTLE_MS)
        return self._shot(left, TOP, width, height)

    def _shot(
        self, x: float, y: float, width: float, height: float, margin: float = MARGIN
    ) -> Image.Image:
        clip = {
            "x": x - margin,
            "y": y - margin,
            "width": width + 2 * margin,
            "height": height + 2 * margin,
        }
        return Image.open(io.BytesIO(self.page.screenshot(clip=clip))).convert("RGB")


@contextmanager
def camera() -> Iterator[Camera]:
    """A camera at a fresh server, on an empty graph."""
    with (
        Server.start(settings=SETTINGS) as server,
        browsing(server.url, density=DENSITY) as page,
    ):
        page.set_default_timeout(60_000)
        yield Camera(server, page)


def stacked(pictures: list[Image.Image], gap: int = 8, across: bool = False) -> Image.Image:
    """Pictures below one another (or beside), on what surrounds a node in the dark theme."""
    widths, heights = [p.width for p in pictures], [p.height for p in pictures]
    gaps = gap * (len(pictures) - 1)
    size = (sum(widths) + gaps, max(heights)) if across else (max(widths), sum(heights) + gaps)
    sheet = Image.new("RGB", size, pictures[0].getpixel((0, 0)))
    at = 0
    for picture in pictures:
        sheet.paste(picture, (at, 0) if across else (0, at))
        at += gap + (picture.width if across else picture.height)
    return sheet


def narrowed(picture: Image.Image, width: int) -> Image.Image:
    """At most `width` pixels wide."""
    if picture.width <= width:
        return picture
    height = round(picture.height * width / picture.width)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def save(picture: Image.Image, path: Path) -> None:
    """As JPEG, or as PNG of at most 256 colours, as the name says."""
    if path.suffix == ".jpg":
        picture.save(path, quality=82, optimize=True, progressive=True)
    else:
        method, dither = Image.Quantize.MEDIANCUT, Image.Dither.NONE
        picture.quantize(256, method=method, dither=dither).save(path, optimize=True)
    sys.stdout.write(f"{path.name}: {picture.size}, {path.stat().st_size / 1000:.0f} kB\n")
    sys.stdout.flush()
