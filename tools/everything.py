"""Describes 00_everything: every feature in one graph, and one labelled picture at its end.

Core draws the labels: its Draw Text Overlay (ComfyUI 0.28 and later) writes on an empty cell, which
stands before the pictures of its row in Make Image Grid.
"""

from dataclasses import dataclass, field

from .graph import BLUE, BROWN, GREEN, PURPLE, Graph, Node
from .playground import playground_data, playground_prompts, playground_training, sampler

STEPS = 50
CELL = 256
"""Pixels; Playground Decode makes pictures of this size."""
GROUND = 0x171D27


@dataclass
class Sheet:
    """The picture at the end: in each row a label, then the same four noises."""

    graph: Graph
    prompts: tuple[Node, Node, Node]
    blank: Node
    cells: list[tuple[Node, str]] = field(default_factory=list)

    def row(self, label: str, model: tuple[Node, str]) -> None:
        """Sample `model` and put it, labelled, below the rows before."""
        title = label.replace("\n", " ").strip()
        used = sampler(self.graph, title, model, self.prompts, steps=STEPS)
        pictures = self.graph.add("BraidPlaygroundDecode", latent=used["LATENT"])
        text = self.graph.add(
            "TextOverlay",
            title=f"Label: {title}",
            images=self.blank["IMAGE"],
            text=f"\n\n{label}",
            font_size=12.0,
            align="center",
            outline=False,
        )
        self.cells += [text["images"], pictures["image"]]

    def show(self) -> None:
        cells = {f"images__image{i}": cell for i, cell in enumerate(self.cells)}
        batch = self.graph.add("BatchImagesNode", **cells)
        size = {"cell_width": CELL, "cell_height": CELL}
        grid = self.graph.add("ImageGrid", images=batch["IMAGE"], columns=5, padding=8, **size)
        self.graph.add(
            "SaveImage", 760, title="Side by side", images=grid["images"], filename_prefix="braid"
        )


def everything(graph: Graph) -> None:
    """00: preview -> train -> average -> FP8 -> calibrated cache -> all of it side by side."""
    graph.column("1 · Model and pictures", BLUE, 400)
    graph.note(
        "## Everything, in one graph\n"
        "Look at the noise levels, train a LoRA with checkpoints, average them, load the model in "
        "FP8, calibrate the cache, and sample with a third of the steps.\n\n"
        "The last picture shows the same four noises after each stage, a row for each. Nothing is "
        "downloaded; a few minutes on a CPU. The labels need ComfyUI 0.28 or later.",
        250,
    )
    model, data = playground_data(graph, "outlined", 40)
    network = graph.add("BraidNetwork", network_dim=16, network_alpha=16, loraplus_lr_ratio=4)
    graph.column("2 · Noise levels, checkpoints", PURPLE, 420)
    trained = trained_with_checkpoints(graph, (model, data, network))
    average = graph.add(
        "BraidPostHocEma",
        checkpoints=trained["checkpoints"],
        method="sigma_rel",
        method__sigma_rel=0.15,
        filename_prefix="",
    )
    graph.column("5 · Plain", BLUE, 340)
    prompts = playground_prompts(graph, "R")
    blank = graph.add("EmptyImage", title="Label", width=CELL, height=CELL, color=GROUND)
    sheet = Sheet(graph, prompts, blank)
    sheet.row("Plain model", model["model"])
    graph.column("6 · The LoRA, and its average", GREEN, 340)
    sheet.row("LoRA after\n200 steps", applied(graph, model, trained))
    sheet.row("average of its\n10 checkpoints", applied(graph, model, average))
    graph.column("7 · FP8", BROWN, 440)
    quantized = graph.add("BraidFp8Loader", 560, unet_name="braid_playground.safetensors")
    adapted = applied(graph, quantized, average)
    sheet.row("the same\nin FP8", adapted)
    plan = calibrated(graph, adapted, prompts)
    graph.column("9 · A third of the steps", GREEN, 470)
    planned = {"rule": "planned", "rule__speedup": 3.0}
    cached = graph.add("BraidMagCache", model=adapted, plan=plan, **planned)
    sheet.row("the same\nwith MagCache:\n16 of 50 steps", cached["model"])
    graph.column("10 · Side by side", BLUE, 760)
    sheet.show()


def trained_with_checkpoints(graph: Graph, parts: tuple[Node, Node, Node]) -> Node:
    """Noise levels and their chart, the run, and what it really drew."""
    timesteps = graph.add(
        "BraidTimestepSampling", timestep_sampling="sigmoid", num_timestep_buckets=8
    )
    checkpointing = graph.add("BraidCheckpointing", save_every_n_steps=20)
    graph.column("3 · Train", GREEN, 440)
    trained = playground_training(
        graph,
        820,
        parts,
        timesteps=timesteps["timesteps"],
        options=checkpointing["options"],
        steps=200,
        learning_rate=0.002,
        output_name="everything",
    )
    graph.column("4 · What it drew, and the average", PURPLE, 460)
    preview = graph.add(
        "BraidTimestepPreview",
        title="Planned, and what the run drew",
        timesteps=timesteps["timesteps"],
        width=128,
        height=128,
        loss_map=trained["loss_map"],
    )
    graph.add("PreviewImage", 340, title="Planned and drawn", images=preview["image"])
    return trained


def applied(graph: Graph, model: Node, lora: Node) -> tuple[Node, str]:
    """The model with the LoRA on it."""
    return graph.add("LoraModelLoader", model=model["model"], lora=lora["lora"])["model"]


def calibrated(graph: Graph, model: tuple[Node, str], prompts: tuple[Node, Node, Node]):
    """The plan from one full run with another seed, and what it measured."""
    graph.column("8 · Calibrate", BROWN, 440)
    calibrating = graph.add("BraidMagCacheCalibrate", model=model)
    run = sampler(graph, "Calibration run", calibrating["model"], prompts, steps=STEPS, seed=1)
    calibration = graph.add(
        "BraidMagCacheCalibration",
        420,
        calibrator=calibrating["calibrator"],
        latent=run["LATENT"],
        filename_prefix="",
    )
    return calibration["plan"]
