"""`make demo-comfyui`: run the example workflow in a real ComfyUI over its API."""

import shutil
import sys

from host.find import PACK, find_comfyui
from host.serve import Server
from host.workflows import EXAMPLES, read_workflow, to_prompt

RESULTS = PACK / "demo_report" / "comfyui"


def main() -> int:
    if find_comfyui() is None:
        sys.stderr.write(
            "No ComfyUI found. Get one with `pip install comfy-cli && comfy install` (it lands in "
            "~/comfy/ComfyUI), or set COMFYUI_PATH to a checkout, then run this again.\n"
        )
        return 1
    path = EXAMPLES / "01_train_a_lora.json"
    sys.stdout.write(f"starting {find_comfyui()} …\n")
    with Server.start() as server:
        sys.stdout.write(f"running {path.name}; this takes a few minutes on a CPU …\n")
        sys.stdout.flush()
        entry = server.queue(to_prompt(read_workflow(path), server.object_info()), timeout=3600)
        RESULTS.mkdir(parents=True, exist_ok=True)
        for node, outputs in entry["outputs"].items():
            for image in outputs.get("images", []):
                source = server.base / image["type"] / image["subfolder"] / image["filename"]
                shutil.copy(source, RESULTS / f"node{node}_{image['filename']}")
        shutil.copytree(server.base / "output", RESULTS / "output", dirs_exist_ok=True)
    sys.stdout.write(f"done; pictures and the LoRA are in {RESULTS}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
