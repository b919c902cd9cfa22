"""Time and memory of one training step: ours, the frozen model alone, and core's trainer.

    python tests/bench/bench_train_step.py [--rounds 5] [--steps 3] [--hidden 512]

One process, one thread, variants interleaved round by round, CPU seconds of the process (so that
a busy machine matters little), medians. FLUX architecture, ComfyUI's own classes, random weights
made under inference mode as in the executor, float32, batch 1; rank 16 on the same layers for all.
Core's code is run as it is (`TrainLoraNode.execute`), given our layers and torch's attention;
"all" is what it does by itself: every weight, bias and norm.

"saved": bytes of distinct storages that autograd keeps at the end of forward, without adapters
and base; for core, whose checkpoint hides its graph, those of the graph built again in backward.
"RAM": growth of the process at the start of training, the largest of all rounds.
"""

import argparse
import contextlib
import gc
import platform
import statistics
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "comfyui")]
import conftest  # noqa: E402, F401  registers the package
from host.inprocess import import_comfyui  # noqa: E402

if not import_comfyui():
    sys.exit("no ComfyUI found: set COMFYUI_PATH")

import comfy.model_management  # noqa: E402
import comfy.utils  # noqa: E402
import comfy_extras.nodes_train as core  # noqa: E402
import psutil  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402

from comfyui_braid.engine.comfyui.differentiable.compilation import compiled  # noqa: E402
from comfyui_braid.engine.comfyui.differentiable.denoiser import _attention, training_session  # noqa: E402
from comfyui_braid.engine.comfyui.model import diffusion_model_of  # noqa: E402
from comfyui_braid.engine.network.architectures import architecture_of  # noqa: E402
from comfyui_braid.engine.network.attach import attached, build_network  # noqa: E402
from comfyui_braid.engine.network.spec import NetworkSpec  # noqa: E402
from comfyui_braid.engine.network.targets import select_targets  # noqa: E402
from comfyui_braid.engine.training.options import Compilation  # noqa: E402

RANK = 16
NAME = "bench_flux"


def build(*_, disable_dynamic: bool = False):
    patcher = tiny_models.build(NAME)
    patcher.cached_patcher_init = (build, ())  # how core makes its second copy
    patcher.model_options["transformer_options"]["optimized_attention_override"] = _attention
    return patcher


def targets(model):
    architecture = architecture_of(model.model_config.unet_config)
    return select_targets(model.diffusion_model, NetworkSpec(rank=RANK), architecture).selected


class Storages:
    """Bytes of the distinct storages that autograd saves while entered."""

    def __init__(self, ignored=()):
        self.ignored = {p.untyped_storage().data_ptr() for p in ignored}
        self.sizes = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.ignored:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    @property
    def megabytes(self):
        return sum(self.sizes.values()) / 1e6


class Ours:
    """Our session, with or without adapters and torch.compile."""

    def __init__(self, patcher, checkpointing: bool, adapters: bool, compilation=None):
        self.patcher, self.checkpointing, self.adapters = patcher, checkpointing, adapters
        self.compilation = compilation
        self.saved, self.growth = float("nan"), 0.0

    def run(self, steps: int) -> list[float]:
        times = []
        with contextlib.ExitStack() as stack:
            model = diffusion_model_of(self.patcher)
            compilation = stack.enter_context(compiled(model, self.compilation))
            before = resident()
            session = training_session(
                self.patcher,
                compute_dtype=torch.float32,
                gradient_checkpointing=self.checkpointing,
            )
            denoiser = stack.enter_context(session)
            stack.enter_context(compilation.savable_weights(model))
            self.growth = max(self.growth, resident() - before)
            network = build_network(targets(denoiser.model), NetworkSpec(rank=RANK), seed=0)
            if self.adapters:
                stack.enter_context(attached(model, network))
            latents, cond = denoiser.prepare(
                tiny_models.latent(NAME), tiny_models.conditioning(NAME, tokens=8)
            )
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
            for step in range(steps + 1):
                start = time.process_time()
                saved = Storages(network.parameters())
                looked_at = step == 0 and self.compilation is None  # hooks break compiled code
                with saved.hooks() if looked_at else contextlib.nullcontext():
                    loss = self.loss(denoiser, latents, cond)
                loss.backward()
                if self.adapters:
                    optimizer.step()
                    optimizer.zero_grad()
                times.append(time.process_time() - start)
                self.saved = saved.megabytes if looked_at else self.saved
        assert not compilation.failure
        return times[1:]

    def loss(self, denoiser, latents, cond):
        noise, t = torch.randn_like(latents), torch.rand(1)
        noised = denoiser.noised_input(latents, noise, t)
        if not self.adapters:
            noised.requires_grad_()
        prediction = denoiser.raw_output(noised, t, [cond])
        return (prediction - denoiser.target(latents, noise, t)).square().mean()


