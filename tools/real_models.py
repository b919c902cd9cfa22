"""Describes the workflows for real models; `examples.py` writes them with its own.

Model files, addresses and settings of the samplers are those of ComfyUI's own templates
(comfyui-workflow-templates 0.11.44: flux_dev_full_text_to_image, text_to_video_wan,
image_qwen_image); the MagCache values are the published ones of each list.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

from host.find import PACK

from .graph import BLUE, BROWN, GREEN, PURPLE, Graph, Node
from .playground import previewed_targets

HUB = "https://huggingface.co/"
WAN = "Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/"
QWEN = "Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/"


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """A model file that the front end offers to download."""

    address: str
    """Below huggingface.co."""
    directory: str
    """Folder under models/."""

    @property
    def name(self) -> str:
        return self.address.rsplit("/", 1)[1]

    def to_json(self) -> dict:
        return {"name": self.name, "url": HUB + self.address, "directory": self.directory}


def loader(graph: Graph, kind: str, files: dict[str, File], **given) -> Node:
    """One of core's loaders; `files` by the name of the widget that chooses them."""
    names = {widget: file.name for widget, file in files.items()}
    node = graph.add(kind, **names, **given)
    node.json["properties"]["models"] = [file.to_json() for file in files.values()]
    return node


def pictures(graph: Graph, title: str, folder: str, vae, clip) -> Node:
    """Pictures with captions of a folder under input/, encoded, and sorted by their size."""
    graph.column(title, GREEN, 340)
    found = graph.add("LoadImageTextDataSetFromFolder", folder=folder)
    scaled = graph.add(
        "ImageScaleToTotalPixels",
        image=found["images"],
        upscale_method="lanczos",
        megapixels=1.0,
        resolution_steps=64,
    )
    return _encoded(graph, scaled["IMAGE"], found["texts"], vae, clip)


def clips(graph: Graph, title: str, folder: str, vae, clip) -> Node:
    """Videos with captions of a folder under input/, their first 33 frames, encoded."""
    graph.column(title, GREEN, 340)
    found = graph.add("LoadVideoTextDataSetFromFolder", folder=folder)
    cut = graph.add("VideoTemporalCrop", video=found["videos"], start_frame=0, length=33)
    frames = graph.add("GetVideoComponents", video=cut["video"])
    scaled = graph.add(
        "ImageScaleToTotalPixels",
        image=frames["images"],
        upscale_method="lanczos",
        megapixels=0.38,
        resolution_steps=16,
    )
    return _encoded(graph, scaled["IMAGE"], found["texts"], vae, clip)


def _encoded(graph: Graph, images, texts, vae, clip) -> Node:
    encoded = graph.add("MakeTrainingDataset", images=images, texts=texts, vae=vae, clip=clip)
    return graph.add(
        "ResolutionBucket", latents=encoded["latents"], conditioning=encoded["conditioning"]
    )


def trained_and_averaged(
    graph: Graph, model, data: Node, held_out: Node | None, timesteps: dict, name: str
) -> Node:
    """What is trained, the run, and the mean of its checkpoints; the averaging node."""
    graph.column("3 · What is trained", PURPLE, 400)
    network = graph.add("BraidNetwork", network_dim=16, network_alpha=16)
    previewed_targets(graph, model, network)
    graph.column("4 · Noise levels, checkpoints", PURPLE, 420)
    levels = graph.add("BraidTimestepSampling", **timesteps)
    options = graph.add(
        "BraidCheckpointing", save_every_n_steps=100, save_last_n=0, save_state=True
    )
    if held_out is not None:
        options = graph.add(
            "BraidValidation",
            latents=held_out["latents"],
            positive=held_out["conditioning"],
            every_n_steps=100,
            options=options["options"],
        )
    graph.column("5 · Train", GREEN, 460)
    trained = graph.add(
        "BraidTrainLora",
        860,
        model=model,
        latents=data["latents"],
        positive=data["conditioning"],
        network=network["network"],
        timesteps=levels["timesteps"],
        options=options["options"],
        steps=1000,
        learning_rate=1e-4,
        output_name=name,
    )
    graph.column("6 · Average its checkpoints", PURPLE, 460)
    return graph.add(
        "BraidPostHocEma",
        checkpoints=trained["checkpoints"],
        method="sigma_rel",
        method__sigma_rel=0.15,
        filename_prefix=f"loras/{name}_ema",
    )


def published(ratios: str) -> dict:
    """The widgets of MagCache with what was published for a list, by its file's name."""
    preset = json.loads((PACK / "engine" / "magcache" / "ratios" / f"{ratios}.json").read_text())
    rule = {f"rule__{name}": value for name, value in preset["recommended"].items()}
    measure = preset["conditions"]["measure"]
    return {"preset": preset["name"], "rule": "magcache", "measure": measure, **rule}


