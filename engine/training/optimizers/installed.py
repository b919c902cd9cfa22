"""Imports of installed distributions only: where a module would come from is seen before it runs.

Python imports the first file of a name on sys.path, and ComfyUI's own folder comes first there: a
`lion_pytorch.py` beside main.py, or in a folder that some pack added, would run in place of the
package. What counts here is what pip recorded: a file is a distribution's when its RECORD names
it, and a distribution is installed when it lies in a site-packages folder of sys.path.
"""

import importlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution
from itertools import chain
from pathlib import Path
from types import ModuleType
from urllib.parse import urlparse
from urllib.request import url2pathname

from ...refusals import said

SITE_FOLDERS = ("site-packages", "dist-packages")
"""What the folders into which pip installs are called; Debian's has the second name."""


def import_installed(module: str, pip_name: str) -> ModuleType | None:
    """The module, imported; None where its package is installed but has no module of that name.

    ImportError, with a reason that goes on after the name of what was wanted, when the package is
    not installed, when another file hides it, and when it raises anything while it is imported.
    """
    package = module.split(".")[0]
    _refuse_foreign(package, pip_name)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            return None
        raise ImportError(f"cannot be imported ({said(error)})") from error
    except BaseException as error:  # sys.exit() in a package would end ComfyUI's queue
        raise ImportError(f"cannot be imported ({said(error)})") from error


def installed_distributions(name: str | None = None) -> Iterator[Distribution]:
    """Those in a site-packages folder of sys.path; of one name only with `name`."""
    for distribution in importlib.metadata.distributions(name=name):
        if _root(distribution).name in SITE_FOLDERS:
            yield distribution


def _refuse_foreign(package: str, pip_name: str) -> None:
    """ImportError unless importing `package` would run a file of an installed distribution."""
    spec = _spec(package)
    if spec is None:
        raise ImportError(
            f"needs the package {package}, which is not installed here: pip install {pip_name}"
        )
    likely = installed_distributions(name=pip_name)  # most of the time it is called like that
    if not any(_brings(each, spec) for each in chain(likely, installed_distributions())):
        raise ImportError(
            f"would run {spec.origin}, which is not of an installed package; move that file away, "
            f"and pip install {pip_name} where it is missing"
        )


def _spec(package: str) -> ModuleSpec | None:
    """Where a top-level name would be imported from; nothing is imported to find it."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    # a folder without __init__.py is a package to Python, but nobody installed it
    return spec if spec and spec.has_location and spec.origin else None


def _brings(distribution: Distribution, spec: ModuleSpec) -> bool:
    """Whether the file of that module is one that this distribution installed."""
    origin = Path(spec.origin or "")
    is_folder = spec.submodule_search_locations is not None
    recorded = f"{spec.name}/{origin.name}" if is_folder else origin.name
    if _is_same(_root(distribution) / recorded, origin):
        return f"\n{recorded}," in "\n" + (distribution.read_text("RECORD") or "")
    editable = _editable_root(distribution)
    return editable is not None and origin.resolve().is_relative_to(editable)


def _root(distribution: Distribution) -> Path:
    return Path(str(distribution.locate_file("")))


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _editable_root(distribution: Distribution) -> Path | None:
    """The project folder of a `pip install -e`, as PEP 610 records it."""
    try:
        recorded = json.loads(distribution.read_text("direct_url.json") or "{}")
        url = urlparse(recorded.get("url", ""))
        if url.scheme == "file" and recorded.get("dir_info", {}).get("editable"):
            return Path(url2pathname(url.path)).resolve()
    except (ValueError, AttributeError):
        pass
    return None
