"""Packages that tests write, plant where they do not belong, and install with the real pip."""

import subprocess
import sys
from pathlib import Path

RAN = """
from pathlib import Path
Path(__file__).with_name(Path(__file__).name + ".ran").touch()
"""
"""The source of a module that leaves a file beside itself when it is imported."""
OPTIMIZER = """
import torch

class {name}(torch.optim.SGD):
    pass
"""
EVIL = RAN + OPTIMIZER.format(name="X")


def plant(root: Path, dotted: str, source: str = EVIL) -> Path:
    """The module of that dotted name below `root`, without any __init__.py on the way."""
    path = root.joinpath(*dotted.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return path


def traces(root: Path) -> list[str]:
    """The planted modules below `root` that have run."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.ran"))


def install(
    project: Path, modules: dict[str, str], into: Path, *options: str, entry_points: str = ""
) -> None:
    """Write a distribution of these modules (by dotted name) and have pip install it."""
    packages = sorted({name.split(".")[0] for name in modules})
    for name, source in modules.items():
        path = plant(project, name, source)
        for folder in path.relative_to(project).parents:
            if folder != Path("."):
                (project / folder / "__init__.py").touch()
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        f'[project]\nname = "{packages[0]}"\nversion = "1.0"\n{entry_points}\n'
        f"[tool.setuptools]\npackages = {packages}\n"
    )
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "--target", str(into)]
    subprocess.run([*command, *options, str(project)], check=True, capture_output=True)
