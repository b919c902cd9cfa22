"""Chapter 3: the run's ten checkpoints averaged after the fact, measured on held-out items."""

from ...checkpoints import AdapterStateDict
from ...ema.average import averaged, plan_average
from ...ema.figure import draw_weights
from ...ema.schedule import MusubiPower, Power, Schedule
from ...network.adapter_file import load_weights, read_adapter
from ...network.attach import attached
from ...network.layers import layer_shapes
from ...training.options import Validation
from ...training.validation import Validator
from ..model import Flux
from .report import Picture, Section
from .training import STYLE, Trained, recognised, sampled, style, style_items

SIGMA_REL = 0.15
HELD_OUT = 20


def averaging_section(model: Flux, trained: Trained) -> Section:
    """Leaves the exact average in `trained.network`."""
    validator = Validator(style_items(HELD_OUT, seed=1000), Validation(every_n_steps=1))
    rows = [["", "held-out loss", f"style score ({STYLE})", "letters recognised"]]
    rows.append(["last checkpoint", *_measured(model, trained, validator)])
    for title, schedule in (
        ("musubi's sigma_rel", MusubiPower(sigma_rel=SIGMA_REL)),
        ("exact sigma_rel", Power(sigma_rel=SIGMA_REL)),
    ):
        _load(model, trained, _average(trained, schedule))
        rows.append([title, *_measured(model, trained, validator)])
    plan = plan_average(trained.checkpoints, Power(sigma_rel=SIGMA_REL))
    return Section(
        title="Post-hoc EMA",
        text=f"Ten checkpoints averaged at sigma_rel {SIGMA_REL}, on {HELD_OUT} pictures that were "
        "not trained on, at the same noise for every row. One short run: differences of a per "
        "cent are noise.",
        pictures=[
            Picture(
                pixels=draw_weights(plan),
                caption="What each checkpoint counts, over the ideal profile.",
            )
        ],
        table=rows,
    )


def _average(trained: Trained, schedule: Schedule) -> AdapterStateDict:
    merging = averaged(plan_average(trained.checkpoints, schedule))
    while True:
        try:
            next(merging)
        except StopIteration as finished:
            return finished.value.lora


def _load(model: Flux, trained: Trained, lora: AdapterStateDict) -> None:
    weights = read_adapter(lora, layer_shapes(model), trained.targets.architecture)
    load_weights(trained.network, weights)


def _measured(model: Flux, trained: Trained, validator: Validator) -> list[str]:
    with attached(model, trained.network):
        loss = validator.measure(trained.run).loss
        trained.network.eval()
        rows = sampled(model)
    return [f"{loss:.5f}", f"{style(rows):.2f}", f"{recognised(rows):.0%}"]
