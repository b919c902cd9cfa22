"""One model in one precision, in a process of its own: loaded, trained two steps, sampled two.

Prints a line of JSON for each thing that is done, so that a process that is killed has said how far
it came.
"""

import json
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.append(str(TESTS))

import conftest  # noqa: E402, F401  makes the package importable
from host.inprocess import import_comfyui  # noqa: E402

if not import_comfyui():
    sys.exit("no ComfyUI here: set COMFYUI_PATH")

import comfy.sample  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from comfy_api.latest import io  # noqa: E402

import nodes  # noqa: E402
from comfyui_braid.engine.network.spec import NetworkSpec  # noqa: E402
from comfyui_braid.nodes import kinds  # noqa: E402
from full_size.models import item  # noqa: E402

STEPS = 2


def say(**values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def load(file: str, precision: str):
    """The MODEL, from the node that a user would take."""
    if precision == "bf16":
        return nodes.UNETLoader().load_unet(file, "default")[0], {}
    output = kinds()["BraidFp8Loader"].execute(file, {"granularity": "block"}, "e4m3fn").result
    return output[0], json.loads(output[1])


def train(model, pair) -> dict:
    """The report of Train LoRA after two steps at rank 16."""
    network = NetworkSpec(rank=16, alpha=16.0)
    samples, positive = pair
    node = kinds()["BraidTrainLora"]
    node.hidden = io.HiddenHolder.from_dict({})  # a process outside the queue
    output = node.execute(
        latents=[{"samples": samples}],
        positive=[positive],
        model=[model],
        network=[network],
        steps=[STEPS],
        output_name=["full_size"],
        gradient_checkpointing=[True],
    )
    return json.loads(output.result[3])


def sample(model, pair) -> float:
    """Two steps of Euler; the mean square of what comes out."""
    samples, positive = pair
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(0))
    ended = comfy.sample.sample(
        model, noise, STEPS, 1.0, "euler", "simple", positive, positive, samples
    )
    assert torch.isfinite(ended).all()
    return float(ended.square().mean())


def main(name: str, precision: str, file: str, shape: str, tokens: str) -> None:
    path = Path(file)
    folder_paths.add_model_folder_path("diffusion_models", str(path.parent), is_default=True)
    folder_paths.set_output_directory(str(path.parent / "output"))
    pair = item(name, tuple(json.loads(shape)), int(tokens))
    with torch.inference_mode():
        started = time.monotonic()
        model, report = load(path.name, precision)
        say(load_seconds=time.monotonic() - started, bytes_after=report.get("bytes_after"))
        report = train(model, pair)
        say(
            step_seconds=report["seconds_per_step"],
            first_step_seconds=report["first_step_seconds"],
            estimate=report["memory"],
            layers=report["modules"],
        )
        started = time.monotonic()
        say(mean_square=sample(model, pair), sample_seconds=time.monotonic() - started)


if __name__ == "__main__":
    main(*sys.argv[1:])
