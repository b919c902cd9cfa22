"""Checkpoints and Resume: what a run saves while it trains, and what it goes on from."""

from comfy_api.latest import io

from ...engine.training.options import Checkpointing, TrainingOptions
from ...engine.training.states.saving import LATEST
from ...engine.training.states.state import STATE_SUFFIX
from .. import sockets
from ..outputs import loras_folder, newest_first
from ..typed_paths import path_for_a_run, refusal_of
from .options import chained, options_input, options_output

AFRESH = "start afresh"
"""The `resume` of a run that resumes nothing; an empty text, as older workflows have it, too."""


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
                    options=[AFRESH, LATEST, *_states()],
                    default=AFRESH,
                    tooltip="Go on from a saved state: latest of the run's output_name, or one of "
                    "those under output/loras; or start afresh.",
                ),
                options_input(),
            ],
            outputs=[options_output()],
        )

    @classmethod
    def validate_inputs(cls, resume: str | None) -> bool | str:
        """Any state of this machine may be typed; whether it exists is said when the run starts."""
        return refusal_of("resume", resume) or True

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
        resume = "" if resume == AFRESH else resume
        if resume not in ("", LATEST):
            path_for_a_run("resume", resume, loras_folder())
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
