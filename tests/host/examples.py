"""Describes the example workflows and writes them: `python -m host.examples` in tests/.

Widget order and defaults come from a running ComfyUI, node sizes from its front end, so a changed
node means running this again, never editing JSON by hand.
"""

import sys
from collections.abc import Callable

from .browse import browsing
from .serve import Server
from .workflows import EXAMPLES, Graph, Node

BLUE, GREEN, PURPLE, BROWN = "#3f5f8a", "#4a7a4a", "#6a4a8a", "#8a6a3a"


def playground_data(graph: Graph, style: str, count: int) -> tuple[Node, Node]:
    """(model, dataset) of the playground, and a look at the pictures."""
    model = graph.add("BraidPlaygroundModel")
    data = graph.add("BraidPlaygroundDataset", style=style, count=count, seed=1)
    graph.add("PreviewImage", 300, title="Training pictures", images=data["image"])
    return model, data


def playground_prompts(graph: Graph, letter: str) -> tuple[Node, Node, Node]:
    """(positive, negative, latent) for sampling one letter four times."""
    positive = graph.add("BraidPlaygroundPrompt", title="Letter", glyph=letter)
    negative = graph.add("BraidPlaygroundPrompt", title="No letter (negative)", glyph="none")
    latent = graph.add("EmptySD3LatentImage", width=128, height=128, batch_size=4)
    return positive, negative, latent


def sampled(graph: Graph, title: str, model, prompts: tuple[Node, Node, Node], **changes) -> Node:
    """A KSampler and the picture of what it made."""
    positive, negative, latent = prompts
    sampler = graph.add(
        "KSampler",
        title=title,
        model=model,
        positive=positive["conditioning"],
        negative=negative["conditioning"],
        latent_image=latent["LATENT"],
        **{
            "seed": 7,
            "steps": 20,
            "cfg": 2.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
            **changes,
        },
    )
    picture = graph.add("BraidPlaygroundDecode", latent=sampler["LATENT"])
    graph.add("PreviewImage", 300, title=title, images=picture["image"])
    return sampler


def train_a_lora(graph: Graph) -> None:
    """01: model and data -> targets -> train -> apply -> the same letter before and after."""
    graph.column("1 · Model and pictures", BLUE, 400)
    graph.note(
        "## Train a LoRA, and see what it learned\n"
        "A small FLUX that draws letters comes with Braid, and so do the pictures: nothing is "
        "downloaded, and a CPU is enough.\n\n"
        "Press **Run**. *Train LoRA* shows the loss while it works, then the same noise is "
        "sampled without and with the LoRA.\n\n"
        "Then try another `style`, or fewer layers: `target_mode` whitelist with "
        "`include_patterns` `.*img_attn.*`.",
        230,
    )
    model, data = playground_data(graph, "outlined", 40)
    graph.column("2 · What is trained", PURPLE, 380)
    network = graph.add("BraidNetwork", network_dim=16, network_alpha=16, loraplus_lr_ratio=4)
    graph.add("BraidPreviewTargets", 320, model=model["model"], network=network["network"])
    graph.column("3 · Train", GREEN, 440)
    timesteps = graph.add("BraidTimestepSampling", timestep_sampling="sigmoid")
    trained = graph.add(
        "BraidTrainLora",
        820,
        model=model["model"],
        latents=data["latents"],
        positive=data["positive"],
        network=network["network"],
        timesteps=timesteps["timesteps"],
        steps=300,
        batch_size=8,
        learning_rate=0.002,
        seed=42,
        output_name="outlined",
        mixed_precision="no",
        gradient_checkpointing=False,
    )
    graph.column("4 · Apply", BROWN, 320)
    adapted = graph.add("LoraModelLoader", model=model["model"], lora=trained["lora"])
    prompts = playground_prompts(graph, "R")
    graph.add("LossGraphNode", loss=trained["loss_map"], filename_prefix="loss_graph")
    graph.column("5 · Before", BLUE, 340)
    sampled(graph, "Without the LoRA", model["model"], prompts)
    graph.column("6 · After", GREEN, 340)
    sampled(graph, "With the LoRA", adapted["model"], prompts)


WORKFLOWS: dict[str, Callable[[Graph], None]] = {
    "01_train_a_lora": train_a_lora,
}

MEASURE = """async (workflow) => {
    await app.loadGraphData(workflow);
    await new Promise((done) => setTimeout(done, 500));
    return (app.graph.nodes ?? app.graph._nodes).map((node) => {
        const least = node.computeSize();
        return [node.id, Math.max(node.size[0], least[0]), Math.max(node.size[1], least[1])];
    });
}"""


def main() -> None:
    wanted = sys.argv[1:] or list(WORKFLOWS)
    with Server.start() as server, browsing(server.url) as page:
        object_info = server.object_info()
        for name in wanted:
            graph = Graph(object_info)
            WORKFLOWS[name](graph)
            sizes = page.evaluate(MEASURE, graph.to_json())
            graph.lay_out({int(number): (width, height) for number, width, height in sizes})
            graph.write(EXAMPLES / f"{name}.json")
            sys.stdout.write(f"{name}.json: {len(graph.nodes)} nodes\n")


if __name__ == "__main__":
    main()
