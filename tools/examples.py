"""Describes the example workflows and writes them: a part of `make workflows`.

Widget order and defaults come from a running ComfyUI, node sizes from its front end, so a changed
node means running this again, never editing JSON by hand.
"""

import sys
from collections.abc import Callable

from host.browse import browsing, measured
from host.serve import Server
from host.workflows import EXAMPLES

from . import real_models
from .everything import everything
from .graph import BLUE, BROWN, GREEN, PURPLE, Graph
from .playground import (
    playground_data,
    playground_prompts,
    playground_training,
    previewed_targets,
    sampled,
    sampler,
)


def train_a_lora(graph: Graph) -> None:
    """01: model and data -> targets -> train -> the same letter before and after.

    A template opens fitted into the window, and the canvas writes no text below 57 %: this one is
    kept so small that it opens readable.
    """
    graph.column("1 · Model and pictures", BLUE, 380)
    graph.note(
        "## Train a LoRA, and see what it learned\n"
        "A small FLUX that draws letters comes with Braid, and so do the pictures: nothing is "
        "downloaded, and a CPU is enough.\n\n"
        "Press **Run**. *Train LoRA* shows the loss while it works, then the same noise is "
        "sampled without and with the LoRA.\n\n"
        "Then try another `style`, or fewer layers: `target_mode` whitelist with "
        "`include_patterns` `.*img_attn.*`. *Train LoRA* has already saved the LoRA for ComfyUI; "
        "*Save LoRA* writes it once more, as kohya's and musubi-tuner's tools read it.",
        270,
    )
    model, data = playground_data(graph, "outlined", 40)
    graph.column("2 · What is trained", PURPLE, 380)
    network = graph.add("BraidNetwork", network_dim=16, network_alpha=16, loraplus_lr_ratio=4)
    timesteps = graph.add("BraidTimestepSampling", timestep_sampling="sigmoid")
    graph.column("3 · Train", GREEN, 400)
    previewed_targets(graph, model["model"], network, 180)
    trained = playground_training(
        graph,
        800,
        (model, data, network),
        timesteps=timesteps["timesteps"],
        steps=300,
        learning_rate=0.002,
        seed=42,
        output_name="outlined",
    )
    graph.column("4 · Before", BLUE, 320)
    prompts = playground_prompts(graph, "R")
    sampled(graph, "Without the LoRA", model["model"], prompts)
    graph.column("5 · After", GREEN, 320)
    adapted = graph.add("LoraModelLoader", model=model["model"], lora=trained["lora"])
    sampled(graph, "With the LoRA", adapted["model"], prompts)
    graph.add(
        "BraidSaveLora",
        lora=trained["lora"],
        filename_prefix="loras/outlined_kohya",
        key_format="kohya",
    )


def choose_timesteps(graph: Graph) -> None:
    """02: what the noise-level settings mean, and what a run really drew."""
    graph.column("1 · Model and pictures", BLUE, 400)
    graph.note(
        "## Which noise levels does a run train on?\n"
        "t = 1 is pure noise (composition, style), t = 0 the clean picture (detail). Change any "
        "value of a *Timestep Sampling* node: its chart follows at once, without running the "
        "graph. The chart draws through the trainer's own code, so it cannot lie.\n\n"
        "Press **Run** to train the playground for a moment: the last chart then shows what "
        "that run really drew, and its loss per noise level.",
        260,
    )
    model, data = playground_data(graph, "slanted", 20)
    graph.column("2 · Two that people use", PURPLE, 420)
    graph.add("BraidTimestepSampling", title="FLUX at 1024 x 1024", timestep_sampling="flux_shift")
    graph.add(
        "BraidTimestepSampling",
        title="Style-friendly: log-SNR around -6",
        timestep_sampling="logsnr",
        timestep_sampling__logit_mean=-6.0,
        timestep_sampling__logit_std=2.0,
    )
    graph.column("3 · The one of the run", PURPLE, 420)
    timesteps = graph.add(
        "BraidTimestepSampling",
        title="Qinglong mixture in a range, ten buckets",
        timestep_sampling="qinglong_flux",
        timestep_sampling__logit_mean=-6.0,
        timestep_sampling__logit_std=2.0,
        min_timestep=100,
        max_timestep=900,
        preserve_distribution_shape=True,
        num_timestep_buckets=10,
    )
    network = graph.add("BraidNetwork", network_dim=4, network_alpha=4)
    graph.column("4 · A short run", GREEN, 420)
    trained = playground_training(
        graph,
        780,
        (model, data, network),
        timesteps=timesteps["timesteps"],
        steps=60,
        learning_rate=0.001,
        output_name="slanted",
    )
    graph.column("5 · Planned and drawn", BLUE, 480)
    preview = graph.add(
        "BraidTimestepPreview",
        title="Planned, and what the run drew",
        timesteps=timesteps["timesteps"],
        width=128,
        height=128,
        loss_map=trained["loss_map"],
    )
    graph.add("PreviewImage", 420, images=preview["image"])


