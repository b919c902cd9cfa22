"""What the pack takes from ComfyUI, read off its syntax trees: symbols, and how they are called.

Three kinds of use are found: a name below an imported module (`comfy.sd.load_diffusion_model`),
an attribute of a variable whose annotation or making says its class (`model: ModelPatcher`), and
the arguments of each call of either.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from .find import PACK

HOST = ("comfy", "comfy_api", "comfy_extras", "comfy_kitchen", "folder_paths", "server")
ROOMS = ("engine/comfyui", "nodes")


@dataclass(frozen=True, kw_only=True)
class Use:
    """One place where the pack relies on ComfyUI."""

    symbol: str
    """Dotted name from a module of ComfyUI on; `Class()` in it is an instance."""
    place: str
    """file:line in the pack."""
    call: ast.Call | None
    """The call, where it is called."""


def uses() -> list[Use]:
    """Every use in the rooms that may know ComfyUI, in order of symbol."""
    found = []
    for room in ROOMS:
        for path in sorted((PACK / room).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += _uses_in(tree, path.relative_to(PACK).as_posix())
    return sorted(found, key=lambda use: (use.symbol, use.place))


def resolve(symbol: str) -> Any:
    """The object of that name; AttributeError or ImportError says which step is missing.

    None where only a run knows it: what lies below an attribute of an instance.
    """
    found, rest = _import_longest(symbol.split("."))
    for i, name in enumerate(rest):
        if name.endswith("()()"):  # an instance that is called, as a wrapper's executor is
            return _of_instance(getattr(found, name[:-4]), ["__call__", *rest[i + 1 :]])
        if name.endswith("()"):
            return _of_instance(getattr(found, name[:-2]), rest[i + 1 :])
        if inspect.isclass(found) and name == "instance":  # PromptServer.instance, once it runs
            return _of_instance(found, rest[i + 1 :])
        found = getattr(found, name)
    return found


def bind(target: Any, call: ast.Call) -> None:
    """TypeError where the signature does not take the call's arguments."""
    try:
        signature = inspect.signature(target)
    except ValueError:  # built in, has none
        return
    given = [argument for argument in call.args if not isinstance(argument, ast.Starred)]
    named = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
    whole = len(given) == len(call.args) and len(named) == len(call.keywords)
    (signature.bind if whole else signature.bind_partial)(*given, **named)


def _import_longest(parts: list[str]) -> tuple[Any, list[str]]:
    """The deepest module of a dotted name, and what is left of the name."""
    found = importlib.import_module(parts[0])
    for i, name in enumerate(parts[1:], 1):
        if hasattr(found, name) and not inspect.ismodule(getattr(found, name)):
            return found, parts[i:]
        try:
            found = importlib.import_module(".".join(parts[: i + 1]))
        except ModuleNotFoundError:
            return found, parts[i:]
    return found, []


def _of_instance(cls: type, names: list[str]) -> Any:
    """The bound method of an instance, None for its data; AttributeError without such a name."""
    if not names or cls is Any:  # io.Model.Type: ModelPatcher to a type checker only
        return None
    known = [cls, *(s for s in cls.__subclasses__() if s.__module__.split(".")[0] in HOST)]
    method = next((inspect.getattr_static(c, names[0], None) for c in known), None)
    if isinstance(method, FunctionType) and len(names) == 1:
        return MethodType(method, object())
    if method is None and not any(_sets(c, names[0]) for c in known):
        raise AttributeError(f"{cls.__name__} objects have no {names[0]}")
    return None


def _sets(cls: type, name: str) -> bool:
    """True where the class, or one that it is made from, has or sets that name."""
    return hasattr(cls, name) or any(
        f"self.{name} =" in inspect.getsource(base) or f"self.{name}:" in inspect.getsource(base)
        for base in cls.__mro__
        if base.__module__.split(".")[0] in HOST
    )


def _uses_in(tree: ast.Module, file: str) -> Iterator[Use]:
    names = _imported(tree)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}

    def found(node: ast.AST, scope: dict[str, str]) -> Iterator[Use]:
        symbol = _dotted(node, scope)
        if symbol is not None and id(node) not in inner:
            call = calls.get(id(node))
            yield Use(symbol=symbol, place=f"{file}:{node.lineno}", call=call)

    def visit(node: ast.AST, scope: dict[str, str]) -> Iterator[Use]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            scope = scope | _typed(node, scope)
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names if node.module.split(".")[0] in HOST else ():
                symbol = f"{node.module}.{alias.name}"
                yield Use(symbol=symbol, place=f"{file}:{node.lineno}", call=None)
        if isinstance(node, ast.Attribute | ast.Name):
            yield from found(node, scope)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, scope)

    yield from visit(tree, names)


def _imported(tree: ast.Module) -> dict[str, str]:
    """Local name -> dotted name, of what is imported from ComfyUI anywhere in the file."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                if top in HOST:
                    names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names if node.module.split(".")[0] in HOST else ():
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _typed(function: ast.AST, scope: dict[str, str]) -> dict[str, str]:
    """Variables of a function that hold an instance of a class of ComfyUI: name -> class.

    A parameter that hides an imported name is taken out of the scope ("").
    """
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    typed = {argument.arg: _class_of(argument.annotation, scope) or "" for argument in every}
    if isinstance(function, ast.Lambda):
        return typed
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            made = _made(node.value, scope | typed)
            if made:
                typed[node.targets[0].id] = made
    return typed


def _class_of(annotation: ast.AST | None, scope: dict[str, str]) -> str | None:
    symbol = _dotted(annotation, scope)
    return f"{symbol}()" if symbol and symbol.rsplit(".", 1)[-1][0].isupper() else None


def _made(value: ast.AST, scope: dict[str, str]) -> str | None:
    """The class of `Class(…)` and of `instance.clone()`."""
    if not isinstance(value, ast.Call):
        return None
    symbol = _dotted(value.func, scope)
    if symbol and symbol.endswith(".clone"):
        return symbol.removesuffix(".clone")
    last = (symbol or "").rsplit(".", 1)[-1]
    return f"{symbol}()" if last[:1].isupper() else None


def _dotted(node: ast.AST | None, scope: dict[str, str]) -> str | None:
    """The dotted name of a chain of attributes that begins at a name in scope."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or not scope.get(node.id):
        return None
    return ".".join([scope[node.id], *reversed(parts)])
