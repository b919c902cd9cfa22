"""Notes that translations match the English as it is now: `make in-step`, after translating.

Arguments choose nodes; without any, all are noted. A test names what is stale, and this prints it.
"""

import json
import sys
from pathlib import Path

from host.find import PACK
from host.help_pages import STAMP, sources, stale


def note(node_id: str, value: str, path: Path) -> None:
    """Write the hash where the translation has it."""
    if path.suffix == ".md":
        page = path.read_text(encoding="utf-8")
        text = STAMP.sub("\n", page).rstrip("\n") + f"\n\n<!-- English: {value} -->\n"
    else:
        known = sources(path.parent.name) | {node_id: value}
        text = json.dumps(dict(sorted(known.items())), indent=2) + "\n"
    path.write_text(text, encoding="utf-8")


def main() -> None:
    chosen = set(sys.argv[1:])
    for node_id, value, path in list(stale()):
        if not chosen or node_id in chosen:
            note(node_id, value, path)
            sys.stdout.write(f"{path.relative_to(PACK)}: {node_id} is in step\n")


if __name__ == "__main__":
    import conftest  # noqa: F401  (loads the pack of this checkout)
    from host.inprocess import import_comfyui

    if not import_comfyui():
        sys.exit("no ComfyUI found: set COMFYUI_PATH")
    main()
