"""What example workflows have in common: the playground's model and pictures, runs, samplers."""

from .graph import Graph, Node


def playground_data(graph: Graph, style: str, count: int) -> tuple[Node, Node]:
    """(model, dataset) of the playground, and a look at the pictures."""
    model = graph.add("BraidPlaygroundModel")
    data = graph.add("BraidPlaygroundDataset", style=style, count=count, seed=1)
    graph.add("PreviewImage", 300, title="Training pictures", images=data["image"])
    return model, data


def previewed_targets(
    graph: Graph, model: tuple[Node, str], network: Node, height: int = 300
) -> None:
    """Which layers `network` adapts, as a text to read."""
    targets = graph.add("BraidPreviewTargets", model=model, network=network["network"])
    graph.add("PreviewAny", height, title="Which layers are trained", source=targets["report"])


def playground_training(graph: Graph, height: int, parts: tuple[Node, Node, Node], **given) -> Node:
    """Train LoRA on (model, dataset, network) of the playground, as a CPU likes it."""
    model, data, network = parts
    return graph.add(
        "BraidTrainLora",
        height,
        model=model["model"],
        latents=data["latents"],
        positive=data["positive"],
        network=network["network"],
        batch_size=8,
        mixed_precision="no",
        gradient_checkpointing=False,
        **given,
    )


def playground_prompts(graph: Graph, letter: str) -> tuple[Node, Node, Node]:
    """(positive, negative, latent) for sampling one letter four times."""
    positive = graph.add("BraidPlaygroundPrompt", title="Letter", glyph=letter)
    negative = graph.add("BraidPlaygroundPrompt", title="No letter (negative)", glyph="none")
    latent = graph.add("EmptySD3LatentImage", width=128, height=128, batch_size=4)
    return positive, negative, latent


def sampler(graph: Graph, title: str, model, prompts: tuple[Node, Node, Node], **changes) -> Node:
    """A KSampler with values that suit the playground's model."""
    positive, negative, latent = prompts
    return graph.add(
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


def sampled(graph: Graph, title: str, model, prompts: tuple[Node, Node, Node], **changes) -> Node:
    """A KSampler and the picture of what it made."""
    used = sampler(graph, title, model, prompts, **changes)
    picture = graph.add("BraidPlaygroundDecode", latent=used["LATENT"])
    graph.add("PreviewImage", 300, title=title, images=picture["image"])
    return used
