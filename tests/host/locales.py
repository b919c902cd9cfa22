"""The pack's own texts as the front end looks them up: one entry for each node, input and output.

`python -m host.locales` prints the English ones, to begin a translation with.
"""

import json
from typing import Any

from .awaiting import awaited
from .find import PACK
from .inprocess import import_comfyui

LANGUAGES = ("ja", "zh")


def schemas() -> dict[str, Any]:
    """Every node's schema, by id; needs an imported ComfyUI."""
    import comfyui_braid

    extension = awaited(comfyui_braid.comfy_entrypoint())
    declared = [node.GET_SCHEMA() for node in awaited(extension.get_node_list())]
    return {schema.node_id: schema for schema in declared}


def english() -> dict[str, dict[str, Any]]:
    """nodeDefs.json in English, from the schemas."""
    return {node_id: _texts(schema) for node_id, schema in schemas().items()}


def translated(language: str) -> dict[str, dict[str, Any]]:
    """nodeDefs.json of one language."""
    path = PACK / "locales" / language / "nodeDefs.json"
    return json.loads(path.read_text(encoding="utf-8"))


def flat(texts: Any, path: str = "") -> dict[str, str]:
    """Every text under its dotted path."""
    if isinstance(texts, str):
        return {path: texts}
    found = {}
    for key, value in texts.items():
        found |= flat(value, f"{path}.{key}" if path else key)
    return found


def _texts(schema: Any) -> dict[str, Any]:
    inputs: dict[str, dict[str, str]] = {}
    _collect(schema.inputs, "", inputs)
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": inputs,
        "outputs": {
            str(slot): {"name": output.display_name or output.id, "tooltip": output.tooltip}
            for slot, output in enumerate(schema.outputs)
        },
    }


def _collect(declared: list, prefix: str, into: dict[str, dict[str, str]]) -> None:
    """The front end writes a field of a dynamic combo as `combo_field`, whatever is chosen.

    So a field that means another thing under another choice needs one text for both.
    """
    for one in declared:
        key = f"{prefix}{one.id}"
        known = into.setdefault(key, {"name": one.display_name or one.id, "tooltip": one.tooltip})
        if one.tooltip not in known["tooltip"]:
            known["tooltip"] += f"\n{one.tooltip}"
        for option in getattr(one, "options", None) or []:
            _collect(getattr(option, "inputs", []), f"{key}_", into)


if __name__ == "__main__":
    import conftest  # noqa: F401  (loads the pack)

    import_comfyui()
    print(json.dumps(english(), indent=2, ensure_ascii=False))