class HostFrozen:
    """ComfyUI's own layers without adapters, under torch's guard against in-place changes."""

    def __init__(self, patcher):
        self.patcher = patcher
        self.saved = self.growth = float("nan")

    def run(self, steps: int) -> list[float]:
        times = []
        model = self.patcher.model
        context = tiny_models.conditioning(NAME, tokens=8)[0]
        comfy.model_management.in_training = True
        try:
            for _ in range(steps + 1):
                start = time.process_time()
                with torch.autograd.graph.allow_mutation_on_saved_tensors():
                    x = tiny_models.latent(NAME).requires_grad_()
                    output = model.apply_model(
                        x,
                        torch.rand(1),
                        c_crossattn=context[0],
                        y=context[1]["pooled_output"],
                        transformer_options={"optimized_attention_override": _attention},
                    )
                    output.square().mean().backward()
                times.append(time.process_time() - start)
        finally:
            comfy.model_management.in_training = False
        return times[1:]


class Core:
    """`TrainLoraNode.execute`, timed between its own progress updates."""

    def __init__(self, patcher, bypass: bool, only: set[str] | None, checkpointing: bool = True):
        self.patcher, self.bypass, self.only = patcher, bypass, only
        self.checkpointing = checkpointing
        self.saved, self.growth = float("nan"), 0.0

    def run(self, steps: int) -> list[float]:
        stamps = []

        class Stamp:
            def __init__(self, total):
                stamps.clear()

            def update(self, count):
                stamps.append(time.process_time())

        before = resident()
        loaded = core.TrainSampler.sample

        def sample(sampler, *args, **kwargs):
            self.growth = max(self.growth, resident() - before)
            return loaded(sampler, *args, **kwargs)

        with patched(core, "ProgressBar", Stamp), patched(core.TrainSampler, "sample", sample):
            self.execute(steps + 2)
        return [b - a for a, b in zip(stamps[1:], stamps[2:], strict=False)]

    def execute(self, steps: int) -> None:
        one = dict(
            model=self.patcher,
            batch_size=1,
            steps=steps,
            grad_accumulation_steps=1,
            learning_rate=1e-4,
            rank=RANK,
            optimizer="AdamW",
            loss_function="MSE",
            seed=0,
            training_dtype="fp32",
            lora_dtype="fp32",
            quantized_backward=False,
            algorithm="LoRA",
            gradient_checkpointing=self.checkpointing,
            checkpoint_depth=1,
            offloading=False,
            existing_lora="[None]",
            bucket_mode=False,
            bypass_mode=self.bypass,
        )
        lists = {key: [value] for key, value in one.items()}
        lists["latents"] = [{"samples": tiny_models.latent(NAME)}]
        lists["positive"] = [tiny_models.conditioning(NAME, tokens=8)]
        with contextlib.ExitStack() as stack:
            if self.only is not None:
                for name in ("_setup_lora_adapters", "_setup_lora_adapters_bypass"):
                    stack.enter_context(patched(core, name, self.limited(getattr(core, name))))
            core.TrainLoraNode.execute(**lists)

    def limited(self, setup):
        """Core's own set-up, shown only the weights of the layers that we adapt."""

        def limited(patcher, *args, **kwargs):
            chosen = [
                (name, module)
                for name, module in patcher.model.named_modules()
                if name.removeprefix("diffusion_model.") in self.only
            ]
            with (
                patched(patcher.model, "named_modules", lambda: chosen),
                patched(core, "_create_bias_adapter", no_bias),
                patched(patcher, "add_weight_wrapper", weights_only(patcher)),
            ):
                return setup(patcher, *args, **kwargs)

        return limited

    def measure_graph(self) -> None:
        """What its graph holds during backward: its checkpoint taken away, in place made legal."""
        storages = Storages()
        create = core._create_weight_adapter

        def ignoring(*args, **kwargs):
            adapter, parameters = create(*args, **kwargs)
            storages.ignored |= {p.untyped_storage().data_ptr() for p in parameters.values()}
            return adapter, parameters

        step = core.TrainSampler.fwd_bwd

        def fwd_bwd(sampler, model_wrap, *args, **kwargs):
            storages.ignored |= {
                p.untyped_storage().data_ptr() for p in model_wrap.inner_model.parameters()
            }
            with torch.autograd.graph.allow_mutation_on_saved_tensors(), storages.hooks():
                return step(sampler, model_wrap, *args, **kwargs)

        with (
            patched(self, "checkpointing", False),
            patched(core, "_create_weight_adapter", ignoring),
            patched(core.TrainSampler, "fwd_bwd", fwd_bwd),
        ):
            self.execute(1)
        self.saved = storages.megabytes


