"""What a training run does besides training: optimizer, checkpoints, logs, compile, previews."""

from typing import Any

from comfy_api.latest import io

from ..engine.arguments import parse_arguments, parse_literal
from ..engine.comfyui.preview import PreviewSampling
from ..engine.training.optimizer import OPTIMIZERS, OptimizerSpec
from ..engine.training.options import (
    LOG_TARGETS,
    Checkpointing,
    Compilation,
    Preview,
    TrainingLog,
    TrainingOptions,
    Validation,
)
from ..engine.training.schedule import LR_SCHEDULERS
from ..engine.training.state import STATE_SUFFIX
from . import sockets
from .outputs import inside_output, output_folder, plain_name

CUSTOM = "custom"


class BraidOptimizer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidOptimizer",
            display_name="Optimizer and Schedule",
            category=sockets.TRAINING,
            description="The optimizer and the learning-rate schedule of Train LoRA.",
            search_aliases=["braid", "adamw", "prodigy", "lr scheduler", "warmup", "rex"],
            inputs=[
                io.Combo.Input(
                    "optimizer_type",
                    options=[*OPTIMIZERS, CUSTOM],
                    default="AdamW",
                    tooltip="AdamW8bit needs bitsandbytes, Prodigy prodigyopt, AdamWScheduleFree "
                    "schedulefree. custom takes any class: write it into optimizer_class.",
                ),
                io.String.Input(
                    "optimizer_args",
                    default="",
                    multiline=True,
                    tooltip="Further arguments, key=value, one a line: weight_decay=0.01, "
                    "betas=(0.9, 0.99). Values are Python literals.",
                ),
                io.Combo.Input(
                    "lr_scheduler",
                    options=list(LR_SCHEDULERS),
                    default="constant",
                    tooltip="How the learning rate changes over the run. Must be constant for "
                    "schedule-free optimizers; rex decays late (arXiv 2107.04197).",
                ),
                io.Float.Input(
                    "lr_warmup_steps",
                    default=0.0,
                    min=0.0,
                    max=1_000_000.0,
                    step=0.01,
                    round=False,
                    tooltip="Steps in which the rate rises from low to full; below 1 a share of "
                    "the whole run (0.1 = a tenth). 0 = off.",
                ),
                io.String.Input(
                    "lr_scheduler_args",
                    default="",
                    multiline=True,
                    tooltip="Arguments of the schedule, key=value, one a line: num_cycles=3, "
                    "power=2.0, min_lr_ratio=0.1.",
                ),
                io.String.Input(
                    "optimizer_class",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="With optimizer_type custom: the dotted path of an installed "
                    "torch.optim.Optimizer class, such as bitsandbytes.optim.AdEMAMix8bit.",
                ),
            ],
            outputs=[sockets.Optimizer.Output("optimizer", tooltip="For Train LoRA (Braid).")],
        )

    @classmethod
    def execute(
        cls,
        optimizer_type: str,
        optimizer_args: str,
        lr_scheduler: str,
        lr_warmup_steps: float,
        lr_scheduler_args: str,
        optimizer_class: str = "",
    ) -> io.NodeOutput:
        name = optimizer_class.strip() if optimizer_type == CUSTOM else optimizer_type
        return io.NodeOutput(
            OptimizerSpec(
                optimizer_type=name,
                optimizer_args=_literals(optimizer_args, "optimizer_args"),
                lr_scheduler=lr_scheduler,
                lr_warmup_steps=lr_warmup_steps,
                lr_scheduler_args=_literals(lr_scheduler_args, "lr_scheduler_args"),
            )
        )


class BraidCheckpointing(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidCheckpointing",
            display_name="Checkpoints and Resume",
            category=sockets.TRAINING,
            description="Saves adapters while training, keeps what a resume needs, and resumes.",
            search_aliases=["braid", "save every", "resume", "state", "ema shadows"],
            inputs=[
                io.Int.Input(
                    "save_every_n_steps",
                    default=100,
                    min=0,
                    max=1_000_000,
                    tooltip="Save the adapter every so many steps under output/loras/<name>/; "
                    "0 = only at the end.",
                ),
                io.Int.Input(
                    "save_last_n",
                    default=0,
                    min=0,
                    max=100_000,
                    tooltip="How many step checkpoints are kept, a count (musubi's is a window "
                    "in steps); the best one by validation is always kept. 0 = all.",
                ),
                io.Boolean.Input(
                    "save_state",
                    default=True,
                    tooltip="Also save optimizer, schedule, data order and history, so that the "
                    "run can be resumed exactly. Cancelling always saves them.",
                ),
                io.Boolean.Input(
                    "ema_shadows",
                    default=False,
                    tooltip="Keep five running averages in memory (20 bytes a parameter), from "
                    "which EMA from Shadows rebuilds any width afterwards.",
                ),
                io.Combo.Input(
                    "resume",
                    options=["", "latest", *_states()],
                    default="",
                    tooltip="Go on from a saved state: latest of the run's output_name, or one of "
                    "those under output/loras. Empty: start afresh.",
                ),
                _options_input(),
            ],
            outputs=[_options_output()],
        )

    @classmethod
    def validate_inputs(cls, resume: str) -> bool:
        """Any state may be typed; whether it exists is said when the run starts."""
        return True

    @classmethod
    def execute(
        cls,
        save_every_n_steps: int,
        save_last_n: int,
        save_state: bool,
        ema_shadows: bool,
        resume: str,
        options: TrainingOptions | None = None,
    ) -> io.NodeOutput:
        part = Checkpointing(
            save_every_n_steps=save_every_n_steps,
            save_last_n=save_last_n,
            save_state=save_state,
            ema_shadows=ema_shadows,
            resume=resume,
        )
        return _chained(options, checkpointing=part)


