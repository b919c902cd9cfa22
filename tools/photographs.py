"""Takes the pictures of README, help pages and template browser: a part of `make pictures`.

Every picture is what the program shows: each playground workflow is opened and run in a real
ComfyUI in a real browser, and its nodes, live charts and results are saved in web/docs/pictures/,
its thumbnail beside the workflow. About ten minutes on two cores. Arguments choose sessions by
their names in SESSIONS.
"""

import sys
from collections.abc import Callable

from host.workflows import EXAMPLES
from PIL import Image

from .camera import Camera, camera, narrowed, save, stacked
from .pictures import PICTURES

HELP_WIDTH, THUMBNAIL_WIDTH, GRAPH_WIDTH = 900, 640, 1400
"""Pixels."""


def picture(name: str, taken: Image.Image, width: int = HELP_WIDTH) -> None:
    save(narrowed(taken, width), PICTURES / name)


def thumbnail(workflow: str, taken: Image.Image) -> None:
    save(narrowed(taken, THUMBNAIL_WIDTH), EXAMPLES / f"{workflow}.jpg")


def rows(seen: Camera, *titles: str) -> Image.Image:
    """What each of these nodes showed, side by side, one row for each node."""
    return stacked([stacked(seen.results(title), 0, across=True) for title in titles], 0)


SAMPLED = "FLUX at 1024 x 1024"
"""The Timestep Sampling node of 02 that is shown."""


def everything(seen: Camera) -> None:
    seen.run("00_everything")
    (grid,) = seen.results("Side by side")
    picture("everything.png", grid)
    thumbnail("00_everything", grid)


def train_a_lora(seen: Camera) -> None:
    seen.run("01_train_a_lora")
    picture("graph.jpg", seen.graph(1500), GRAPH_WIDTH)
    thumbnail("01_train_a_lora", rows(seen, "Without the LoRA", "With the LoRA"))


def choose_timesteps(seen: Camera) -> None:
    seen.run("02_choose_timesteps")
    picture("timestep_sampling.png", seen.node(SAMPLED))
    (figure,) = seen.results("Preview Image")
    picture("timestep_preview.png", figure)
    thumbnail("02_choose_timesteps", figure)


def train_and_resume(seen: Camera) -> None:
    seen.run("03_train_and_resume")
    figure = seen.shown("Train LoRA (Braid)")
    picture("training.png", figure)
    thumbnail("03_train_and_resume", figure)


def post_hoc_ema(seen: Camera) -> None:
    seen.run("04_post_hoc_ema")
    picture("post_hoc_ema.png", seen.node("Post-Hoc EMA"))
    picture("ema_from_shadows.png", seen.results("EMA from Shadows")[0])
    picture("ema_sweep.png", seen.results("One row for each width")[0], 640)
    thumbnail("04_post_hoc_ema", seen.chart("Post-Hoc EMA"))


def fp8_scaled(seen: Camera) -> None:
    seen.run("05_fp8_scaled")
    picture("fp8_layers.png", seen.results("Load Diffusion Model (FP8 Scaled)")[0])
    both = rows(seen, "bf16 weights", "FP8 weights")
    picture("fp8_pictures.png", both, 640)
    thumbnail("05_fp8_scaled", both)


def magcache(seen: Camera) -> None:
    seen.run("06_magcache_calibrate_and_use")
    picture("magcache.png", seen.node("MagCache"))
    picture("magcache_plan.png", seen.node("MagCache Plan"))
    picture("magcache_calibration.png", seen.results("MagCache Calibration")[0])
    thumbnail("06_magcache_calibrate_and_use", seen.chart("MagCache"))


def real_models(seen: Camera) -> None:
    columns = ("3 · What is trained", "4 · Noise levels, checkpoints")
    for name in ("10_flux_train_lora", "11_wan_train_lora", "12_qwen_image_train_lora"):
        seen.open(name)
        thumbnail(name, seen.graph(1200, *columns))


def looks(seen: Camera) -> None:
    """One node in ComfyUI's dark and light theme, on the canvas and under Nodes 2.0."""
    taken = []
    for vue in (False, True):
        for palette in ("dark", "light"):
            seen.dress(ColorPalette=palette, VueNodes__Enabled=vue)
            seen.open("02_choose_timesteps")
            take = seen.vue_node if vue else seen.node
            taken.append(take(SAMPLED))
    seen.dress(ColorPalette="dark", VueNodes__Enabled=False)
    picture("looks.png", stacked(taken, 0, across=True), 1600)


def live_nodes(_: Camera) -> None:
    """Three pictures of the sessions before, in one row."""
    names = ("timestep_sampling", "post_hoc_ema", "magcache")
    taken = [Image.open(PICTURES / f"{name}.png").convert("RGB") for name in names]
    picture("live_nodes.png", stacked(taken, 0, across=True), 1600)


SESSIONS: dict[str, Callable[[Camera], None]] = {
    "00_everything": everything,
    "01_train_a_lora": train_a_lora,
    "02_choose_timesteps": choose_timesteps,
    "03_train_and_resume": train_and_resume,
    "04_post_hoc_ema": post_hoc_ema,
    "05_fp8_scaled": fp8_scaled,
    "06_magcache_calibrate_and_use": magcache,
    "real_models": real_models,
    "looks": looks,
    "live_nodes": live_nodes,
}


def main() -> None:
    with camera() as seen:
        for name in sys.argv[1:] or SESSIONS:
            SESSIONS[name](seen)


if __name__ == "__main__":
    main()
