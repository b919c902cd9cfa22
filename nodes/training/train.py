"""Training a LoRA on the graph's own MODEL."""

import functools
import json
from dataclasses import fields

from comfy_api.latest import io

from ...engine.canvas import as_image
from ...engine.comfyui.training.inputs import TrainingInputs, build_job, held_out_pairs
from ...engine.comfyui.training.items import pair_items
from ...engine.comfyui.training.run import train_lora
from ...engine.training.figure import draw_loss_map
from ...engine.training.options import TrainingOptions
from ...engine.training.plan import LOSS_TYPES, MIXED_PRECISIONS, TrainingPlan
from .. import live, sockets
from ..outputs import loras_folder, shown_picture, spare_folders


class BraidTrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BraidTrainLora",
            display_name="Train LoRA (Braid)",
            category=sockets.TRAINING,
            description="Trains a LoRA, LoHa or LoKr on the MODEL of this graph, its patches and "
            "quantised weights included. Shows the loss while it runs; cancelling saves first.",
            search_aliases=["braid", "train", "lora", "finetune", "musubi"],
            is_input_list=True,
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model to train on; it is left as it is."),
                io.Latent.Input(
                    "latents",
                    tooltip="The pictures or clips: latents as core's Make Training Dataset or "
                    "Resolution Bucket give them, of any mix of sizes.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="One conditioning per latent, or exactly one for all of them.",
                ),
                sockets.Network.Input("network", tooltip="What is trained: from LoRA Network."),
                sockets.Timesteps.Input(
                    "timesteps",
                    optional=True,
                    tooltip="Which noise levels are trained: Timestep Sampling. Empty: uniform.",
                ),
                sockets.Optimizer.Input(
                    "optimizer",
                    optional=True,
                    tooltip="From Optimizer and Schedule. Empty: AdamW at a constant rate.",
                ),
                sockets.TrainingOptions.Input(
                    "options",
                    optional=True,
                    tooltip="Checkpoints, logs, previews, validation, compile: chain those nodes.",
                ),
                io.Int.Input(
                    "steps",
                    default=500,
                    min=1,
                    max=1_000_000,
                    tooltip="Optimizer steps of the whole run.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Items per batch, whatever the lengths of their prompts; sizes are "
                    "never mixed in one batch.",
                ),
                io.Int.Input(
                    "gradient_accumulation_steps",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Batches per optimizer step.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=1e-9,
                    max=10.0,
                    step=1e-6,
                    round=False,
                    tooltip="Step size; 1e-4 is usual for LoRA with AdamW, 1.0 for Prodigy.",
                ),
                io.Int.Input(
                    "seed",
                    default=42,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Of order, noise, noise levels, dropout and start values: the same "
                    "seed gives the same LoRA.",
                ),
                io.String.Input(
                    "output_name",
                    default="my_lora",
                    tooltip="Folder and file name under output/loras; an existing folder is never "
                    "overwritten, the next free _2, _3 … is taken.",
                ),
                io.Combo.Input(
                    "mixed_precision",
                    options=list(MIXED_PRECISIONS),
                    default="bf16",
                    tooltip="Compute type of the base model: bf16, fp16 (with loss scaling), or no "
                    "(the type of its weights). The LoRA itself is always float32.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=True,
                    tooltip="Recompute each block in the backward pass: far less memory, about a "
                    "third more time, exactly the same gradients.",
                ),
                io.Combo.Input(
                    "loss_type",
                    options=list(LOSS_TYPES),
                    default="mse",
                    advanced=True,
                    tooltip="mse (musubi's), huber or smooth_l1 on what the model predicts.",
                ),
                io.Float.Input(
                    "max_grad_norm",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Gradients are scaled down to this joint norm; 0 = off.",
                ),
                io.Float.Input(
                    "scale_weight_norms",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Largest Frobenius norm of one layer's update (LoRA only); 0 = off.",
                ),
                io.Int.Input(
                    "blocks_to_swap",
                    default=0,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip="Above 0, ComfyUI keeps as few weights on the device as it can and "
                    "streams the rest; how many blocks that is, its memory management decides.",
                ),
                io.Float.Input(
                    "guidance",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Distilled guidance for models that take one (FLUX dev, HunyuanVideo); "
                    "1 is musubi's default. Others ignore it.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    "lora", tooltip="The trained adapter, for Load LoRA Model and Save LoRA."
                ),
                io.LossMap.Output(
                    "loss_map",
                    tooltip="Loss per step for Plot Loss Graph, and the noise levels that were "
                    "drawn for Timestep Distribution Preview.",
                ),
                sockets.Checkpoints.Output(
                    "checkpoints",
                    tooltip="Every kept step checkpoint, the finished adapter and the EMA shadows.",
                ),
                io.String.Output("report", tooltip="The resolved configuration of the run, JSON."),
            ],
        )

    @classmethod
    def execute(cls, latents: list[dict], positive: list, **lists: list) -> io.NodeOutput:
        one = {name: values[0] for name, values in lists.items() if values}
        chosen = one.get("options") or TrainingOptions()
        inputs = TrainingInputs(
            patcher=one["model"],
            pairs=pair_items(latents, positive),
            held_out=held_out_pairs(chosen),
            preview_sampling=chosen.preview_sampling,
            loras=loras_folder(),
            spare_folders=spare_folders(),
        )
        plan = TrainingPlan(**{f.name: one[f.name] for f in fields(TrainingPlan) if f.name in one})
        job = build_job(
            inputs, plan, one["network"], one.get("timesteps"), one.get("optimizer"), chosen
        )
        trained = train_lora(job, inputs, functools.partial(live.say, cls.hidden.unique_id))
        picture = as_image(draw_loss_map(trained.loss_map))
        return io.NodeOutput(
            trained.lora,
            trained.loss_map,
            trained.checkpoints,
            json.dumps(trained.report, indent=2),
            ui=shown_picture(picture, cls),
        )