class BraidTrainingLog(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidTrainingLog",
            display_name="Training Log",
            category=sockets.TRAINING,
            description="Figures of the run for TensorBoard or Weights & Biases.",
            search_aliases=["braid", "tensorboard", "wandb"],
            inputs=[
                io.Combo.Input(
                    "log_with",
                    options=list(LOG_TARGETS),
                    default="tensorboard",
                    tooltip="tensorboard writes files only. wandb sends to your account unless "
                    "WANDB_MODE=offline; log in with `wandb login`, never here.",
                ),
                io.String.Input(
                    "logging_dir",
                    default="logs",
                    tooltip="Folder under ComfyUI's output; each run gets a dated folder in it.",
                ),
                io.String.Input(
                    "log_prefix", default="", tooltip="Put before the date in the folder's name."
                ),
                io.String.Input(
                    "log_tracker_name",
                    default="network_train",
                    tooltip="TensorBoard's sub-folder and W&B's project.",
                ),
                io.String.Input(
                    "wandb_run_name",
                    default="",
                    advanced=True,
                    tooltip="Name of the run in W&B; empty: W&B invents one.",
                ),
                _options_input(),
            ],
            outputs=[_options_output()],
        )

    @classmethod
    def execute(
        cls,
        log_with: str,
        logging_dir: str,
        log_prefix: str,
        log_tracker_name: str,
        wandb_run_name: str = "",
        options: TrainingOptions | None = None,
    ) -> io.NodeOutput:
        part = TrainingLog(
            log_with=log_with,
            logging_dir=inside_output("logging_dir", logging_dir),
            log_prefix=plain_name("log_prefix", log_prefix),
            log_tracker_name=plain_name("log_tracker_name", log_tracker_name) or "network_train",
            wandb_run_name=wandb_run_name,
        )
        return _chained(options, log=part)


class BraidCompile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidCompile",
            display_name="Torch Compile for Training",
            category=sockets.TRAINING,
            description="Compiles each block while training; the MODEL itself stays as it is.",
            search_aliases=["braid", "dynamo", "inductor", "torch.compile"],
            inputs=[
                io.Combo.Input(
                    "dynamo_backend",
                    options=["inductor", "aot_eager", "eager", "cudagraphs"],
                    default="inductor",
                    tooltip="inductor makes code and needs a C++ compiler (CPU) or Triton (GPU); "
                    "the others are for finding faults.",
                ),
                io.Combo.Input(
                    "dynamo_mode",
                    options=[
                        "default",
                        "reduce-overhead",
                        "max-autotune",
                        "max-autotune-no-cudagraphs",
                    ],
                    default="default",
                    tooltip="More tuning: a longer first step, shorter later ones.",
                ),
                io.Boolean.Input(
                    "dynamo_fullgraph",
                    default=False,
                    tooltip="Compile each block whole or not at all: where that cannot be done, "
                    "the run goes on uncompiled, with a warning.",
                ),
                io.Combo.Input(
                    "dynamo_dynamic",
                    options=["auto", "off", "on"],
                    default="auto",
                    tooltip="Code for any size (on), for one size each (off), or as torch sees "
                    "fit. Musubi's users report trouble with on.",
                ),
                _options_input(),
            ],
            outputs=[_options_output()],
        )

    @classmethod
    def execute(
        cls,
        dynamo_backend: str,
        dynamo_mode: str,
        dynamo_fullgraph: bool,
        dynamo_dynamic: str,
        options: TrainingOptions | None = None,
    ) -> io.NodeOutput:
        part = Compilation(
            dynamo_backend=dynamo_backend,
            dynamo_mode=dynamo_mode,
            dynamo_fullgraph=dynamo_fullgraph,
            dynamo_dynamic={"off": False, "on": True, "auto": None}[dynamo_dynamic],
        )
        return _chained(options, compilation=part)


class BraidTrainingPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidTrainingPreview",
            display_name="Training Preview",
            category=sockets.TRAINING,
            description="Samples a picture every so many steps and shows it beside the loss curve.",
            search_aliases=["braid", "sample while training"],
            inputs=[
                io.Int.Input(
                    "sample_every_n_steps",
                    default=100,
                    min=1,
                    max=1_000_000,
                    tooltip="Steps between two pictures; one is drawn after the last step too.",
                ),
                io.Latent.Input(
                    "latent", tooltip="What to sample from, as for KSampler: its size is used."
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="The prompt. Empty: that of the first training item.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The negative prompt. Empty: no cfg."
                ),
                io.Sampler.Input(
                    "sampler", optional=True, tooltip="From KSamplerSelect. Empty: euler."
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="The noise schedule. Empty: the simple schedule with steps steps.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=1000,
                    tooltip="Sampling steps, where sigmas is empty.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance; 1 = off.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Of the sampled noise: the same every time, so that pictures compare.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes the picture. Empty: ComfyUI's rough latent colours.",
                ),
                _options_input(),
            ],
            outputs=[_options_output()],
        )

    @classmethod
    def execute(
        cls,
        sample_every_n_steps: int,
        latent: dict,
        steps: int,
        cfg: float,
        seed: int,
        positive: list | None = None,
        negative: list | None = None,
        sampler=None,
        sigmas=None,
        vae=None,
        options: TrainingOptions | None = None,
    ) -> io.NodeOutput:
        sampling = PreviewSampling(
            latent=latent,
            positive=positive,
            negative=negative,
            sampler=sampler,
            sigmas=sigmas,
            steps=steps,
            cfg=cfg,
            seed=seed,
            vae=vae,
        )
        part = Preview(every_n_steps=sample_every_n_steps, sampling=sampling)
        return _chained(options, preview=part)


class BraidValidation(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidValidation",
            display_name="Validation Loss",
            category=sockets.TRAINING,
            description="Loss on items held out of training, always at the same noise and noise "
            "levels, so that it can be compared across steps and runs.",
            search_aliases=["braid", "eval", "held out", "overfitting"],
            is_input_list=True,
            inputs=[
                io.Latent.Input("latents", tooltip="Latents that are not trained on."),
                io.Conditioning.Input("positive", tooltip="Their conditioning."),
                io.Int.Input(
                    "every_n_steps",
                    default=100,
                    min=1,
                    max=1_000_000,
                    tooltip="Steps between two measurements; one is made after the last step too.",
                ),
                io.Int.Input(
                    "timesteps_per_item",
                    default=8,
                    min=1,
                    max=1000,
                    tooltip="Noise levels per item, evenly spread over the run's own sampling.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Of the fixed noise; keep it to compare runs.",
                ),
                _options_input(),
            ],
            outputs=[_options_output()],
        )

    @classmethod
    def execute(
        cls,
        latents: list[dict],
        positive: list,
        every_n_steps: list[int],
        timesteps_per_item: list[int],
        seed: list[int],
        options: list | None = None,
    ) -> io.NodeOutput:
        part = Validation(
            latents=tuple(latents),
            conditioning=tuple(positive),
            every_n_steps=every_n_steps[0],
            timesteps_per_item=timesteps_per_item[0],
            seed=seed[0],
        )
        return _chained(options[0] if options else None, validation=part)


def _chained(options: TrainingOptions | None, **part: Any) -> io.NodeOutput:
    """The options so far, if any, and one more."""
    return io.NodeOutput((options or TrainingOptions()).adding(**part))


def _options_input() -> io.Input:
    return sockets.TrainingOptions.Input(
        "options", optional=True, tooltip="Further options: connect another of these nodes."
    )


def _options_output() -> io.Output:
    return sockets.TrainingOptions.Output("options", tooltip="For Train LoRA, or the next option.")


def _literals(text: str, option: str) -> dict[str, object]:
    """key=value lines with Python literals; a bare word stays text."""
    given = parse_arguments(text, option, unquote=False)
    return {key: _literal(key, value) for key, value in given.items()}


def _literal(key: str, value: str) -> object:
    words = {"true": True, "false": False, "none": None}  # "false" as text would count as true
    if value.lower() in words:
        return words[value.lower()]
    literal = value if value.isidentifier() else parse_literal(key, value)
    if literal == value or not isinstance(literal, str):
        return literal
    try:
        return _literal(key, literal)  # quotes that a shell would have taken off
    except ValueError:
        return literal  # quotes of a Python text


def _states() -> list[str]:
    """Saved states under output/loras, relative to it, newest first."""
    loras = output_folder() / "loras"
    found = sorted(loras.rglob(f"*{STATE_SUFFIX}"), key=lambda p: p.stat().st_mtime, reverse=True)
    return [path.relative_to(loras).as_posix() for path in found]


NODES = [
    BraidOptimizer,
    BraidCheckpointing,
    BraidTrainingPreview,
    BraidValidation,
    BraidTrainingLog,
    BraidCompile,
]
