"""Training Preview: pictures sampled while a run trains."""

from comfy_api.latest import io

from ...engine.comfyui.training.preview import PreviewSampling
from ...engine.training.options import Preview, TrainingOptions
from .. import sockets
from .options import chained, options_input, options_output


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