def no_bias(module, name, dtype):
    return torch.nn.Module(), {}


def weights_only(patcher):
    add = patcher.add_weight_wrapper
    return lambda key, adapter: add(key, adapter) if key.endswith(".weight") else None


@contextlib.contextmanager
def patched(owner, name, value):
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own or isinstance(owner, type(sys)):
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def resident() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    comfy.utils.set_progress_bar_enabled(False)
    config = {
        **tiny_models.FLUX,
        "hidden_size": options.hidden,
        "num_heads": options.hidden // 128,
        "depth": 2,
        "depth_single_blocks": 4,
    }
    tiny_models.MODELS[NAME] = tiny_models.TinyModel(
        "FluxSchnell", config, (16, 32, 32), 64, pooled_dim=32
    )
    with torch.inference_mode():
        patcher = build()
    normal = build()
    base = sum(p.nbytes for p in patcher.model.parameters())
    layers = {target.name for target in targets(patcher.model)}
    variants = {
        "frozen, no adapters (ours)": Ours(patcher, False, False),
        "frozen, no adapters (host's layers, guard)": HostFrozen(normal),
        "ours": Ours(patcher, False, True),
        "ours, compiled": Ours(patcher, False, True, Compilation()),
        "ours, checkpointed": Ours(patcher, True, True),
        "ours, checkpointed, compiled": Ours(patcher, True, True, Compilation()),
        "core default, checkpointed, same layers": Core(normal, False, layers),
        "core bypass, checkpointed, same layers": Core(normal, True, layers),
        "core default, checkpointed, all": Core(normal, False, None),
    }
    times = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, variant in variants.items():
            if isinstance(variant, Ours):
                with torch.inference_mode():
                    times[name] += variant.run(options.steps)
            else:
                times[name] += variant.run(options.steps)
    for variant in variants.values():
        if isinstance(variant, Core):
            variant.measure_graph()
    report(times, variants, base, len(layers))


def report(times, variants, base, layers) -> None:
    middle = {name: statistics.median(values) for name, values in times.items()}
    frozen = middle["frozen, no adapters (ours)"]
    default = middle["core default, checkpointed, same layers"]
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, 1 thread")
    print(f"base {base / 1e6:.0f} MB float32, rank {RANK} on {layers} layers, 264 tokens")
    print(f"{'':44}{'s/step':>8}{'/frozen':>9}{'/core':>7}{'saved MB':>10}{'RAM +%':>8}")
    for name, variant in variants.items():
        print(
            f"{name:44}{middle[name]:8.3f}{middle[name] / frozen:9.2f}"
            f"{middle[name] / default:7.2f}{variant.saved:10.1f}{variant.growth / base * 100:8.1f}"
        )


if __name__ == "__main__":
    main()