def twice_sampled(
    graph: Graph, model, prompts: tuple[Node, Node, Node], ratios: str, show: Callable, **settings
) -> None:
    """The same noise with every step computed, and with MagCache."""
    positive, negative, latent = prompts
    inputs = {"positive": positive["CONDITIONING"], "negative": negative["CONDITIONING"]}
    inputs |= {"latent_image": latent["LATENT"], "seed": 42, **settings}
    graph.column("8 · Every step computed", BLUE, 340)
    show(graph.add("KSampler", title="Every step", model=model, **inputs)["LATENT"])
    graph.column("9 · With MagCache", GREEN, 420)
    cached = graph.add("BraidMagCache", model=model, **published(ratios))
    sampled = graph.add("KSampler", title="With MagCache", model=cached["model"], **inputs)
    show(sampled["LATENT"])
    report = graph.add("BraidMagCacheReport", model=cached["model"], latent=sampled["LATENT"])
    graph.add("PreviewAny", 200, title="What was skipped", source=report["report"])


def shown_pictures(graph: Graph, vae) -> Callable:
    def show(latent) -> None:
        decoded = graph.add("VAEDecode", samples=latent, vae=vae)
        graph.add("PreviewImage", 320, images=decoded["IMAGE"])

    return show


def shown_videos(graph: Graph, vae) -> Callable:
    def show(latent) -> None:
        decoded = graph.add("VAEDecode", samples=latent, vae=vae)
        video = graph.add("CreateVideo", images=decoded["IMAGE"], fps=16)
        graph.add("SaveVideo", 320, video=video["VIDEO"], filename_prefix="video/braid")

    return show