def train_and_resume(graph: Graph) -> None:
    """03: checkpoints, held-out loss, previews and logs; stop it and go on."""
    graph.column("1 · Model and pictures", BLUE, 400)
    graph.note(
        "## A run that can be stopped, looked at, trusted and continued\n"
        "Press **Run**, and cancel it half-way if you like: adapter and state are saved first.\n\n"
        "To go on, set `resume` to **latest** and press Run again. The result is the same, byte "
        "for byte, as that of a run that was never stopped (on a CPU). Raise `steps` to train "
        "longer.\n\n"
        "Two nodes are bypassed, because they need more than Braid installs; select one and press "
        "Ctrl+B to switch it on. *Training Log*: `pip install tensorboard`, then `tensorboard "
        "--logdir output/logs`. *Torch Compile for Training*: a C++ compiler (CPU) or Triton "
        "(GPU); it pays off on long runs.",
        320,
    )
    model, data = playground_data(graph, "checkered", 40)
    held_out = graph.add(
        "BraidPlaygroundDataset", title="Held out of training", style="checkered", count=10, seed=99
    )
    graph.column("2 · What is trained", PURPLE, 380)
    network = graph.add("BraidNetwork", network_dim=16, network_alpha=16, loraplus_lr_ratio=4)
    timesteps = graph.add(
        "BraidTimestepSampling", timestep_sampling="sigmoid", num_timestep_buckets=8
    )
    optimizer = graph.add(
        "BraidOptimizer",
        optimizer_type="AdamW",
        optimizer_args="weight_decay=0.01",
        lr_scheduler="cosine",
        lr_warmup_steps=0.1,
    )
    graph.column("3 · What it does besides", BROWN, 380)
    checkpoints = graph.add("BraidCheckpointing", save_every_n_steps=40, save_last_n=3)
    validation = graph.add(
        "BraidValidation",
        latents=held_out["latents"],
        positive=held_out["positive"],
        every_n_steps=20,
        options=checkpoints["options"],
    )
    prompts = playground_prompts(graph, "K")
    preview = graph.add(
        "BraidTrainingPreview",
        sample_every_n_steps=40,
        latent=prompts[2]["LATENT"],
        positive=prompts[0]["conditioning"],
        negative=prompts[1]["conditioning"],
        steps=15,
        cfg=2.0,
        options=validation["options"],
    )
    log = graph.add(
        "BraidTrainingLog", log_prefix="checkered_", options=preview["options"]
    ).bypass()
    compiled = graph.add("BraidCompile", options=log["options"]).bypass()
    graph.column("4 · Train", GREEN, 520)
    trained = playground_training(
        graph,
        900,
        (model, data, network),
        timesteps=timesteps["timesteps"],
        optimizer=optimizer["optimizer"],
        options=compiled["options"],
        steps=160,
        learning_rate=0.002,
        output_name="checkered",
    )
    graph.add("PreviewAny", 240, title="Resolved configuration", source=trained["report"])
    graph.column("5 · Result", BLUE, 340)
    adapted = graph.add("LoraModelLoader", model=model["model"], lora=trained["lora"])
    sampled(graph, "With the LoRA", adapted["model"], prompts)


