"""OptimizerSpec: the optimizer and learning-rate schedule of a run; Optimization: both, built."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...arguments import check_values, refuse_unknown
from ...refusals import said, shortened
from ..plan import MAX_STEPS
from ..states.form import optimizer_like, part_of, schedule_like
from .classes import OPTIMIZERS, find_optimizer_class
from .schedule import LR_SCHEDULERS, build_schedule

DEFAULT_ARGUMENTS: dict[str, dict[str, Any]] = {
    # with relative_step, its library default, Adafactor ignores the learning rate it is given
    "transformers.optimization.Adafactor": {
        "relative_step": False,
        "scale_parameter": False,
        "warmup_init": False,
    },
}
SET_ELSEWHERE = {"lr": "learning_rate of Train LoRA", "params": "LoRA Network"}


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSpec:
    """Socket BRAID_OPTIMIZER."""

    optimizer_type: str = "AdamW"
    """A short name of OPTIMIZERS, or a dotted path that `find_optimizer_class` knows."""
    optimizer_class: type[torch.optim.Optimizer] | None = None
    """The class, where it has been found already: with what the server's owner allows beyond the
    list. Never read from a document; None = found by `optimizer_type` in the list."""
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
        if not 0 <= self.lr_warmup_steps <= MAX_STEPS:
            raise ValueError(
                f"lr_warmup_steps is {self.lr_warmup_steps}; it must be from 0 to {MAX_STEPS}"
            )
        check_values("optimizer_args", self.optimizer_args)
        check_values("lr_scheduler_args", self.lr_scheduler_args)
        if self.is_schedule_free and (self.lr_scheduler != "constant" or self.lr_warmup_steps):
            raise ValueError(
                f"{self.optimizer_type} replaces the schedule; set lr_scheduler to constant "
                f"(it is {self.lr_scheduler}) and lr_warmup_steps to 0 (it is "
                f"{self.lr_warmup_steps:g}), and give warmup_steps in optimizer_args instead"
            )
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ValueError(
                f"lr_scheduler constant has no warm-up, but lr_warmup_steps is "
                f"{self.lr_warmup_steps}; choose constant_with_warmup or set lr_warmup_steps to 0"
            )
        for name, place in SET_ELSEWHERE.items():
            if name in self.optimizer_args:
                raise ValueError(f"optimizer_args: {name} is set by {place}; take it out here")
        if self.optimizer_args.get("relative_step"):
            raise ValueError(
                "optimizer_args: relative_step=True makes Adafactor ignore learning_rate and every "
                "schedule; leave it out and set learning_rate"
            )

    @property
    def class_name(self) -> str:
        return self.optimizer_type.split(".")[-1].lower()

    @property
    def is_schedule_free(self) -> bool:
        return "schedulefree" in self.class_name

    @property
    def finds_its_own_rate(self) -> bool:
        """Prodigy and D-Adaptation find one rate for all parameters."""
        return self.class_name.startswith("dadapt") or "prodigy" in self.class_name

    def warmup_steps(self, steps: int) -> int:
        """Warm-up in whole steps of a run of `steps`; of a share, as musubi, what is whole."""
        share = self.lr_warmup_steps
        return int(share * steps) if share < 1 else int(share)


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
        self.optimizer = _construct(spec, groups)
        self._schedule = build_schedule(
            self.optimizer,
            spec.lr_scheduler,
            steps=steps,
            warmup_steps=spec.warmup_steps(steps),
            arguments=spec.lr_scheduler_args,
        )
        self.last_learning_rates = tuple(group["lr"] for group in self.optimizer.param_groups)

    @property
    def description(self) -> str:
        """As musubi's metadata writes it: `torch.optim.adamw.AdamW(weight_decay=0.01)`."""
        kind = type(self.optimizer)
        arguments = ",".join(f"{k}={v}" for k, v in self.spec.optimizer_args.items())
        return f"{kind.__module__}.{kind.__qualname__}" + (f"({arguments})" if arguments else "")

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

    @contextlib.contextmanager
    def in_eval_mode(self) -> Iterator[None]:
        """Inside, a schedule-free optimizer shows its average, to be saved and sampled with.

        Its own way back from there rounds; here every weight comes back as it was, bit for bit.
        """
        if not self.spec.is_schedule_free:
            yield
            return
        optimizer: Any = self.optimizer  # has an eval() and a train(), which torch's own lack
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        trained = [parameter.detach().clone() for parameter in parameters]
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()
            with torch.no_grad():
                for parameter, value in zip(parameters, trained, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "schedule": self._schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, at the rate that this run's schedule has there.

        ValueError when it is the state of another optimizer or schedule.
        """
        saved = optimizer_like(self.optimizer.state_dict(), part_of(state, "optimizer"))
        self.optimizer.load_state_dict(saved)
        _restore_dtypes(self.optimizer, saved["state"])
        schedule = self._schedule
        schedule.load_state_dict(schedule_like(schedule.state_dict(), part_of(state, "schedule")))
        for group, base, factor in zip(
            self.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(schedule.last_epoch)


def _restore_dtypes(
    optimizer: torch.optim.Optimizer, saved: Mapping[int, Mapping[str, Any]]
) -> None:
    """Loading casts state to its parameter's dtype; ProdigyPlus counts on its bfloat16 parts."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in saved.items():
        if not isinstance(index, int):
            continue  # what some optimizers keep for all parameters together
        loaded = optimizer.state[parameters[index]]
        for name, value in entries.items():
            if isinstance(value, torch.Tensor) and name in loaded:
                loaded[name] = loaded[name].to(value.dtype)


def _construct(spec: OptimizerSpec, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    found: Callable[..., Any] = spec.optimizer_class or find_optimizer_class(spec.optimizer_type)
    parameters = inspect.signature(found).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        refuse_unknown("optimizer_args", spec.optimizer_args, parameters.keys() - SET_ELSEWHERE)
    defaults = DEFAULT_ARGUMENTS.get(f"{found.__module__}.{found.__qualname__}", {})
    try:
        optimizer = found(
            [dict(group) for group in groups],
            lr=groups[0]["lr"],
            **{**defaults, **spec.optimizer_args},
        )
        if spec.is_schedule_free:
            optimizer.train()
        return optimizer
    except (Exception, SystemExit) as error:  # lion_pytorch exits where triton is missing
        given = shortened(str(dict(spec.optimizer_args)), 200)
        raise ValueError(
            f"optimizer_args: {spec.optimizer_type} refuses {given} ({said(error)})"
            f"{defaults_said(found, spec.optimizer_args)}"
        ) from error


def defaults_said(found: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """The end of a sentence that refuses `arguments`: what the class has for them by default."""
    parameters = inspect.signature(found).parameters
    defaults = [
        f"{name}={shortened(repr(parameters[name].default))}"
        for name in arguments
        if name in parameters and parameters[name].default is not inspect.Parameter.empty
    ]
    return f"; by default it has {', '.join(defaults)}" if defaults else ""
