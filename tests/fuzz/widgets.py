"""Every node of the pack that its widgets alone can set going, with any values in them.

The queue checks what is typed, but not what a linked node hands on: numbers without bounds, and
texts of any kind. Widgets are found in the schemas, so that a new one is fuzzed at once.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import torch
from comfy_api.latest import io

from comfyui_braid.engine.checkpoints import AdapterStateDict, find_checkpoints
from comfyui_braid.engine.fp8.policy import Fp8Policy, LayerPatterns
from comfyui_braid.engine.magcache.plan import read_plan
from comfyui_braid.engine.magcache.rules import MagCacheSettings
from comfyui_braid.engine.network.attach import build_adapter
from comfyui_braid.engine.patterns import parse_patterns
from comfyui_braid.engine.timesteps.sampling import TimestepSampling
from comfyui_braid.engine.training.optimizers.optimizer import Optimization, OptimizerSpec
from comfyui_braid.engine.training.options import TrainingOptions
from comfyui_braid.engine.training.plan import TrainingPlan
from comfyui_braid.engine.training.states.saving import find_state, run_folder
from comfyui_braid.nodes import kinds
from comfyui_braid.nodes.magcache.inputs import parse_rule, plan_from_widgets
from comfyui_braid.nodes.outputs import loras_folder, next_file

from . import files
from .mutate import FLOATS, NUMBERS, mutated_text
from .places import output_in
from .target import written
from .typed import TYPED

CHANCE = 0.15
"""That one widget has another value."""
TYPED_COMBOS = ("resume", "folder", "file")
"""Menus that take any text: their nodes check it themselves."""
SMALL = {"samples": 1000, "count": 3, "resume": "", "width": 64, "height": 64, "scale": 2}
"""Values to begin with, where the default takes long or names what there may not be."""
DRAWING = {
    "BraidTimestepPreview",
    "BraidPostHocEma",
    "BraidEmaReconstruct",
    "BraidMagCachePlan",
}
"""Nodes that paint a picture, which takes a hundred times as long: one of them for four others."""
Widgets = dict[str, Any]


def mutated_node(rng: Random) -> str:
    """A node with the values of its widgets, as JSON."""
    name = rng.choice([*sorted(USES.keys() - DRAWING) * 4, *sorted(DRAWING)])
    schema = kinds()[name].define_schema()
    return json.dumps({"node": name, "widgets": filled(rng, schema.inputs)})


def filled(rng: Random, inputs: Sequence[Any]) -> Widgets:
    """Values of the widgets among these inputs, a few of them other ones."""
    values: Widgets = {}
    for each in inputs:
        is_changed = rng.random() < CHANCE
        match each:
            case io.DynamicCombo.Input():
                option = rng.choice(each.options)
                values[each.id] = {each.id: option.key} | filled(rng, option.inputs)
            case io.Int.Input() | io.Float.Input():
                usual = SMALL.get(each.id, each.default)
                others = NUMBERS if isinstance(each, io.Int.Input) else FLOATS
                values[each.id] = rng.choice(others) if is_changed else usual
            case io.Boolean.Input():
                values[each.id] = each.default != is_changed
            case io.String.Input() if is_changed:
                values[each.id] = mutated_text(rng, TYPED[each.id])
            case io.String.Input():
                values[each.id] = rng.choice((each.default, *TYPED[each.id]))
            case io.Combo.Input() if each.id in TYPED_COMBOS:
                texts = TYPED[each.id]
                values[each.id] = mutated_text(rng, texts) if is_changed else rng.choice(texts)
            case io.Combo.Input():
                values[each.id] = rng.choice(each.options)
    return values


def run_node(document: str, folder: Path) -> None:
    """The node in an output folder of its own, and what follows it as far as that is quick."""
    given = json.loads(document)
    with output_in(folder):
        USES[given["node"]](given["widgets"], folder)


def execute(name: str, **sockets: Any) -> Callable[[Widgets, Path], Any]:
    """Runs the node with these linked inputs; gives its first output."""
    return lambda widgets, folder: kinds()[name].execute(**widgets, **sockets).result[0]


def use_network(widgets: Widgets, folder: Path) -> None:
    spec = execute("BraidNetwork")(widgets, folder)
    for layer in files.LAYERS.values():
        build_adapter(layer, spec)


def optimise(spec: OptimizerSpec) -> None:
    """Two steps with what Optimizer and Schedule gives."""
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimization = Optimization(spec, [{"params": [parameter], "lr": 1e-3, "name": "unet"}], 10)
    for _ in range(2):
        parameter.grad = torch.full_like(parameter, 0.1)
        optimization.optimizer.step()
        optimization.advance()


def use_sampling(widgets: Widgets, folder: Path) -> None:
    sampling = execute("BraidTimestepSampling")(widgets, folder)
    sampling.distribution(64, 64).from_uniform(torch.linspace(0.0, 0.999, 50))


def use_checkpointing(widgets: Widgets, folder: Path) -> None:
    options: TrainingOptions = execute("BraidCheckpointing")(widgets, folder)
    options.checkpointing.saving_steps(100)
    options.checkpointing.kept(range(100))
    find_state(loras_folder(), "lora", options.checkpointing.resume)


def use_log(widgets: Widgets, folder: Path) -> None:
    """Makes the folder that TensorBoard would make."""
    log = execute("BraidTrainingLog")(widgets, folder).log
    place = log.logging_dir / f"{log.log_prefix}20260101" / log.log_tracker_name
    place.mkdir(parents=True)
    assert place.resolve().is_relative_to(folder.resolve()), f"{log} leads to {place}"


def plan_training(widgets: Widgets, folder: Path) -> None:
    named = {field.name for field in fields(TrainingPlan)}
    plan = TrainingPlan(**{name: value for name, value in widgets.items() if name in named})
    where = run_folder(loras_folder(), plan.output_name, None)
    assert where.resolve().is_relative_to(folder.resolve()), f"{plan} leads to {where}"


def write_checkpoints(folder: Path) -> Path:
    """The checkpoints of a run, in a folder of output/loras."""
    place = folder / "loras" / "run"
    place.mkdir(parents=True)
    for data, step in zip(files.checkpoints(), (200, 100, 300), strict=True):
        written(data, place, f"run-step{step:08}.safetensors")
    written(files.shadows()[0], place, "run-shadows.safetensors")
    return place


def load_checkpoints(widgets: Widgets, folder: Path) -> None:
    write_checkpoints(folder)
    node = kinds()["BraidLoadCheckpoints"]
    asked = node.validate_inputs(widgets["folder"], widgets["path"])
    if asked is not True:
        raise ValueError(asked)
    node.fingerprint_inputs(**widgets)
    node.execute(**widgets)


def with_checkpoints(name: str) -> Callable[[Widgets, Path], Any]:
    """Runs a node of Post-Hoc EMA on a run that has just been saved."""
    return lambda widgets, folder: execute(
        name, checkpoints=find_checkpoints(write_checkpoints(folder))
    )(widgets, folder)


def cache(widgets: Widgets, folder: Path) -> None:
    """MagCache as far as it goes without a model."""
    named = {field.name for field in fields(MagCacheSettings)}
    options: Mapping[str, Any] = {k: v for k, v in widgets.items() if k in named}
    plan = plan_from_widgets(widgets["preset"], widgets["mag_ratios"])
    MagCacheSettings(**{**options, "rule": parse_rule(widgets["rule"]), "plan": plan})


def load_calibration(widgets: Widgets, folder: Path) -> None:
    place = folder / "magcache"
    place.mkdir()
    written(files.calibrations()[0], place, "a.json")
    node = kinds()["BraidLoadCalibration"]
    asked = node.validate_inputs(**widgets)
    if asked is not True:
        raise ValueError(asked)
    node.execute(**widgets)


def plan_cache(widgets: Widgets, folder: Path) -> None:
    """With a calibration where the rule needs one."""
    measured = read_plan(written(files.calibrations()[0], folder, "plan.json"))
    plan = measured if widgets["rule"]["rule"] == "planned" else None
    execute("BraidMagCachePlan", plan=plan)(widgets, folder)


def choose_fp8(widgets: Widgets, folder: Path) -> None:
    chosen = {
        name: parse_patterns(f"{name}_patterns", widgets[f"{name}_patterns"])
        for name in ("include", "exclude")
    }
    granularity = widgets["granularity"]
    Fp8Policy(
        fp8_format=widgets["fp8_format"],
        granularity=granularity["granularity"],
        block_size=granularity.get("block_size", 64),
        scale_search=widgets["scale_search"],
        patterns=LayerPatterns(**chosen),
    ).group_size(64)


def name_file(below: str = "") -> Callable[[Widgets, Path], Any]:
    """A node that saves what only a model gives: as far as its file's name."""

    def use(widgets: Widgets, folder: Path) -> None:
        path = next_file(widgets["filename_prefix"], ".safetensors", below)
        assert path.resolve().is_relative_to(folder.resolve()), f"{widgets} leads to {path}"

    return use