def flux(graph: Graph) -> None:
    """10: FLUX.1-dev: folder of pictures -> LoRA -> average -> picture, without and with cache."""
    graph.column("1 · Models", BLUE, 400)
    graph.note(
        "## Train a LoRA for FLUX.1-dev\n"
        "1. Put pictures with captions (`cat.png`, `cat.txt`) into `input/my_pictures`, five to "
        "ten others into `input/my_pictures_held_out`, and choose both folders.\n"
        "2. Press **Run**. *Resolution Bucket* sorts mixed sizes; *Validation Loss* measures on "
        "the pictures that are not trained on. Stop at any time: set `resume` to **latest** to "
        "go on.\n"
        "3. The average of the checkpoints is saved to `output/loras`.\n\n"
        "bf16 weights need about 24 GB of GPU memory; with less, raise `blocks_to_swap`, or load "
        "the model with *Load Diffusion Model (FP8 Scaled)* and train on that.",
        320,
    )
    unet = File(
        address="Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors",
        directory="diffusion_models",
    )
    encoders = "comfyanonymous/flux_text_encoders/resolve/main/"
    clip_l = File(address=encoders + "clip_l.safetensors", directory="text_encoders")
    t5 = File(address=encoders + "t5xxl_fp16.safetensors", directory="text_encoders")
    autoencoder = File(
        address="Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
        directory="vae",
    )
    model = loader(graph, "UNETLoader", {"unet_name": unet})
    clip = loader(graph, "DualCLIPLoader", {"clip_name1": clip_l, "clip_name2": t5}, type="flux")[
        "CLIP"
    ]
    vae = loader(graph, "VAELoader", {"vae_name": autoencoder})["VAE"]
    data = pictures(graph, "2 · Pictures", "my_pictures", vae, clip)
    held_out = pictures(graph, "Held out of training", "my_pictures_held_out", vae, clip)
    sampling = {"timestep_sampling": "flux_shift"}
    average = trained_and_averaged(graph, model["MODEL"], data, held_out, sampling, "flux_lora")
    graph.column("7 · Prompt", BROWN, 400)
    adapted = graph.add("LoraModelLoader", model=model["MODEL"], lora=average["lora"])
    text = graph.add("CLIPTextEncode", 160, clip=clip, text="what your captions call it, at night")
    nothing = graph.add("ConditioningZeroOut", conditioning=text["CONDITIONING"])
    latent = graph.add("EmptySD3LatentImage", width=1024, height=1024, batch_size=1)
    prompts = (text, nothing, latent)
    sampler = {"steps": 28, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    show = shown_pictures(graph, vae)
    twice_sampled(graph, adapted["model"], prompts, "flux_1_dev", show, **sampler)


def wan(graph: Graph) -> None:
    """11: Wan 2.1 1.3B: folder of clips -> LoRA -> average -> video, without and with cache."""
    graph.column("1 · Models", BLUE, 400)
    graph.note(
        "## Train a video LoRA for Wan 2.1 (1.3B)\n"
        "1. Put clips of at least 33 frames at 16 frames a second, with captions (`run.mp4`, "
        "`run.txt`), into `input/my_clips` and choose the folder. All clips of one shape must "
        "have the same number of frames: 4n + 1, as *Crop Video (Temporal)* takes them.\n"
        "2. Press **Run**.\n\n"
        "The 14B models train the same way: choose their file, and the preset of their name in "
        "*MagCache*. Wan 2.2 has two models: train the high-noise one with `min_timestep` 875, "
        "the low-noise one with `max_timestep` 875, one graph each. The nodes that read clips came "
        "with ComfyUI 0.29.",
        300,
    )
    weights = WAN + "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors"
    unet = File(address=weights, directory="diffusion_models")
    encoder = File(
        address=WAN + "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        directory="text_encoders",
    )
    autoencoder = File(address=WAN + "vae/wan_2.1_vae.safetensors", directory="vae")
    model = loader(graph, "UNETLoader", {"unet_name": unet})
    clip = loader(graph, "CLIPLoader", {"clip_name": encoder}, type="wan")["CLIP"]
    vae = loader(graph, "VAELoader", {"vae_name": autoencoder})["VAE"]
    data = clips(graph, "2 · Clips", "my_clips", vae, clip)
    sampling = {"timestep_sampling": "shift", "timestep_sampling__discrete_flow_shift": 3.0}
    average = trained_and_averaged(graph, model["MODEL"], data, None, sampling, "wan_lora")
    graph.column("7 · Prompt", BROWN, 400)
    adapted = graph.add("LoraModelLoader", model=model["MODEL"], lora=average["lora"])
    shifted = graph.add("ModelSamplingSD3", model=adapted["model"], shift=8.0)
    text = graph.add("CLIPTextEncode", 160, clip=clip, text="what your captions call it, in snow")
    bad = "overexposed, static, blurred, subtitles, worst quality, deformed"
    negative = graph.add("CLIPTextEncode", 120, title="Negative", clip=clip, text=bad)
    latent = graph.add("EmptyHunyuanLatentVideo", width=832, height=480, length=33, batch_size=1)
    prompts = (text, negative, latent)
    sampler = {"steps": 50, "cfg": 6.0, "sampler_name": "uni_pc", "scheduler": "simple"}
    show = shown_videos(graph, vae)
    twice_sampled(graph, shifted["MODEL"], prompts, "wan2_1_t2v_1_3b", show, **sampler)


def qwen_image(graph: Graph) -> None:
    """12: Qwen-Image: folder of pictures -> LoRA -> average -> picture, without and with cache."""
    graph.column("1 · Models", BLUE, 400)
    graph.note(
        "## Train a LoRA for Qwen-Image\n"
        "1. Put pictures with captions (`cat.png`, `cat.txt`) into `input/my_pictures` and choose "
        "the folder.\n"
        "2. Press **Run**.\n\n"
        "The FP8 weights are ComfyUI's own file: the LoRA is trained on what it will be used on, "
        "in about half of bf16's memory. A bf16 file loads the same way, and *Load Diffusion "
        "Model (FP8 Scaled)* makes more exact FP8 weights from it.",
        260,
    )
    weights = QWEN + "diffusion_models/qwen_image_fp8_e4m3fn.safetensors"
    unet = File(address=weights, directory="diffusion_models")
    encoder = File(
        address=QWEN + "text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors",
        directory="text_encoders",
    )
    autoencoder = File(address=QWEN + "vae/qwen_image_vae.safetensors", directory="vae")
    model = loader(graph, "UNETLoader", {"unet_name": unet})
    clip = loader(graph, "CLIPLoader", {"clip_name": encoder}, type="qwen_image")["CLIP"]
    vae = loader(graph, "VAELoader", {"vae_name": autoencoder})["VAE"]
    data = pictures(graph, "2 · Pictures", "my_pictures", vae, clip)
    sampling = {"timestep_sampling": "qwen_shift"}
    average = trained_and_averaged(graph, model["MODEL"], data, None, sampling, "qwen_lora")
    graph.column("7 · Prompt", BROWN, 400)
    adapted = graph.add("LoraModelLoader", model=model["MODEL"], lora=average["lora"])
    shifted = graph.add("ModelSamplingAuraFlow", model=adapted["model"], shift=3.1)
    text = graph.add("CLIPTextEncode", 160, clip=clip, text="what your captions call it, at night")
    negative = graph.add("CLIPTextEncode", 100, title="Negative", clip=clip, text="")
    latent = graph.add("EmptySD3LatentImage", width=1328, height=1328, batch_size=1)
    prompts = (text, negative, latent)
    sampler = {"steps": 50, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple"}
    show = shown_pictures(graph, vae)
    twice_sampled(graph, shifted["MODEL"], prompts, "qwen_image", show, **sampler)


WORKFLOWS: dict[str, Callable[[Graph], None]] = {
    "10_flux_train_lora": flux,
    "11_wan_train_lora": wan,
    "12_qwen_image_train_lora": qwen_image,
}