def post_hoc_ema(graph: Graph) -> None:
    """04: ten checkpoints, averaged after the fact at several widths, from training to picture."""
    graph.column("1 · Train, keeping checkpoints", GREEN, 420)
    graph.note(
        "## Post-hoc EMA\n"
        "The run keeps ten checkpoints and five shadows. *Post-Hoc EMA* averages the checkpoints "
        "with exact weights: its chart shows what each counts, and follows `sigma_rel` while you "
        "drag it. *EMA from Shadows* rebuilds any width from the shadows, with no checkpoints "
        "at all. *EMA Sweep* makes several widths at once: one row of pictures for each, from the "
        "same noise.\n\n"
        "To average a run that is already finished, switch *Load Training Checkpoints* on "
        "(Ctrl+B), choose its folder and link it in the place of *Train LoRA*.",
        270,
    )
    model, data = playground_data(graph, "outlined", 40)
    network = graph.add("BraidNetwork", network_dim=16, network_alpha=16, loraplus_lr_ratio=4)
    checkpointing = graph.add("BraidCheckpointing", save_every_n_steps=20, ema_shadows=True)
    graph.column("2 · Train", GREEN, 440)
    trained = playground_training(
        graph,
        820,
        (model, data, network),
        options=checkpointing["options"],
        steps=200,
        learning_rate=0.002,
        output_name="ema",
    )
    graph.column("3 · Average", PURPLE, 460)
    graph.add(
        "BraidLoadCheckpoints", title="Load Training Checkpoints of an earlier run", folder="ema"
    ).bypass()
    average = graph.add(
        "BraidPostHocEma",
        checkpoints=trained["checkpoints"],
        method="sigma_rel",
        method__sigma_rel=0.15,
        filename_prefix="loras/outlined_ema",
    )
    graph.add(
        "BraidEmaReconstruct",
        340,
        checkpoints=trained["checkpoints"],
        sigma_rel=0.15,
        filename_prefix="",
    )
    graph.column("4 · The average at work", BLUE, 340)
    adapted = graph.add("LoraModelLoader", model=model["model"], lora=average["lora"])
    prompts = playground_prompts(graph, "R")
    sampled(graph, "With the average", adapted["model"], prompts)
    graph.column("5 · Several widths, same noise", BROWN, 340)
    sweep = graph.add(
        "BraidEmaSweep", checkpoints=trained["checkpoints"], sigma_rels="0.05, 0.1, 0.15, 0.2, 0.25"
    )
    graph.add("PreviewAny", 220, title="Widths, from the top", source=sweep["label"])
    swept = graph.add("LoraModelLoader", model=model["model"], lora=sweep["lora"])
    used = sampler(graph, "Once for each width", swept["model"], prompts)
    pictures = graph.add("BraidPlaygroundDecode", latent=used["LATENT"])
    single = graph.add("RebatchImages", images=pictures["image"])
    rows = graph.add("ImageGrid", images=single["IMAGE"], columns=4, padding=8)
    graph.add("PreviewImage", 480, title="One row for each width", images=rows["images"])


def fp8_scaled(graph: Graph) -> None:
    """05: the same model in bf16 and FP8, the same noise, the report, a file to keep."""
    graph.column("1 · Load", PURPLE, 420)
    graph.note(
        "## FP8 scaled weights\n"
        "*Load Diffusion Model (FP8 Scaled)* reads a bf16, fp16 or fp32 file and holds it in FP8, "
        "one chunk at a time. Its report says, layer by layer, what was kept and what it cost.\n\n"
        "Choose your own model in `unet_name`; LoRAs, training and saving work on the result.",
        200,
    )
    exact = graph.add("BraidPlaygroundModel", title="As it is (bf16)")
    quantized = graph.add(
        "BraidFp8Loader",
        560,
        unet_name="braid_playground.safetensors",
        granularity="block",
        granularity__block_size=64,
        scale_search="mse",
    )
    graph.add("PreviewAny", 300, title="Report", source=quantized["report"])
    graph.column("2 · Keep it", BROWN, 320)
    graph.add("BraidSaveFp8", model=quantized["model"])
    prompts = playground_prompts(graph, "S")
    graph.column("3 · bf16", BLUE, 340)
    sampled(graph, "bf16 weights", exact["model"], prompts)
    graph.column("4 · FP8", GREEN, 340)
    sampled(graph, "FP8 weights", quantized["model"], prompts)


