"""How a training run is watched: pictures sampled on the way, and the loss on held-out items."""

from comfy_api.latest import io

from ...engine.comfyui.training.preview import PreviewSampling
from ...engine.training.options import Preview, TrainingOptions, Validation
from .. import sockets
from .saving import chained, options_input, options_output


class BraidTrainingPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidTrainingPreview",
            display_name="Training Preview",
            category=sockets.TRAINING,
            description="Samples a picture every so many steps and shows it beside the loss curve.",
            search_aliases=["braid", "sample while training"],
            inputs=[
                io.Int.Input(
                    "sample_every_n_steps",
                    default=100,
                    min=1,
                    max=1_000_000,
                    tooltip="Steps between two pictures; one is drawn after the last step too.",
                ),
                io.Latent.Input(
                    "latent", tooltip="What to sample from, as for KSampler: its size is used."
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="The prompt. Empty: that of the first training item.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The negative prompt. Empty: no cfg."
                ),
                io.Sampler.Input(
                    "sampler", optional=True, tooltip="From KSamplerSelect. Empty: euler."
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="The noise schedule. Empty: the simple schedule with steps steps.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=1000,
                    tooltip="Sampling steps, where sigmas is empty.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance; 1 = off.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Of the sampled noise: the same every time, so that pictures compare.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes the picture. Empty: ComfyUI's rough latent colours.",
                ),
                options_input(),
            ],
            outputs=[options_output()],
        )

    @classmethod
    def execute(
        cls,
        sample_every_n_steps: int,
        latent: dict,
        steps: int,
        cfg: float,
        seed: int,
        positive: list | None = None,
        negative: list | None = None,
        sampler=None,
        sigmas=None,
        vae=None,
        options: TrainingOptions | None = None,
    ) -> io.NodeOutput:
        sampling = PreviewSampling(
            latent=latent,
            positive=positive,
            negative=negative,
            sampler=sampler,
            sigmas=sigmas,
            steps=steps,
            cfg=cfg,
            seed=seed,
            vae=vae,
        )
        part = Preview(every_n_steps=sample_every_n_steps, sampling=sampling)
        return chained(options, preview=part)


class BraidValidation(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidValidation",
            display_name="Validation Loss",
            category=sockets.TRAINING,
            description="Loss on items held out of training, always at the same noise and noise "
            "levels, so that it can be compared across steps and runs.",
            search_aliases=["braid", "eval", "held out", "overfitting"],
            is_input_list=True,
            inputs=[
                io.Latent.Input("latents", tooltip="Latents that are not trained on."),
                io.Conditioning.Input("positive", tooltip="Their conditioning."),
                io.Int.Input(
                    "every_n_steps",
                    default=100,
                    min=1,
                    max=1_000_000,
                    tooltip="Steps between two measurements; one is made after the last step too.",
                ),
                io.Int.Input(
                    "timesteps_per_item",
                    default=8,
                    min=1,
                    max=1000,
                    tooltip="Noise levels per item, evenly spread over the run's own sampling.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Of the fixed noise; keep it to compare runs.",
                ),
                options_input(),
            ],
            outputs=[options_output()],
        )

    @classmethod
    def execute(
        cls,
        latents: list[dict],
        positive: list,
        every_n_steps: list[int],
        timesteps_per_item: list[int],
        seed: list[int],
        options: list | None = None,
    ) -> io.NodeOutput:
        part = Validation(
            latents=tuple(latents),
            conditioning=tuple(positive),
            every_n_steps=every_n_steps[0],
            timesteps_per_item=timesteps_per_item[0],
            seed=seed[0],
        )
        return chained(options[0] if options else None, validation=part)


NODES = [BraidTrainingPreview, BraidValidation]
