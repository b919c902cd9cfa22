"""What a training run does besides training: options that are chained before Train LoRA."""

from typing import Any

from comfy_api.latest import io

from ...engine.training.options import (
    LOG_TARGETS,
    Checkpointing,
    Compilation,
    TrainingLog,
    TrainingOptions,
)
from ...engine.training.state import STATE_SUFFIX
from .. import sockets
from ..outputs import loras_folder, new_folder, newest_first, plain_name

A_DATE = "20260101"
"""What a log's folder has after its prefix."""


def chained(options: TrainingOptions | None, **part: Any) -> io.NodeOutput:
    """The options so far, if any, and one more."""
    return io.NodeOutput((options or TrainingOptions()).adding(**part))


def options_input() -> io.Input:
    return sockets.TrainingOptions.Input(
        "options", optional=True, tooltip="Further options: connect another of these nodes."
    )


def options_output() -> io.Output:
    return sockets.TrainingOptions.Output("options", tooltip="For Train LoRA, or the next option.")


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
                options_input(),
            ],
            outputs=[options_output()],
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
        return chained(options, checkpointing=part)


def _states() -> list[str]:
    """Saved states under output/loras, relative to it, newest first."""
    loras = loras_folder()
    return [p.relative_to(loras).as_posix() for p in newest_first(loras, f"*{STATE_SUFFIX}")]


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
                options_input(),
            ],
            outputs=[options_output()],
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
            logging_dir=new_folder("logging_dir", logging_dir),
            log_prefix=plain_name("log_prefix", log_prefix, ending=A_DATE),
            log_tracker_name=plain_name("log_tracker_name", log_tracker_name) or "network_train",
            wandb_run_name=wandb_run_name,
        )
        return chained(options, log=part)


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
                options_input(),
            ],
            outputs=[options_output()],
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
        return chained(options, compilation=part)


NODES = [BraidCheckpointing, BraidTrainingLog, BraidCompile]
