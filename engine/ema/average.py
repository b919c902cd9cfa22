"""Post-hoc EMA of a run: which files count how much, and the averaged adapter itself."""

import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints import AdapterStateDict, Checkpoints
from ..disk.folders import Search
from ..disk.hashes import sshs_hashes
from ..files import read_tensors, write_safetensors
from ..refusals import refuse_other
from .merge import Progress, merged_tensors, prepare_merge, write_merged
from .one_run import check_one_run
from .order import TrainedOrder, selected, trained_order
from .product import average_products
from .profile import Floats, centre_of_mass, gamma_from_sigma_rel
from .schedule import (
    Schedule,
    achieved_centre_of_mass,
    achieved_sigma_rel,
    follows_musubi,
    merge_betas,
    requested_sigma_rel,
    weights_from_betas,
)

SPACES = ("factors", "product")


@dataclass(frozen=True, kw_only=True, slots=True)
class AveragePlan:
    """The files of an average in training order, and what each counts."""

    order: TrainedOrder
    schedule: Schedule
    betas: Floats
    """Decay at each merge, (N - 1,)."""
    weights: Floats
    """What each file counts in the end, (N,)."""

    def report(self) -> dict[str, Any]:
        """What a user needs to judge or repeat the average; plain JSON values."""
        return {
            "files": [path.name for path in self.order.files],
            "steps": list(self.order.times),
            "betas": self.betas.tolist(),
            "weights": self.weights.tolist(),
            **self.summary(),
        }

    def summary(self) -> dict[str, Any]:
        """What the report says of all files together."""
        requested = requested_sigma_rel(self.schedule)
        gamma = None if requested is None else gamma_from_sigma_rel(requested)
        return {
            "unit": self.order.unit,
            "order_from": self.order.order_from,
            "duplicates_left_out": [path.name for path in self.order.duplicates],
            "earlier_files_left_out": self.order.windowed,
            "centre_of_mass": achieved_centre_of_mass(self.weights, self.order.times),
            "sigma_rel": achieved_sigma_rel(self.weights, self.order.times),
            "requested_centre_of_mass": None if gamma is None else centre_of_mass(gamma),
            "requested_sigma_rel": requested,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Average:
    """An averaged adapter."""

    lora: AdapterStateDict
    """A LORA_MODEL with the metadata that its file has or would have, but for the hashes."""
    report: dict[str, Any]
    """That of the plan, and what the merge found."""


def plan_average(
    checkpoints: Checkpoints,
    schedule: Schedule,
    sort: str = "step",
    first: int = 1,
    last: int = 0,
    search: Search | None = None,
) -> AveragePlan:
    """Order the files, choose `first` to `last` (from 1; 0 = the newest) and weigh them; `search`
    bounds what is read for that."""
    order = selected(trained_order(checkpoints.files, sort, search), first, last)
    return plan_for_order(order, schedule)


def plan_for_order(order: TrainedOrder, schedule: Schedule) -> AveragePlan:
    """The plan for files that are already in order."""
    betas = merge_betas(schedule, order.times, order.windowed)
    return AveragePlan(
        order=order,
        schedule=schedule,
        betas=betas,
        weights=weights_from_betas(betas),
    )


def averaged(
    plan: AveragePlan, space: str = "factors", output: Path | None = None
) -> Generator[Progress, None, Average]:
    """Average the files of a plan; saved to `output` too when it is given.

    Closing the generator early leaves no file. Raises ValueError, naming file and key, before the
    first step for files that do not fit together, and at the latest before `output` exists.
    """
    refuse_other("space", space, SPACES)
    merge = prepare_merge(plan.order.files, plan.betas.tolist(), follows_musubi(plan.schedule))
    report = plan.report() | {"space": space}
    if space == "product":
        product = yield from average_products(merge)
        tensors, report["truncation_error"] = product.tensors, product.truncation_error
        if output:
            hashes = sshs_hashes(tensors, merge.metadata)
            write_safetensors(output, tensors, merge.metadata | hashes)
    else:
        report["cosines"] = check_one_run(merge.sources)
        if output:
            yield from write_merged(merge, output)
            tensors = read_tensors(output)
        else:
            tensors = yield from merged_tensors(merge)
    return Average(lora=AdapterStateDict(tensors, merge.metadata), report=report)


def report_json(report: dict[str, Any]) -> str:
    """A report as text for people and programs."""
    return json.dumps(report, indent=1)
