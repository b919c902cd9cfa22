"""Nodes of an API prompt in which every widget that is not given has its default."""

from collections.abc import Callable
from typing import Any

from .workflows import DYNAMIC_COMBO, declared, default, is_widget


def prompt_nodes(object_info: dict) -> Callable[..., dict]:
    """node(kind, **inputs), with the fields of a dynamic combo as `combo__field`."""

    def node(kind: str, **inputs: Any) -> dict:
        given = {name.replace("__", "."): value for name, value in inputs.items()}
        return {"class_type": kind, "inputs": _defaults(object_info[kind]["input"], given) | given}

    return node


def _defaults(inputs: dict, given: dict, prefix: str = "") -> dict[str, Any]:
    values = {}
    for name, kind, options in declared(inputs):
        if not is_widget(kind, options):
            continue
        value = values[prefix + name] = given.get(prefix + name, default(kind, options))
        if kind == DYNAMIC_COMBO:
            chosen = next(o for o in options["options"] if o["key"] == value)
            values |= _defaults(chosen["inputs"], given, f"{prefix}{name}.")
    return values