def magcache(graph: Graph) -> None:
    """06: calibrate on one picture, plan, sample others with a third of the evaluations."""
    graph.column("1 · Calibrate", PURPLE, 360)
    graph.note(
        "## MagCache, calibrated in the graph\n"
        "One full run measures how the model's output changes over sigma. From that, *MagCache* "
        "plans before sampling which steps are computed and predicts the others; the strip in the "
        "node shows them.\n\n"
        "Compare the pictures on the right: all evaluations, a third of them planned, and simply "
        "fewer steps.\n\n"
        "The calibration is saved in `output/magcache`. Next time, switch *Load MagCache "
        "Calibration* on (Ctrl+B) and link its `plan` instead: no full run is needed.",
        300,
    )
    model = graph.add("BraidPlaygroundModel")
    calibrating = graph.add("BraidMagCacheCalibrate", model=model["model"])
    prompts = playground_prompts(graph, "A")
    graph.column("2 · One full run", BLUE, 340)
    run = sampled(graph, "Calibration run", calibrating["model"], prompts, steps=50, seed=1)
    calibration = graph.add(
        "BraidMagCacheCalibration",
        340,
        calibrator=calibrating["calibrator"],
        latent=run["LATENT"],
        filename_prefix="playground",
    )
    graph.column("3 · Plan", GREEN, 460)
    graph.add(
        "BraidLoadCalibration",
        title="Load the calibration of an earlier run",
        file="playground_00001_.json",
    ).bypass()
    cached = graph.add(
        "BraidMagCache",
        model=model["model"],
        plan=calibration["plan"],
        rule="planned",
        rule__speedup=3.0,
    )
    graph.add(
        "BraidMagCachePlan",
        plan=calibration["plan"],
        steps=50,
        rule="planned",
        rule__speedup=3.0,
    )
    others = playground_prompts(graph, "K")
    graph.column("4 · All 50 evaluations", BLUE, 340)
    sampled(graph, "50 steps", model["model"], others, steps=50, seed=5)
    graph.column("5 · A third of them", GREEN, 340)
    used = sampled(graph, "50 steps, planned", cached["model"], others, steps=50, seed=5)
    report = graph.add("BraidMagCacheReport", model=cached["model"], latent=used["LATENT"])
    graph.add("PreviewAny", 240, title="What was skipped", source=report["report"])
    graph.column("6 · Fewer steps instead", BROWN, 340)
    sampled(graph, "17 steps", model["model"], others, steps=17, seed=5)


WORKFLOWS: dict[str, Callable[[Graph], None]] = {
    "00_everything": everything,
    "01_train_a_lora": train_a_lora,
    "02_choose_timesteps": choose_timesteps,
    "03_train_and_resume": train_and_resume,
    "04_post_hoc_ema": post_hoc_ema,
    "05_fp8_scaled": fp8_scaled,
    "06_magcache_calibrate_and_use": magcache,
    **real_models.WORKFLOWS,
}


def main() -> None:
    wanted = sys.argv[1:] or list(WORKFLOWS)
    with Server.start() as server, browsing(server.url) as page:
        object_info = server.object_info()
        for name in wanted:
            graph = Graph(object_info)
            WORKFLOWS[name](graph)
            graph.lay_out(measured(page, graph.to_json()))
            graph.write(EXAMPLES / f"{name}.json")
            sys.stdout.write(f"{name}.json: {len(graph.nodes)} nodes\n")


if __name__ == "__main__":
    main()
