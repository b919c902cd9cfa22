"""Which optimizer classes a workflow may name, and where each is imported from.

A workflow is a stranger's document: nothing in it is imported by its name. What it names is looked
up in the tables below, and only then is a module of ours imported, of an installed package. The
server's owner may add to them, see SECURITY.md.
"""

import inspect
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import ModuleType

import torch

from ...refusals import did_you_mean, shortened
from .installed import import_installed, installed_distributions

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
"""Short names, in any case; any other class is named by its dotted path."""
ENTRY_POINTS = "comfyui_braid.optimizers"
"""The group in which an installed distribution offers further classes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A package whose optimizers a workflow may name."""

    distribution: str
    """What pip installs."""
    modules: tuple[str, ...]
    """All that is imported of it, in this order, until the class is found."""
    classes: tuple[str, ...] = ()
    """The only classes taken from it; empty: every optimizer in these modules."""


PACKAGES = {
    "torch": Package(distribution="torch", modules=("torch.optim",)),
    "bitsandbytes": Package(distribution="bitsandbytes", modules=("bitsandbytes.optim",)),
    "prodigyopt": Package(
        distribution="prodigyopt", modules=("prodigyopt", "prodigyopt.prodigy_reference")
    ),
    "prodigyplus": Package(distribution="prodigy-plus-schedule-free", modules=("prodigyplus",)),
    "schedulefree": Package(distribution="schedulefree", modules=("schedulefree",)),
    "pytorch_optimizer": Package(distribution="pytorch-optimizer", modules=("pytorch_optimizer",)),
    "dadaptation": Package(
        distribution="dadaptation", modules=("dadaptation", "dadaptation.experimental")
    ),
    "lion_pytorch": Package(
        distribution="lion-pytorch",
        modules=("lion_pytorch", "lion_pytorch.foreach", "lion_pytorch.cautious_lion"),
    ),
    "came_pytorch": Package(distribution="came-pytorch", modules=("came_pytorch",)),
    "torchao": Package(
        distribution="torchao", modules=("torchao.optim", "torchao.prototype.low_bit_optim")
    ),
    "transformers": Package(
        distribution="transformers",
        modules=("transformers.optimization",),
        classes=("Adafactor",),
    ),
}
"""By the top module; a dotted path in a workflow is one of these or nothing."""


def find_optimizer_class(
    optimizer_type: str, allowed: Collection[str] = ()
) -> type[torch.optim.Optimizer]:
    """The class of a short name, a name in torch.optim, or a dotted path of the tables.

    `allowed`: dotted paths of classes that the server's owner adds; those of entry points are
    found here. ValueError for any other name, before anything is imported for it.
    """
    try:
        with torch.inference_mode(False):  # a package may make tensors while it is imported
            found = _find(optimizer_type, allowed)
    except ImportError as error:
        raise ValueError(f"optimizer {shortened(optimizer_type)} {error}") from error
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer_type {optimizer_type}: it computes the loss several times a step, which "
            f"this trainer does not; choose one of {', '.join(OPTIMIZERS)}"
        )
    return found


def _find(optimizer_type: str, allowed: Collection[str]) -> type[torch.optim.Optimizer]:
    short_names = {name.lower(): path for name, path in OPTIMIZERS.items()}
    path = short_names.get(optimizer_type.lower())
    if path is None and (owners := _owners_path(optimizer_type, allowed)):
        return _owners(owners)
    found = _listed(path or optimizer_type)
    if found is None:
        raise ValueError(_refusal(optimizer_type))
    return found


def _owners(path: str) -> type[torch.optim.Optimizer]:
    module, _, name = path.rpartition(".")
    found = _optimizer_in(import_installed(module, module.split(".")[0]), name)
    if found is None:
        raise ValueError(
            f"optimizer {path}, which the server's owner allows, is not a class derived from "
            "torch.optim.Optimizer; its path must be that of the module which holds the class"
        )
    return found


def _owners_path(optimizer_type: str, allowed: Collection[str]) -> str | None:
    """The dotted path that this name stands for where the server's owner allows it."""
    if optimizer_type in allowed:
        return optimizer_type
    for offer in _offers():
        path = offer.value.replace(":", ".")
        if optimizer_type in (offer.name, path):
            return path
    return None


def _offers() -> Iterator[EntryPoint]:
    for distribution in installed_distributions():
        yield from distribution.entry_points.select(group=ENTRY_POINTS)


def _listed(path: str) -> type[torch.optim.Optimizer] | None:
    """The class at a dotted path of PACKAGES, or of that name in torch.optim; None for any other.

    What the path says of modules chooses among those that are imported anyway, and no more.
    """
    module_name, _, class_name = (path if "." in path else f"torch.optim.{path}").rpartition(".")
    top = module_name.split(".")[0]
    package = PACKAGES.get(top)
    if package is None or package.classes and class_name not in package.classes:
        return None
    if module_name != top and not any(_is_in(module_name, name) for name in package.modules):
        return None
    for name in (module_name,) if module_name in package.modules else package.modules:
        module = torch.optim if top == "torch" else import_installed(name, package.distribution)
        named = module if module_name == top else sys.modules.get(module_name)
        if found := _optimizer_in(named, class_name):
            return found
    return None


def _is_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def _optimizer_in(module: ModuleType | None, name: str) -> type[torch.optim.Optimizer] | None:
    """Its optimizer class of that name; a module that imports when it is asked is not asked."""
    found = vars(module).get(name) if module else None
    is_optimizer = inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)
    return found if is_optimizer and found is not torch.optim.Optimizer else None


def _refusal(optimizer_type: str) -> str:
    """The sentence for a name that is in no list."""
    known = [*OPTIMIZERS, *_exported(optimizer_type)]
    guess = did_you_mean(optimizer_type, known) if len(optimizer_type) < 100 else ""
    packages = ", ".join(name for name in PACKAGES if name not in ("torch", "transformers"))
    return (
        f"optimizer_type {shortened(optimizer_type)!r} is not an optimizer class that a workflow "
        f"may name{guess}; choose one of {', '.join(OPTIMIZERS)}, or the dotted path of a class of "
        f"torch.optim, {packages}; the server's owner can allow others, in "
        f"user/__braid/settings.json or by an entry point {ENTRY_POINTS}: see SECURITY.md"
    )


def _exported(path: str) -> list[str]:
    """Dotted paths in the package that `path` begins with, as far as it is imported by now."""
    top = path.split(".")[0]
    modules = PACKAGES[top].modules if top in PACKAGES else ()
    return [
        f"{top}.{name}"
        for module in modules
        if (loaded := sys.modules.get(module))
        for name in vars(loaded)
        if _optimizer_in(loaded, name)
    ]
