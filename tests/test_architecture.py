"""The import directions of the house (CONTRIBUTING.md), checked on the syntax trees; and make."""

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "server",
    "nodes",
    "execution",
    "latent_preview",
    "node_helpers",
}
MAY_USE = {"training": {"network", "timesteps"}}
FEATURES = {"network", "timesteps", "training", "ema", "fp8", "magcache", "playground", "comfyui"}
ROOMS_MAY_USE = {
    "differentiable": set(),
    "magcache": set(),
    "fp8": {"differentiable"},
    "training": {"differentiable"},
}
"""The rooms of engine/comfyui; its files model.py, progress.py and playground.py are for all."""
MOST_FILES, MOST_LINES, LONGEST_FUNCTION, NINE_OF_TEN = 12, 300, 50, 20
"""Of a folder of the engine; of a file; of a function of the engine, `def` to its last line."""
MAY_IMPORT_TOOLS = {
    "browser/test_blueprints.py",
    "comfyui/test_help_tables.py",
    "engine/test_magcache_plan.py",
}
"""Tests of generated files against what generates them."""
SOURCES = sorted((ROOT / "engine").rglob("*.py")) + sorted((ROOT / "nodes").rglob("*.py"))


def _imports(path: Path):
    """Yield (absolute top-level module, None) or (None, path relative to the pack root)."""
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name.split(".")[0], None
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0], None
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level]
            target = [*base, *(node.module.split(".") if node.module else [])]
            names = [] if node.module and len(target) > 2 else [n.name for n in node.names]
            for name in names or [None]:
                yield None, tuple([*target, name] if name else target)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_house(path):
    room = path.relative_to(ROOT).parts
    for absolute, relative in _imports(path):
        if absolute:
            _check_absolute(path, room, absolute)
        else:
            _check_relative(path, room, relative)


def _check_absolute(path, room, module):
    assert module != "comfyui_braid", f"{path}: only relative imports inside the pack"
    if room[0] == "engine" and room[1] != "comfyui":
        assert module not in HOST, f"{path}: engine.{room[1]} must not know ComfyUI ({module})"
    if room[:2] == ("engine", "comfyui"):
        forbidden = {"server", "comfy_api", "nodes", "folder_paths"}
        assert module not in forbidden, f"{path}: {module} belongs in nodes/"
    if room[0] == "nodes" and room[-1] != "live.py":
        assert module != "server", f"{path}: only nodes/live.py imports the server"


def _check_relative(path, room, target):
    if room[0] != "engine":
        return
    assert target[0] == "engine", f"{path}: the engine must not import {'.'.join(target)}"
    feature = room[1]
    if feature == "comfyui" and len(room) > 3 and target[1:2] == ("comfyui",):
        other = target[2] if len(target) > 2 else None
        if other in ROOMS_MAY_USE and other != room[2]:
            allowed = ROOMS_MAY_USE[room[2]]
            assert other in allowed, f"{path}: comfyui.{room[2]} must not import comfyui.{other}"
    if feature == "comfyui" or len(target) < 2:
        return
    other = target[1]
    if other in FEATURES and other != feature:
        is_demo = room[:3] == ("engine", "playground", "demo")
        allowed = FEATURES - {"comfyui"} if is_demo else MAY_USE.get(feature, set())
        assert other in allowed, f"{path}: engine.{feature} must not import engine.{other}"


def test_no_import_runs_in_a_circle():
    names = {_module(path): path for path in SOURCES}
    uses = {name: _used(path, set(names)) - {name} for name, path in names.items()}
    while leaves := {name for name, used in uses.items() if not used & set(uses)}:
        uses = {name: used for name, used in uses.items() if name not in leaves}
    assert uses == {}, "these import each other, or what lies on such a circle"


def _module(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _used(path: Path, known: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """The modules of the pack that a file imports anywhere; of a name in one, the module."""
    package = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level]
            base = (*base, *(node.module.split(".") if node.module else ()))
            found |= {n if (n := (*base, each.name)) in known else base for each in node.names}
    return found & known


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in SOURCES}), ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_folder_has_room_for_a_dozen_files(folder):
    files = sorted(path.name for path in folder.glob("*.py"))
    assert len(files) <= MOST_FILES, f"{len(files)} files: {', '.join(files)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{lines} lines, at most {MOST_LINES}"


