"""Describes the example workflows and writes them: `python -m host.examples` in tests/.

Node sizes, widget order and defaults come from a running ComfyUI, so a changed node means running
this again, never editing JSON by hand.
"""

import sys
from collections.abc import Callable

from .serve import Server
from .workflows import EXAMPLES, Graph

BLUE, GREEN, PURPLE = "#3f5f8a", "#4a7a4a", "#6a4a8a"


def train_a_lora(graph: Graph) -> None:
    """01: model and data -> targets -> train -> apply -> the same letter before and after."""
    graph.note(
        "## Train a LoRA, and see what it learned\n"
        "A small FLUX that draws letters comes with Braid, and so do the pictures: nothing is "
        "downloaded, a CPU is enough.\n\n"
        "Press **Run**. *Train LoRA* shows the loss while it works (about two minutes on two "
        "cores), then the same noise is sampled without and with the LoRA.\n\n"
        "Try another `style`, `loraplus_lr_ratio` 8, or fewer layers: "
        "`target_mode` whitelist with `include_patterns` `.*img_attn.*`.",
        0, 0, 420, 260,
    )
    model = graph.add("BraidPlaygroundModel", 0, 320, 420)
    data = graph.add("BraidPlaygroundDataset", 0, 420, 420, style="outlined", count=40, seed=1)
    graph.add("PreviewImage", 0, 600, 420, 420, title="Training pictures", images=data["image"])
    network = graph.add(
        "BraidNetwork", 480, 0, 380, network_dim=16, network_alpha=16, loraplus_lr_ratio=4
    )
    graph.add(
        "BraidPreviewTargets", 480, 620, 380, 400, model=model["model"], network=network["network"]
    )
    timesteps = graph.add("BraidTimestepSampling", 920, 0, 380, timestep_sampling="sigmoid")
    trained = graph.add(
        "BraidTrainLora", 920, 320, 460, 700,
        model=model["model"], latents=data["latents"], positive=data["positive"],
        network=network["network"], timesteps=timesteps["timesteps"],
        steps=300, batch_size=8, learning_rate=0.002, seed=42, output_name="outlined",
        mixed_precision="no", gradient_checkpointing=False,
    )
    graph.add(
        "LossGraphNode", 920, 1080, 460, 120,
        loss=trained["loss_map"], filename_prefix="loss_graph",
    )
    adapted = graph.add(
        "LoraModelLoader", 1440, 0, 320, model=model["model"], lora=trained["lora"]
    )
    positive = graph.add("BraidPlaygroundPrompt", 1440, 160, 320, title="Letter", glyph="R")
    negative = graph.add("BraidPlaygroundPrompt", 1440, 260, 320, title="Nothing", glyph="none")
    latent = graph.add(
        "EmptySD3LatentImage", 1440, 360, 320, width=128, height=128, batch_size=4
    )
    for title, source, x in (
        ("Without the LoRA", model["model"], 1440),
        ("With the LoRA", adapted["model"], 1820),
    ):
        sampled = graph.add(
            "KSampler", x, 520, 340, title=title, model=source,
            positive=positive["conditioning"],
            negative=negative["conditioning"], latent_image=latent["LATENT"],
            seed=7, steps=20, cfg=2.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        )
        picture = graph.add("BraidPlaygroundDecode", x, 830, 340, latent=sampled["LATENT"])
        graph.add("PreviewImage", x, 930, 340, 320, title=title, images=picture["image"])
    graph.group("1 · Model and pictures", -20, 270, 460, 770, BLUE)
    graph.group("2 · What is trained", 460, -50, 420, 1090, PURPLE)
    graph.group("3 · Train", 900, -50, 500, 1270, GREEN)
    graph.group("4 · Before and after", 1420, -50, 760, 1320, BLUE)


WORKFLOWS: dict[str, Callable[[Graph], None]] = {
    "01_train_a_lora": train_a_lora,
}


def main() -> None:
    wanted = sys.argv[1:] or list(WORKFLOWS)
    with Server.start() as server:
        object_info = server.object_info()
    for name in wanted:
        graph = Graph(object_info)
        WORKFLOWS[name](graph)
        graph.write(EXAMPLES / f"{name}.json")
        sys.stdout.write(f"{name}.json: {len(graph.nodes)} nodes\n")


if __name__ == "__main__":
    main()
