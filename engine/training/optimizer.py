"""OptimizerSpec: the optimizer and learning-rate schedule of a run, by name."""

import importlib
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .schedule import LR_SCHEDULERS, build_schedule

logger = logging.getLogger("comfyui_braid.training")

OPTIMIZERS = {
    "AdamW": "torch.optim.AdamW",
    "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
    "Adafactor": "transformers.optimization.Adafactor",
    "Prodigy": "prodigyopt.Prodigy",
    "AdamWScheduleFree": "schedulefree.AdamWScheduleFree",
    "Adam": "torch.optim.Adam",
    "RAdam": "torch.optim.RAdam",
    "SGD": "torch.optim.SGD",
}
"""Short names; any other importable class is named by its dotted path."""
DEFAULT_ARGUMENTS: dict[str, dict[str, Any]] = {
    # with relative_step, its library default, Adafactor ignores the learning rate it is given
    "Adafactor": {"relative_step": False, "scale_parameter": False, "warmup_init": False},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSpec:
    """Socket BRAID_OPTIMIZER."""

    optimizer_type: str = "AdamW"
    """A short name of OPTIMIZERS, or the dotted path of a torch.optim.Optimizer class."""
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the class."""
    lr_scheduler: str = "constant"
    lr_warmup_steps: float = 0
    """Steps; below 1 a share of the whole run."""
    lr_scheduler_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.optimizer_type.strip():
            raise ValueError(f"optimizer_type is empty; choose one of {', '.join(OPTIMIZERS)}")
        if self.lr_scheduler not in LR_SCHEDULERS:
            raise ValueError(
                f"lr_scheduler is {self.lr_scheduler!r}; choose one of {', '.join(LR_SCHEDULERS)}"
            )
        if self.lr_warmup_steps < 0:
            raise ValueError(f"lr_warmup_steps is {self.lr_warmup_steps}; it must be 0 or more")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ValueError(
                f"lr_scheduler constant has no warm-up, but lr_warmup_steps is "
                f"{self.lr_warmup_steps}; choose constant_with_warmup or set lr_warmup_steps to 0"
            )
        if self.is_schedule_free and self.lr_scheduler != "constant":
            raise ValueError(
                f"{self.optimizer_type} replaces the schedule; set lr_scheduler to constant "
                f"(it is {self.lr_scheduler}) and give warmup_steps in optimizer_args instead"
            )

    @property
    def class_name(self) -> str:
        return self.optimizer_type.split(".")[-1].lower()

    @property
    def is_schedule_free(self) -> bool:
        return "schedulefree" in self.class_name

    @property
    def finds_its_own_rate(self) -> bool:
        """Prodigy, D-Adaptation and relative-step Adafactor set one rate for all parameters."""
        relative = bool(self.optimizer_args.get("relative_step", False))
        return (
            self.class_name.startswith("dadapt")
            or "prodigy" in self.class_name
            or (self.class_name == "adafactor" and relative)
        )

    @property
    def description(self) -> str:
        """As musubi's metadata writes it: `torch.optim.AdamW(weight_decay=0.01)`."""
        path = OPTIMIZERS.get(self.optimizer_type, self.optimizer_type)
        arguments = ",".join(f"{k}={v}" for k, v in self.optimizer_args.items())
        return f"{path}({arguments})" if arguments else path

    def warmup_steps(self, steps: int) -> int:
        """Warm-up in whole steps of a run of `steps`."""
        share = self.lr_warmup_steps
        return round(share * steps) if share < 1 else round(share)


class Optimization:
    """A built optimizer with its schedule, stepped together."""

    def __init__(
        self, spec: OptimizerSpec, groups: Sequence[Mapping[str, Any]], steps: int
    ) -> None:
        """groups: {"params", "lr", "name"} each; steps: optimizer steps of the whole run."""
        if spec.finds_its_own_rate and len(groups) > 1:
            raise ValueError(
                f"LoRA+ needs two learning rates, but {spec.optimizer_type} finds one rate for all "
                "parameters by itself; set loraplus_lr_ratio to 0 or choose another optimizer"
            )
        self.spec = spec
        self.group_names = tuple(group["name"] for group in groups)
        self.optimizer = _build(spec, groups)
        self._schedule = build_schedule(
            self.optimizer,
            spec.lr_scheduler,
            steps=steps,
            warmup_steps=spec.warmup_steps(steps),
            arguments=spec.lr_scheduler_args,
        )
        self.last_learning_rates = tuple(group["lr"] for group in self.optimizer.param_groups)
        self.set_averaged(False)

    def advance(self) -> None:
        """Note the rates the step was made with, then move the schedule on."""
        self.last_learning_rates = tuple(float(g["lr"]) for g in self.optimizer.param_groups)
        self._schedule.step()

    def adapted_learning_rates(self) -> dict[str, float]:
        """d * lr per group of a Prodigy-like optimizer, else empty."""
        return {
            name: float(group["d"]) * float(group["lr"])
            for name, group in zip(self.group_names, self.optimizer.param_groups, strict=True)
            if "d" in group
        }

    def set_averaged(self, averaged: bool) -> None:
        """Schedule-free optimizers keep an average: True shows it, for saving and sampling."""
        if self.spec.is_schedule_free:
            self.optimizer.eval() if averaged else self.optimizer.train()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "schedule": self._schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])


def find_optimizer_class(optimizer_type: str) -> type[torch.optim.Optimizer]:
    """The class of a short name, a name in torch.optim, or a dotted path."""
    path = OPTIMIZERS.get(optimizer_type, optimizer_type)
    module_name, _, class_name = (path if "." in path else f"torch.optim.{path}").rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        package = module_name.split(".")[0]
        raise ValueError(
            f"optimizer {optimizer_type} needs the package {package}, which is not installed here: "
            f"pip install {package}"
        ) from error
    found = vars(module).get(class_name)
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError(
            f"optimizer_type {optimizer_type!r} is not an optimizer class; choose one of "
            f"{', '.join(OPTIMIZERS)}, or the dotted path of a torch.optim.Optimizer"
        )
    return found


def _build(spec: OptimizerSpec, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    found = find_optimizer_class(spec.optimizer_type)
    arguments = {**DEFAULT_ARGUMENTS.get(spec.optimizer_type, {}), **spec.optimizer_args}
    rate: dict[str, Any] = {"lr": groups[0]["lr"]}
    if arguments.get("relative_step"):
        logger.warning("Adafactor with relative_step=True ignores learning_rate")
        rate = {"lr": None}
        groups = [{k: v for k, v in group.items() if k != "lr"} for group in groups]
    try:
        return found([dict(group) for group in groups], **{**rate, **arguments})
    except TypeError as error:
        known = ", ".join(list(inspect.signature(found).parameters)[1:])
        raise ValueError(
            f"optimizer_args: {spec.optimizer_type} refuses {dict(spec.optimizer_args)} ({error}); "
            f"it takes {known}"
        ) from error