def test_functions_of_the_engine_are_short():
    lengths = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in SOURCES
        if path.is_relative_to(ROOT / "engine")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION} == {}
    assert sorted(lengths.values())[int(0.9 * len(lengths))] <= NINE_OF_TEN


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_test_file_is_imported_and_tools_only_by_the_tests_of_what_they_write(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert [name for name in names if re.search(r"(^|\.)test_", name)] == []
    if path.relative_to(ROOT / "tests").as_posix() not in MAY_IMPORT_TOOLS:
        assert [name for name in names if name.split(".")[0] == "tools"] == []


def test_the_pack_root_imports_nothing_while_loading():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert not [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_eval_no_pickle_no_print_no_globals(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"{path}:{node.lineno} global statement"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno} bare except"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            forbidden = {"eval", "exec", "compile", "print"}
            assert node.func.id not in forbidden, f"{path}:{node.lineno} calls {node.func.id}()"
    assert "pickle" not in {absolute for absolute, _ in _imports(path)}, f"{path} imports pickle"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_matplotlib_is_not_imported_while_comfyui_starts(path):
    tree = ast.parse(path.read_text())
    while_loading = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = [a.name for n in while_loading if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in while_loading if isinstance(n, ast.ImportFrom)]
    assert "matplotlib" not in {name.split(".")[0] for name in names}, f"{path}: see canvas.py"


def test_every_figure_is_drawn_in_a_figure_py_and_comes_as_pixels():
    drawing = {p for p in SOURCES if "new_figure(" in p.read_text() and p.name != "canvas.py"}
    figures = {path for path in SOURCES if path.name == "figure.py"}
    assert drawing == figures, "new_figure belongs into a feature's figure.py"
    for path in figures:
        functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
        drawn = {n.name: n.returns for n in functions if n.name.startswith("draw_")}
        assert drawn and {r and ast.unparse(r) for r in drawn.values()} == {"Pixels"}, path


def test_only_one_file_makes_a_path_to_write_from_what_was_typed():
    makers = {"get_save_image_path", "get_output_directory"}
    found = [p.name for p in SOURCES if any(name in p.read_text() for name in makers)]
    assert found == ["outputs.py"], (
        "use nodes/outputs.py, which tests/comfyui/test_typed_paths.py tries"
    )


def test_only_one_file_matches_the_regular_expressions_of_users():
    found = [p.name for p in SOURCES if "regex" in {module for module, _ in _imports(p)}]
    assert found == ["patterns.py"]


def test_make_sets_up_a_comfyui_that_is_found_only_later_and_says_at_once_when_there_is_none(
    tmp_path,
):
    def planned(comfyui):
        command = ["make", "-n", "demo-comfyui", f"COMFYUI={comfyui}", "PYTHON=python3"]
        env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        return done.stdout

    (tmp_path / "requirements.txt").write_text("aiohttp\n")
    first = planned(tmp_path)
    assert "pip install -q -r .venv/comfyui-requirements.txt" in first
    (tmp_path / "requirements.txt").write_text("aiohttp\nalembic\n")
    stamp = re.compile(r"touch (\.venv/comfyui-\d+\.ready)")
    assert stamp.findall(first) != stamp.findall(planned(tmp_path))
    assert planned("").split() == ["PYTHONPATH=tests", "python3", "-m", "tools.demo"]


SCRIPTS = sorted((ROOT / "web").rglob("*.js"))


def test_one_script_alone_touches_the_front_end():
    touching = [
        path.relative_to(ROOT / "web").as_posix()
        for path in SCRIPTS
        if re.search(r"scripts/\w+\.js|\bapp\.|\bapi\.|\bLiteGraph\b", _code(path))
    ]
    assert touching == ["extension.js"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_scripts_take_every_colour_from_comfyuis_variables_and_print_nothing(path):
    code = _code(path)
    fallbacks = re.sub(r"var\(--[\w-]+, #[0-9a-f]+\)", "", code)
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b|\brgba?\(|\bhsla?\(", fallbacks) == []
    assert "console." not in code


def _code(path: Path) -> str:
    """A script without its comments."""
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
