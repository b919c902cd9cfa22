"""Training Log: the figures of a run for TensorBoard or Weights & Biases."""

from comfy_api.latest import io

from ...engine.training.options import LOG_TARGETS, TrainingLog, TrainingOptions
from .. import sockets
from ..outputs import new_folder, plain_name
from .options import chained, options_input, options_output

A_DATE = "20260101"
"""What a log's folder has after its prefix."""


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
