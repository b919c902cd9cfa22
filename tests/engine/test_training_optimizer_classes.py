"""Optimizers by list: no module runs because a workflow names it."""

import importlib
import site
import sys

import pytest
import torch
from optimizer_packages import EVIL, OPTIMIZER, install, plant, traces

from comfyui_braid.engine.training.optimizers.classes import (
    OPTIMIZERS,
    PACKAGES,
    find_optimizer_class,
)

ENTRY_POINTS = """
[project.entry-points."comfyui_braid.optimizers"]
Mine = "braid_try.offered:Offered"
AdamW = "braid_try.offered:Offered"
"""
MODULES = {
    "braid_try.offered": OPTIMIZER.format(name="Offered"),
    "braid_try.allowed": OPTIMIZER.format(name="Allowed") + "\nclass Other: pass\n",
    "braid_try.leaves": "import sys\nsys.exit(3)\n",
    "braid_try.interrupts": "raise KeyboardInterrupt\n",
    "braid_try.needs": "import surely_missing\n",
    "braid_try.broken": "def broken(:\n",
}


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory):
    """A site-packages folder with a distribution that pip installed there, and one with -e."""
    root = tmp_path_factory.mktemp("installed")
    folder = root / "site-packages"
    install(root / "project", MODULES, folder, entry_points=ENTRY_POINTS)
    modules = {"braid_editable.mine": OPTIMIZER.format(name="Mine")}
    install(root / "editable", modules, folder, "--editable")
    return folder


@pytest.fixture
def clean_imports(monkeypatch):
    """What a test imports, and where from, is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in {*PACKAGES, "braid_try", "braid_editable"} - {"torch"}:
            del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def installed(site_packages, clean_imports):
    site.addsitedir(str(site_packages))


@pytest.mark.parametrize(
    "name", ["input.evil.X", "models.loras.pack.readme.X", "evil.X", "output.evil.X", "temp.evil.X"]
)
def test_a_file_in_a_folder_of_comfyui_does_not_run_because_a_workflow_names_it(
    name, tmp_path, monkeypatch, clean_imports
):
    plant(tmp_path, name.rpartition(".")[0])
    monkeypatch.chdir(tmp_path)
    sys.path[:0] = ["", str(tmp_path)]
    with pytest.raises(ValueError, match=r"not an optimizer class .*SECURITY\.md"):
        find_optimizer_class(name)
    assert traces(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        "venv.__main__.X",
        "unittest.__main__.X",
        "lib2to3.__main__.X",
        "idlelib.idle.X",
        "test.__main__.X",
        "antigravity.X",
        "this.X",
        "torch.utils.bottleneck.__main__.X",
        "torch.distributed.run.X",
        "transformers.commands.transformers_cli.X",
        "bitsandbytes.__main__.X",
        "pytorch_optimizer.__main__.X",
    ],
)
def test_no_program_starts_because_a_workflow_names_its_module(name):
    module = name.rpartition(".")[0]
    before = sys.modules.get(module)
    with pytest.raises(ValueError, match="not an optimizer class|not installed here"):
        find_optimizer_class(name)
    assert sys.modules.get(module) is before


@pytest.mark.parametrize("place", ["", "input", "models/loras", "custom_nodes/pack"])
@pytest.mark.parametrize("package", sorted(PACKAGES.keys() - {"torch", "transformers"}))
def test_a_file_called_like_an_allowed_package_does_not_run_in_its_place(
    package, place, tmp_path, monkeypatch, clean_imports
):
    """First on sys.path, as what lies beside ComfyUI's main.py is."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    plant(tmp_path / place, package)
    monkeypatch.chdir(tmp_path / place)
    sys.path[:0] = ["", str(tmp_path / place)]
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="which is not of an installed package"):
        find_optimizer_class(f"{package}.X")
    assert traces(tmp_path) == []


@pytest.mark.parametrize("kind", ["a package", "a folder without __init__.py", "with a RECORD"])
def test_a_folder_called_like_an_allowed_package_does_not_run_either(
    kind, tmp_path, monkeypatch, clean_imports
):
    """Not even with a record of its own: it is not in a site-packages folder."""
    plant(tmp_path, "came_pytorch.CAME")
    if kind != "a folder without __init__.py":
        (tmp_path / "came_pytorch" / "__init__.py").write_text(EVIL)
    if kind == "with a RECORD":
        info = tmp_path / "came_pytorch-9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: came-pytorch\nVersion: 9\n")
        (info / "RECORD").write_text("came_pytorch/__init__.py,,\ncame_pytorch/CAME.py,,\n")
    sys.path.insert(0, str(tmp_path))
    with pytest.raises(ValueError, match="came_pytorch"):
        find_optimizer_class("came_pytorch.CAME.X")
    assert traces(tmp_path) == []


