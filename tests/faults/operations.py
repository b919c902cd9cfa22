"""What is killed: the nodes that write, on tiny real models, as the executor calls them."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.model_detection
import folder_paths
import matplotlib.pyplot  # noqa: F401  loaded once here, not in every child
import safetensors.torch
import torch
from comfy_api.latest import io
from fp8_files import state_dict
from tiny_models import FLUX, MODELS, TinyModel, build, conditioning, latent

from comfyui_braid.engine.checkpoints import find_checkpoints
from comfyui_braid.engine.comfyui.fp8.loader import Fp8Request, load_fp8
from comfyui_braid.engine.disk.hashes import sshs_hashes
from comfyui_braid.engine.files import read_header, write_safetensors
from comfyui_braid.engine.fp8.policy import Fp8Policy
from comfyui_braid.engine.magcache.plan import MagCachePlan
from comfyui_braid.engine.magcache.presets import preset_named
from comfyui_braid.engine.network.spec import NetworkSpec
from comfyui_braid.engine.training.options import Checkpointing, TrainingOptions
from comfyui_braid.engine.training.states.identity import fingerprint
from comfyui_braid.engine.training.states.saving import find_state
from comfyui_braid.engine.training.states.state import read_state
from comfyui_braid.nodes.ema.nodes import BraidPostHocEma
from comfyui_braid.nodes.fp8 import BraidSaveFp8
from comfyui_braid.nodes.magcache.calibration import BraidMagCacheCalibration
from comfyui_braid.nodes.training.train import BraidTrainLora

STEPS = 12
CALIBRATIONS = 10
LARGE = {**FLUX, "hidden_size": 512, "num_heads": 4}
NUMBERED = re.compile(r"_\d{5}_(?=\.)")
HASH = "sshs_model_hash"


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """Something that writes, and how it is gone on with after a kill."""

    name: str
    trials: int
    run: Callable[[], None]
    again: Callable[[], None]


def train(resume: str = "") -> None:
    """A run that saves everything after each step."""
    BraidTrainLora.hidden = io.HiddenHolder.from_dict({})
    saving = Checkpointing(save_every_n_steps=1, save_state=True, ema_shadows=True, resume=resume)
    widgets = {
        "steps": STEPS,
        "batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "seed": 0,
        "output_name": "mine",
        "mixed_precision": "no",
        "gradient_checkpointing": False,
        "options": TrainingOptions(checkpointing=saving),
    }
    with torch.inference_mode():
        BraidTrainLora.execute(
            model=[build("flux")],
            latents=[{"samples": latent("flux", 2)}],
            positive=[conditioning("flux")],
            network=[NetworkSpec(rank=8)],
            **{name: [value] for name, value in widgets.items()},
        )


def resume() -> None:
    """What a user does after a crash: the same run with resume on latest, unless it was done."""
    try:
        train("latest")
    except ValueError as error:
        if "raise steps to train on" not in str(error):
            raise


def average_in(run: Path) -> Callable[[], None]:
    """An average of four checkpoints of 16 MB each."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(2048, 1024, generator=generator) for name in ("down", "up")}
    for step in range(1, 5):
        moved = {f"x.lora_{name}.weight": t + 0.01 * step for name, t in base.items()}
        write_safetensors(run / f"run-step{step:08d}.safetensors", moved, {"ss_steps": str(step)})
    checkpoints = find_checkpoints(run)

    def average() -> None:
        method = {"method": "sigma_rel", "sigma_rel": 0.2}
        BraidPostHocEma.execute(checkpoints, method, "step", 1, 0, "factors", "loras/ema/ema")

    return average


def save_fp8_in(folder: Path) -> Callable[[], None]:
    """A FLUX of 36 million weights, saved in FP8."""
    MODELS["large"] = TinyModel("FluxSchnell", LARGE, (16, 16, 16), 64, pooled_dim=32)
    comfy.model_detection.detect_unet_config = lambda *args, **kwargs: dict(LARGE)
    path = folder / "large.safetensors"
    write_safetensors(path, state_dict("large"), {})
    with torch.inference_mode():
        model = load_fp8(Fp8Request(path=path, policy=Fp8Policy(granularity="tensor"))).patcher

    def save() -> None:
        with torch.inference_mode():
            BraidSaveFp8.execute(model, "diffusion_models/fp8")

    return save


class Measured:
    """A calibrator that has measured what a preset says."""

    def result(self) -> MagCachePlan:
        return preset_named("FLUX.1-dev")


def save_calibrations() -> None:
    BraidMagCacheCalibration.hidden = io.HiddenHolder.from_dict({})
    for _ in range(CALIBRATIONS):
        BraidMagCacheCalibration.execute(Measured(), {}, "calibration")


def operations(folder: Path) -> list[Operation]:
    """All of them; what they read lies in `folder`."""
    average, save_fp8 = average_in(folder / "run"), save_fp8_in(folder)
    return [
        Operation(name="training", trials=24, run=train, again=resume),
        Operation(name="EMA merge", trials=14, run=average, again=average),
        Operation(name="FP8 save", trials=14, run=save_fp8, again=save_fp8),
        Operation(name="calibration", trials=12, run=save_calibrations, again=save_calibrations),
    ]


def can_resume() -> bool:
    """Whether a killed training had saved a state."""
    return (
        find_state(Path(folder_paths.get_output_directory()) / "loras", "mine", "latest")
        is not None
    )


def key_of(path: Path) -> str:
    """The name under which two worlds hold the same file."""
    return NUMBERED.sub("", path.name)


def digest(path: Path) -> str:
    """Of everything in a file that a run decides; ValueError where the file is not whole."""
    if path.suffix == ".state":
        state = read_state(path)
        return fingerprint({key: state[key] for key in ("run", "shadows")})
    if path.suffix == ".json":
        MagCachePlan.from_json(path.read_text(encoding="utf-8"))
        return hashlib.sha256(path.read_bytes()).hexdigest()
    tensors, metadata = safetensors.torch.load_file(path), read_header(path).metadata
    if HASH in metadata and sshs_hashes(tensors, metadata)[HASH] != metadata[HASH]:
        raise ValueError(f"{path}: its hash does not fit its contents")
    return fingerprint(tensors)
