"""A training job is a value that can be written down and read back."""

import dataclasses
import json
from pathlib import Path

import pytest

from comfyui_braid.engine.network.spec import NetworkSpec, TargetPatterns
from comfyui_braid.engine.timesteps.sampling import TimestepSampling
from comfyui_braid.engine.training.job import DataReference, ModelReference, TrainingJob
from comfyui_braid.engine.training.optimizers.optimizer import OptimizerSpec
from comfyui_braid.engine.training.options import (
    Checkpointing,
    Compilation,
    Preview,
    TrainingLog,
    Validation,
)
from comfyui_braid.engine.training.plan import TrainingPlan
from comfyui_braid.engine.training.states.identity import identity

JOB = TrainingJob(
    plan=TrainingPlan(steps=7, learning_rate=3e-4, output_name="a/b", loss_type="huber"),
    network=NetworkSpec(
        rank=8, alpha=4, targets=TargetPatterns(exclude=(r".*mod.*", "ü")), loraplus_lr_ratio=4
    ),
    timesteps=TimestepSampling(mode="shift", discrete_flow_shift=2.5, num_timestep_buckets=3),
    optimizer=OptimizerSpec(
        optimizer_args={"betas": (0.9, 0.98), "weight_decay": 0.02},
        lr_scheduler="cosine",
        lr_warmup_steps=0.5,
    ),
    model=ModelReference(file="flux.safetensors", architecture="FLUX"),
    data=DataReference(items=3, fingerprint="0123456789abcdef"),
    held_out=DataReference(items=1, fingerprint="fedcba9876543210"),
    checkpointing=Checkpointing(save_every_n_steps=2, ema_shadows=True, resume="latest"),
    log=TrainingLog(log_with="tensorboard", logging_dir=Path("output") / "logs"),
    compilation=Compilation(dynamo_dynamic=None),
    preview=Preview(every_n_steps=5),
    validation=Validation(every_n_steps=2, timesteps_per_item=3, seed=1),
)


def test_a_job_written_down_reads_back_equal():
    assert TrainingJob.from_json(JOB.to_json()) == JOB
    assert json.loads(JOB.to_json())["network"]["rank"] == 8


def test_a_job_with_nothing_optional_reads_back_equal():
    plain = dataclasses.replace(
        JOB, held_out=None, log=None, compilation=None, preview=None, validation=None
    )
    assert TrainingJob.from_json(plain.to_json()) == plain


def edited(**changes):
    job = json.loads(JOB.to_json())
    for path, value in changes.items():
        *parents, name = path.split("__")
        part = job
        for parent in parents:
            part = part[parent]
        if value is None:
            del part[name]
        else:
            part[name] = value
    return json.dumps(job)


@pytest.mark.parametrize(
    "text, sentence",
    [
        (edited(schema=2), "has schema 2, this Braid reads 1"),
        (edited(plan__steps="7"), "steps is '7'"),
        (edited(plan__steps=0), "steps is 0; it must be 1 or more"),
        (edited(plan__output_name="../x"), "output_name is '../x'"),
        (edited(network__rank=2.5), "rank is 2.5"),
        (edited(network__kind="oft"), "kind is 'oft'; choose one of lora, loha, lokr"),
        (edited(model=None), "model"),
        (edited(callback="os.system"), "callback"),
        (edited(optimizer__optimizer_class="os.system"), "optimizer_class is not read"),
        ("[" * 100_000, "not a training job"),
        ("{}", "not a training job"),
        ("", "not a training job"),
    ],
)
def test_an_edited_job_is_refused_in_one_sentence(text, sentence):
    with pytest.raises(ValueError) as refused:
        TrainingJob.from_json(text)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


LAYERS = ()


def test_an_identity_names_the_setting_that_differs():
    ours = identity(JOB, "AdamW", LAYERS)
    assert ours.difference(ours.named) is None
    assert ours.difference(json.loads(json.dumps(ours.named)) | {"seed": 9}) == ("seed", 9, 0)
    other = dataclasses.replace(JOB, network=dataclasses.replace(JOB.network, rank=16))
    saved = identity(other, "AdamW", LAYERS).named
    assert ours.difference(saved) == ("network.rank", 16, 8)


def test_a_state_that_is_older_than_a_setting_had_it_at_its_default():
    plain = dataclasses.replace(JOB, network=NetworkSpec(rank=8))
    ours = identity(plain, "AdamW", LAYERS)
    saved = ours.named | {"network": {**ours.named["network"]}}
    del saved["network"]["module_dropout"]
    assert ours.difference(saved) is None
    changed = dataclasses.replace(JOB, network=NetworkSpec(rank=8, module_dropout=0.1))
    assert identity(changed, "AdamW", LAYERS).difference(saved) == (
        "network.module_dropout",
        0.0,
        0.1,
    )


def test_a_setting_that_0_1_0_did_not_know_fits_no_state_of_it():
    saved = identity(JOB, "AdamW", LAYERS).as_0_1_0
    mixed = identity(JOB, "AdamW", LAYERS, mixes_prompts=True)
    assert mixed.difference(saved)[0] == "batches"  # it has other batches than it had then
    assert mixed.difference(mixed.named) is None
    assert identity(JOB, "AdamW", LAYERS).difference(saved) is None
    assert "NetworkSpec(kind='lora', rank=8, alpha=4, " in saved["network"]
