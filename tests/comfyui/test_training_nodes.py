"""The nodes around Train LoRA: what their text means, and what they refuse."""

import dataclasses
import inspect

import execution
import folder_paths
import pytest
import torch
from comfy_extras.nodes_preview_any import PreviewAny
from host.awaiting import awaited
from tiny_models import conditioning, latent

import nodes as core_nodes
from comfyui_braid.engine.training.options import TrainingOptions
from comfyui_braid.nodes.training import (
    BraidCheckpointing,
    BraidCompile,
    BraidTrainingLog,
    BraidTrainingPreview,
    BraidValidation,
)
from comfyui_braid.nodes.training.optimizer import BraidOptimizer

LOG = dict(log_with="tensorboard", logging_dir="logs", log_prefix="", log_tracker_name="")


def optimizer(**changes):
    given = {
        "optimizer_type": "AdamW",
        "optimizer_args": "",
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0.0,
        "lr_scheduler_args": "",
        **changes,
    }
    return BraidOptimizer.execute(**given).result[0]


def test_optimizer_arguments_are_python_literals_or_a_bare_word():
    text = "weight_decay=0.01 betas=(0.9,0.99)\namsgrad=True\nmode=fast\neps=1e-8"
    spec = optimizer(optimizer_args=text, lr_scheduler="polynomial", lr_scheduler_args="power=2.0")
    assert spec.optimizer_args == {
        "weight_decay": 0.01,
        "betas": (0.9, 0.99),
        "amsgrad": True,
        "mode": "fast",
        "eps": 1e-8,
    }
    assert spec.lr_scheduler_args == {"power": 2.0}


def test_quotes_are_those_of_a_shell_or_of_a_python_text():
    text = """betas="(0.9, 0.99)" "amsgrad=True" note='two words' mode="fast" """
    assert optimizer(optimizer_args=text).optimizer_args == {
        "betas": (0.9, 0.99),
        "amsgrad": True,
        "note": "two words",
        "mode": "fast",
    }
    spec = optimizer(lr_scheduler="warmup_stable_decay", lr_scheduler_args="decay_type='1-sqrt'")
    assert spec.lr_scheduler_args == {"decay_type": "1-sqrt"}


def test_true_false_and_none_are_no_words_in_whatever_case():
    text = "amsgrad=false\nmaximize=TRUE\nforeach=none"
    spec = optimizer(optimizer_args=text)
    assert spec.optimizer_args == {"amsgrad": False, "maximize": True, "foreach": None}


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("weight_decay", "not key=value"),
        ("weight_decay=__import__('os')", "weight_decay=.*not a Python literal"),
        ("weight_decay=0.1 weight_decay=0.2", "given twice"),
        ("lr=1.0", "learning_rate of Train LoRA"),
    ],
)
def test_optimizer_arguments_that_are_no_literals_are_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        optimizer(optimizer_args=text)


def test_custom_takes_the_class_that_is_typed_and_an_empty_one_is_refused():
    spec = optimizer(optimizer_type="custom", optimizer_class=" torch.optim.NAdam ")
    assert spec.optimizer_type == "torch.optim.NAdam"
    assert spec.optimizer_class is torch.optim.NAdam
    with pytest.raises(ValueError, match="optimizer_type is empty"):
        optimizer(optimizer_type="custom")


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"logging_dir": "../elsewhere"}, "inside"),
        ({"logging_dir": "/tmp"}, "inside"),
        ({"log_prefix": "a/b"}, "may hold no path"),
        ({"log_tracker_name": ".."}, "may hold no path"),
    ],
)
def test_logs_stay_inside_the_output_folder(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        BraidTrainingLog.execute(**{**LOG, **changes})
    (options,) = BraidTrainingLog.execute(**LOG).result
    assert options.log.logging_dir.is_relative_to(folder_paths.get_output_directory())
    assert options.log.log_tracker_name == "network_train"


def test_options_chain_and_a_second_node_of_one_kind_is_refused():
    saving = dict(
        save_every_n_steps=5,
        save_last_n=2,
        save_state=True,
        ema_shadows=True,
        resume="start afresh",
    )
    (options,) = BraidCheckpointing.execute(**saving).result
    (options,) = BraidTrainingLog.execute(**LOG, options=options).result
    compiling = dict(dynamo_backend="eager", dynamo_mode="default", dynamo_fullgraph=False)
    (options,) = BraidCompile.execute(**compiling, dynamo_dynamic="auto", options=options).result
    (options,) = BraidTrainingPreview.execute(
        sample_every_n_steps=3,
        latent={"samples": latent("flux")},
        steps=4,
        cfg=1.0,
        seed=0,
        options=options,
    ).result
    (options,) = BraidValidation.execute(
        latents=[{"samples": latent("flux")}],
        positive=[conditioning("flux")],
        every_n_steps=[5],
        timesteps_per_item=[2],
        seed=[0],
        options=[options],
    ).result
    assert all(getattr(options, f.name) is not None for f in dataclasses.fields(TrainingOptions))
    assert options.compilation.dynamo_dynamic is None
    with pytest.raises(ValueError, match="holds checkpointing twice"):
        BraidCheckpointing.execute(**saving, options=options)


@pytest.mark.parametrize("word, value", [("off", False), ("on", True), ("auto", None)])
def test_dynamo_dynamic_is_torchs_three_way_switch(word, value):
    (options,) = BraidCompile.execute(
        dynamo_backend="eager", dynamo_mode="default", dynamo_fullgraph=False, dynamo_dynamic=word
    ).result
    assert options.compilation.dynamo_dynamic is value


def test_the_host_accepts_a_state_that_is_typed_and_not_offered(monkeypatch):
    node = BraidCheckpointing
    monkeypatch.setitem(core_nodes.NODE_CLASS_MAPPINGS, node.__name__, node)
    inputs = {"save_every_n_steps": 1, "save_last_n": 0, "save_state": True, "ema_shadows": False}
    prompt = {
        "1": {"class_type": node.__name__, "inputs": inputs | {"resume": "/elsewhere/a.state"}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    monkeypatch.setitem(core_nodes.NODE_CLASS_MAPPINGS, "PreviewAny", PreviewAny)
    valid = awaited(execution.validate_prompt("id", prompt, None))
    assert valid[0], valid


def test_saved_states_are_offered_newest_first(tmp_path, monkeypatch):
    import os

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    for age, name in enumerate(("new", "old")):
        path = tmp_path / "loras" / name / f"{name}-step00000001.state"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    (resume,) = [i for i in BraidCheckpointing.define_schema().inputs if i.id == "resume"]
    assert resume.options == [
        "start afresh",
        "latest",
        "new/new-step00000001.state",
        "old/old-step00000001.state",
    ]


@pytest.mark.parametrize(
    "node",
    [BraidOptimizer, BraidCheckpointing, BraidTrainingLog, BraidCompile, BraidTrainingPreview]
    + [BraidValidation],
)
def test_every_required_input_reaches_execute_under_its_name(node):
    schema = node.define_schema()
    takes = inspect.signature(node.execute).parameters
    assert {i.id for i in schema.inputs} <= set(takes)
    assert all(i.tooltip for i in schema.inputs) and all(o.tooltip for o in schema.outputs)
