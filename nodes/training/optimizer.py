"""The optimizer of a training run and the schedule of its learning rate."""

import dataclasses

from comfy_api.latest import io

from ...engine.arguments import parse_arguments, parse_literal
from ...engine.training.optimizers.classes import OPTIMIZERS, find_optimizer_class
from ...engine.training.optimizers.optimizer import OptimizerSpec
from ...engine.training.optimizers.schedule import LR_SCHEDULERS
from .. import sockets
from ..owner import allowed_optimizers

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
                    "schedulefree. custom takes a class of a listed package: write it into "
                    "optimizer_class.",
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
                    tooltip="With optimizer_type custom: a class of torch.optim or of an installed "
                    "package of the list in the help, such as bitsandbytes.optim.AdEMAMix8bit. "
                    "The server's owner can allow others.",
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
        is_custom = optimizer_type == CUSTOM
        spec = OptimizerSpec(
            optimizer_type=optimizer_class.strip() if is_custom else optimizer_type,
            optimizer_args=_literals(optimizer_args, "optimizer_args"),
            lr_scheduler=lr_scheduler,
            lr_warmup_steps=lr_warmup_steps,
            lr_scheduler_args=_literals(lr_scheduler_args, "lr_scheduler_args"),
        )
        allowed = allowed_optimizers() if is_custom else ()
        found = find_optimizer_class(spec.optimizer_type, allowed)  # a refusal shows at this node
        return io.NodeOutput(dataclasses.replace(spec, optimizer_class=found))

    @classmethod
    def fingerprint_inputs(cls, optimizer_type: str, **widgets) -> tuple[str, ...]:
        """A class that the owner no longer allows is not kept in ComfyUI's cache."""
        return allowed_optimizers() if optimizer_type == CUSTOM else ()


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
