"""Any ComfyUI MODEL as something the training loop can differentiate.

    with training_session(model, compute_dtype=torch.bfloat16) as denoiser:
        with attached(denoiser.diffusion_model, network):
            items = [denoiser.prepare(latents, positive) for latents, positive in data]
            for step in reported(train(denoiser, ...), total=...):
                ...

Inside, gradients are on and the host is in training mode; the base is frozen, not copied, and
exactly differentiable with respect to whatever hooks add to its layers. Afterwards the MODEL
samples bit for bit as before.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor, nn

from ...refusals import said
from . import noise_levels
from .conditioning import Conditioning, encode, groups, settled, stacked
from .frozen import frozen
from .gradient_checkpointing import graphs_alive, recomputing
from .inplace import differentiates, guarded


class ComfyDenoiser:
    """A loaded MODEL during one training session; made by `training_session`."""

    def __init__(
        self,
        patcher: ModelPatcher,
        *,
        options: dict[str, Any],
        own_dtype: torch.dtype | None,
        guidance: float | None,
        may_need_guard: bool,
        session: ExitStack,
    ) -> None:
        self.patcher = patcher
        self.model: BaseModel = patcher.model
        self.device: torch.device = patcher.load_device
        self._options = options
        self._own_dtype = own_dtype
        self._guidance = guidance
        self._unproven = may_need_guard
        self._session = session
        self.forward_calls = 0
        """Calls of the network that gradients were taken of."""

    @property
    def diffusion_model(self) -> nn.Module:
        """The network whose layers can be adapted."""
        return self.model.diffusion_model

    @property
    def sampling(self) -> noise_levels.ModelSampling:
        """The model's `model_sampling`: what its inputs and outputs mean."""
        return self.model.model_sampling

    def prepare(self, samples: Tensor, conditioning: list) -> tuple[Tensor, Conditioning]:
        """One training item as the model wants it: latents (1, C, ...) float32 and conditioning.

        `samples` (1, C, H, W) or (1, C, T, H, W) is a LATENT's `samples`, `conditioning` one
        CONDITIONING. Both stay on the CPU. Items whose latents have equal shapes can share a batch.
        """
        format_ = self.model.latent_format
        if samples.shape[0] != 1:
            raise ValueError(f"one item has one latent, got a batch of {samples.shape[0]}")
        if samples.ndim == 4 and format_.latent_dimensions == 3:
            samples = samples.unsqueeze(2)  # an image for a video model
        if samples.ndim != format_.latent_dimensions + 2 or samples.shape[1] != (
            format_.latent_channels
        ):
            raise ValueError(
                f"this model takes latents of {format_.latent_channels} channels and "
                f"{format_.latent_dimensions} dimensions, got shape {tuple(samples.shape)}; "
                "encode the images with the VAE that belongs to the model"
            )
        with torch.inference_mode():
            latents = self.model.process_latent_in(samples.float().cpu())
            inputs = encode(self.model, latents, conditioning, self.device, self._guidance)
        return latents.clone(), settled(inputs)

    def noised_input(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B, C, ...) from `latents` and `noise` (B, C, ...) at noise level `t` (B,)."""
        return noise_levels.noised_input(self.sampling, latents, noise, t)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What `raw_output` should answer (B, C, ...); noise - latents for flow models."""
        return noise_levels.target(self.sampling, latents, noise, t)

    def raw_output(self, noised: Tensor, t: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """The network's own output (B, C, ...) in float32, not yet a denoised image.

        `noised` (B, C, ...) on any device, `t` (B,) in [0, 1], one conditioning per item. Prompts
        of different lengths are computed one after the other: padding would change them.
        """
        parts = groups(conditioning)
        if torch.is_grad_enabled():
            self.forward_calls += len(parts)
        output = self._output(noised, t, conditioning, parts)
        if self._unproven and output.requires_grad:
            self._unproven = False
            if not differentiates([output]):
                self._session.enter_context(guarded())
                output = self._output(noised, t, conditioning, parts)
        return output

    def check(self, items: Sequence[tuple[Tensor, Conditioning]]) -> None:
        """Raise `ValueError` when the network cannot take one of `items`; computes few of them.

        A wrong text encoder shows only when the network is run, so it is run once before training,
        with the smallest latent of each kind of conditioning.
        """
        falling = sorted(items, key=lambda pair: pair[0].numel(), reverse=True)
        different = {item.widths: (latents, item) for latents, item in falling}
        for latents, item in different.values():
            try:
                with torch.inference_mode():
                    self.raw_output(latents, torch.full((1,), 0.5), [item])
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
                raise ValueError(
                    f"{type(self.model).__name__} cannot compute with this conditioning "
                    f"({item.describe()}); encode the prompts with the text encoder that belongs "
                    f"to the model ({said(error)})"
                ) from error

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the host sample with the MODEL, adapters included, between two steps."""
        try:
            with (
                _training_mode(False),
                torch.inference_mode(),
                _compute_dtype(self.model, self._own_dtype),
            ):
                yield
        finally:  # after a failed sampling too: the host may have unloaded the model
            with torch.inference_mode():
                comfy.model_management.load_models_gpu([self.patcher])
            self.patcher.pre_run()

    def _output(
        self, noised: Tensor, t: Tensor, items: Sequence[Conditioning], parts: list[list[int]]
    ) -> Tensor:
        noised, t = noised.to(self.device), t.to(self.device)
        if len(parts) == 1:
            return self._output_of_alike(noised, t, items)
        outputs = [
            self._output_of_alike(noised[part], t[part], [items[i] for i in part]) for part in parts
        ]
        order = torch.tensor([index for part in parts for index in part])
        return torch.cat(outputs)[torch.argsort(order).to(self.device)]

    def _output_of_alike(
        self, noised: Tensor, t: Tensor, conditioning: Sequence[Conditioning]
    ) -> Tensor:
        """A batch in one call, through the same options and wrappers as in sampling."""
        sigma = noise_levels.sigma_at(self.sampling, t)
        arguments = stacked(conditioning, self.device)
        arguments["transformer_options"] = self._options["transformer_options"] | {
            "cond_or_uncond": [0],  # one prompt, "positive", whatever the batch
            "uuids": [conditioning[0].uuid],
            "sigmas": sigma,
            "sample_sigmas": self.sampling.sigmas.flip(0),
        }
        wrapper = self._options.get("model_function_wrapper")
        if wrapper is None:
            return self._apply_model(noised, sigma, **arguments)
        call = {"input": noised, "timestep": sigma, "c": arguments, "cond_or_uncond": [0]}
        return wrapper(self._apply_model, call)

    def _apply_model(self, x: Tensor, t: Tensor, **arguments: Any) -> Tensor:
        """`BaseModel.apply_model` with its wrappers, but answering the network's raw output."""
        wrappers = get_all_wrappers(WrappersMP.APPLY_MODEL, arguments["transformer_options"])
        call = WrapperExecutor.new_class_executor(self._tapped_output, self.model, wrappers)
        positional = (arguments.pop(name, None) for name in ("c_concat", "c_crossattn", "control"))
        return call.execute(x, t, *positional, arguments.pop("transformer_options"), **arguments)

    def _tapped_output(self, x: Tensor, t: Tensor, *arguments: Any, **conditions: Any) -> Tensor:
        """What `diffusion_model` answered; what the host makes of it is dropped."""
        seen: list[Any] = []
        network = self.model.diffusion_model
        hook = network.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        try:
            self.model._apply_model(x, t, *arguments, **conditions)
        finally:
            hook.remove()
        output = seen[-1]
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output


@contextmanager
def training_session(
    patcher: ModelPatcher,
    *,
    compute_dtype: torch.dtype,
    gradient_checkpointing: bool = False,
    guidance: float | None = None,
    offload: bool = False,
    latents_shape: Sequence[int] = (1, 16, 128, 128),
) -> Iterator[ComfyDenoiser]:
    """Load `patcher`'s model and make it differentiable; everything is undone on the way out.

    `compute_dtype`: what the base computes in, whatever its weights are stored in.
    `guidance`: replaces the conditioning's distilled guidance in networks that embed one.
    `offload`: keep as little of the model on the device as the host can.
    `latents_shape`: a batch of latents at its largest, for the host's estimate of memory.
    """
    noise_levels.check_trainable(patcher.get_model_object("model_sampling"))
    model, own_dtype = patcher.model, patcher.get_model_object("manual_cast_dtype")
    with ExitStack() as session:
        _load(patcher, latents_shape, gradient_checkpointing, offload)
        session.callback(comfy.model_management.soft_empty_cache)
        session.callback(patcher.cleanup)
        patcher.pre_run()
        session.enter_context(torch.inference_mode(False))
        session.enter_context(torch.enable_grad())
        session.enter_context(_training_mode(True))
        session.enter_context(_compute_dtype(model, compute_dtype))
        session.enter_context(frozen(model))
        if gradient_checkpointing:
            session.enter_context(recomputing(model.diffusion_model))
        yield ComfyDenoiser(
            patcher,
            options=_options(patcher),
            own_dtype=own_dtype,
            guidance=guidance,
            may_need_guard=not gradient_checkpointing,
            session=session,
        )


def _load(
    patcher: ModelPatcher, latents_shape: Sequence[int], gradient_checkpointing: bool, offload: bool
) -> None:
    """Bring the model onto its device as the host does for sampling, and all others off it."""
    management = comfy.model_management
    ours = [m for m in management.current_loaded_models if m.model and m.model.is_clone(patcher)]
    management.free_memory(1e30, patcher.load_device, keep_loaded=ours)
    graphs = graphs_alive(patcher.model.diffusion_model, gradient_checkpointing)
    needed = graphs * patcher.model.memory_required(list(latents_shape))
    management.load_models_gpu(
        [patcher, *patcher.get_nested_additional_models()],
        memory_required=1e20 if offload else needed,
    )


def _options(patcher: ModelPatcher) -> dict[str, Any]:
    """The MODEL's options as a sampling run would use them, with one differentiable attention."""
    options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
    comfy.sampler_helpers.prepare_model_patcher(patcher, {}, options)
    comfy.samplers.cast_to_load_options(
        options, device=patcher.load_device, dtype=patcher.model_dtype()
    )
    options["transformer_options"]["optimized_attention_override"] = _attention
    return options


def _attention(_chosen: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Torch's attention: differentiable, and alike when a block is run again in backward.

    The host's default may split by free memory, or compute in 8 bits without a gradient.
    """
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


@contextmanager
def _training_mode(training: bool) -> Iterator[None]:
    """The host's global flag that turns off what has no gradient."""
    before = comfy.model_management.in_training
    comfy.model_management.in_training = training
    try:
        yield
    finally:
        comfy.model_management.in_training = before


@contextmanager
def _compute_dtype(model: BaseModel, dtype: torch.dtype | None) -> Iterator[None]:
    """What the model casts its inputs to; None: what its weights are stored in."""
    before = model.manual_cast_dtype
    model.manual_cast_dtype = dtype
    try:
        yield
    finally:
        model.manual_cast_dtype = before