def save_lora(widgets: Widgets, folder: Path) -> None:
    state = AdapterStateDict(files.adapter_state("lora", "comfyui"), {"ss_steps": "1"})
    execute("BraidSaveLora", lora=state)(widgets, folder)


def validate(widgets: Widgets, folder: Path) -> None:
    """A node of lists."""
    execute("BraidValidation", latents=[], positive=[])(
        {name: [value] for name, value in widgets.items()}, folder
    )


USES: dict[str, Callable[[Widgets, Path], Any]] = {
    "BraidNetwork": use_network,
    "BraidSaveLora": save_lora,
    "BraidTimestepSampling": use_sampling,
    "BraidTimestepPreview": execute("BraidTimestepPreview", timesteps=TimestepSampling()),
    "BraidTrainLora": plan_training,
    "BraidOptimizer": lambda widgets, folder: optimise(execute("BraidOptimizer")(widgets, folder)),
    "BraidCheckpointing": use_checkpointing,
    "BraidTrainingPreview": execute("BraidTrainingPreview", latent={}),
    "BraidValidation": validate,
    "BraidTrainingLog": use_log,
    "BraidCompile": execute("BraidCompile"),
    "BraidLoadCheckpoints": load_checkpoints,
    "BraidPostHocEma": with_checkpoints("BraidPostHocEma"),
    "BraidEmaReconstruct": with_checkpoints("BraidEmaReconstruct"),
    "BraidEmaSweep": with_checkpoints("BraidEmaSweep"),
    "BraidFp8Loader": choose_fp8,
    "BraidSaveFp8": name_file(),
    "BraidMagCache": cache,
    "BraidMagCacheCalibration": name_file("magcache"),
    "BraidMagCachePlan": plan_cache,
    "BraidLoadCalibration": load_calibration,
    "BraidPlaygroundDataset": execute("BraidPlaygroundDataset"),
    "BraidPlaygroundPrompt": execute("BraidPlaygroundPrompt"),
    "BraidPlaygroundDecode": execute(
        "BraidPlaygroundDecode", latent={"samples": torch.zeros(1, 16, 4, 4)}
    ),
}
"""By node id; the others have no widget that could hold anything but a choice of a menu."""