def test_a_listed_package_is_found_under_the_spellings_that_a_shared_workflow_may_hold():
    pytest.importorskip("bitsandbytes")
    found = find_optimizer_class("bitsandbytes.optim.AdEMAMix8bit")
    assert find_optimizer_class("bitsandbytes.optim.ademamix.AdEMAMix8bit") is found
    assert find_optimizer_class("bitsandbytes.AdEMAMix8bit") is found
    assert find_optimizer_class("torch.optim.adamw.AdamW") is torch.optim.AdamW
    assert find_optimizer_class("NAdam") is torch.optim.NAdam


@pytest.mark.parametrize(
    "name", ["transformers.Adafactor", "transformers.optimization.Adafactor", "adafactor"]
)
def test_transformers_is_asked_for_adafactor_alone(name):
    transformers = pytest.importorskip("transformers.optimization")
    assert find_optimizer_class(name) is transformers.Adafactor
    with pytest.raises(ValueError, match="not an optimizer class"):
        find_optimizer_class("transformers.optimization.LayerWiseDummyOptimizer")


@pytest.mark.parametrize(
    "name",
    ["torch.optim.Optimizer", "torch.optim.lr_scheduler.LambdaLR", "torch.optim.swa_utils.X"],
)
def test_what_is_in_a_listed_module_but_trains_nothing_is_refused(name):
    with pytest.raises(ValueError, match="not an optimizer class"):
        find_optimizer_class(name)


def test_a_class_that_is_nearly_right_is_guessed():
    pytest.importorskip("schedulefree")
    with pytest.raises(ValueError, match=r"did you mean schedulefree\.SGDScheduleFree\?"):
        find_optimizer_class("schedulefree.SGDScheduleFre")


def test_what_an_installed_distribution_offers_is_found_by_its_name_and_its_path(installed):
    found = find_optimizer_class("Mine")
    assert found.__module__ == "braid_try.offered" and found.__name__ == "Offered"
    assert find_optimizer_class("braid_try.offered.Offered") is found
    with pytest.raises(ValueError, match="not an optimizer class"):
        find_optimizer_class("braid_try.allowed.Allowed")


def test_what_the_owner_allows_is_found_by_its_path_and_nothing_beside_it(installed):
    allowed = ("braid_try.allowed.Allowed", "braid_editable.mine.Mine")
    for path in allowed:
        found = find_optimizer_class(path, allowed)
        assert f"{found.__module__}.{found.__name__}" == path
    with pytest.raises(ValueError, match="not an optimizer class"):
        find_optimizer_class("braid_try.leaves.Allowed", allowed)


def test_an_entry_point_cannot_take_the_place_of_a_listed_name(installed):
    assert find_optimizer_class("AdamW") is torch.optim.AdamW
    assert find_optimizer_class("adamw") is torch.optim.AdamW


def test_what_the_owner_allows_is_not_taken_from_a_file_that_hides_it(
    installed, tmp_path, monkeypatch
):
    plant(tmp_path, "braid_try")
    sys.path.insert(0, str(tmp_path))
    for name in ("braid_try.X", "Mine"):
        with pytest.raises(ValueError, match="which is not of an installed package"):
            find_optimizer_class(name, ("braid_try.X",))
    assert traces(tmp_path) == []


@pytest.mark.parametrize(
    "module, sentence",
    [
        ("leaves", r"cannot be imported \(it would end the program: 3\)"),
        ("interrupts", r"cannot be imported \(it would interrupt the program\)"),
        ("needs", r"cannot be imported \(No module named 'surely_missing'\)"),
        ("broken", r"cannot be imported \(its code is broken: "),
        ("absent", "is not a class derived from torch.optim.Optimizer"),
        ("allowed.Other", "is not a class derived from torch.optim.Optimizer"),
    ],
)
def test_whatever_an_allowed_module_does_when_it_is_imported_is_one_sentence(
    module, sentence, installed
):
    path = f"braid_try.{module}" if "." in module else f"braid_try.{module}.X"
    with pytest.raises(ValueError, match=sentence):
        find_optimizer_class(path, (path,))


def test_the_short_names_stand_for_classes_of_the_table():
    for path in OPTIMIZERS.values():
        module, _, name = path.rpartition(".")
        package = PACKAGES[module.split(".")[0]]
        assert module in package.modules and (not package.classes or name in package.classes)
