"""What no test runs, because it takes minutes, still finds what it imports from the pack."""

import ast
import importlib
import importlib.util

import pytest
from host.find import PACK

SCRIPTS = sorted(
    path
    for folder in ("tests/bench", "tests/faults", "tests/full_size", "tests/fuzz", "tools")
    for path in (PACK / folder).glob("*.py")
)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_finds_what_it_imports_from_the_pack(path):
    missing = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("comfyui_braid"):
            module = importlib.import_module(node.module)
            missing += [
                f"{node.module}.{alias.name}"
                for alias in node.names
                if not hasattr(module, alias.name) and not _is_module(f"{node.module}.{alias.name}")
            ]
    assert missing == []


def _is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
