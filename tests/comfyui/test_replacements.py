"""A prompt with ComfyUI-MagCache's node, through ComfyUI's own replacement, into ours."""

import pytest
from app.node_replace_manager import NodeReplaceManager
from host.awaiting import awaited
from magcache_runs import sample
from server import PromptServer
from tiny_models import build

import nodes as host_nodes
from comfyui_braid.engine.magcache.rules import MagCacheRule
from comfyui_braid.nodes import NODES, replacements
from comfyui_braid.nodes.magcache.cache import BraidMagCache
from comfyui_braid.nodes.magcache.inputs import parse_rule

OLD = {
    "model": ["1", 0],
    "model_type": "flux",
    "magcache_thresh": 0.06,
    "retention_ratio": 0.15,
    "magcache_K": 2,
    "start_step": 0,
    "end_step": -1,
}


class StandIn:
    """What a running server has of use here."""

    def __init__(self):
        self.node_replace_manager = NodeReplaceManager()


@pytest.fixture
def manager(monkeypatch):
    running = StandIn()
    monkeypatch.setattr(PromptServer, "instance", running, raising=False)
    ids = {node.GET_SCHEMA().node_id: node for node in NODES}
    monkeypatch.setattr(host_nodes, "NODE_CLASS_MAPPINGS", ids)
    awaited(replacements.register())
    return running.node_replace_manager


def prompt():
    return {
        "1": {"class_type": "BraidPlaygroundModel", "inputs": {}, "_meta": {}},
        "2": {"class_type": "MagCache", "inputs": dict(OLD), "_meta": {}},
        "3": {"class_type": "KSampler", "inputs": {"model": ["2", 0]}, "_meta": {}},
    }


def test_a_prompt_gets_our_node_with_the_old_rule(manager):
    replaced = prompt()
    manager.apply_replacements(replaced)
    assert replaced["2"]["class_type"] == "BraidMagCache"
    inputs = replaced["2"]["inputs"]
    rule = {name.partition(".")[2]: v for name, v in inputs.items() if name.startswith("rule.")}
    assert parse_rule({"rule": inputs["rule"], **rule}) == MagCacheRule(
        threshold=0.06, retention_ratio=0.15, k=2, interpolation="nearest"
    )
    assert inputs["model"] == ["1", 0] and replaced["3"]["inputs"]["model"] == ["2", 0]


def test_the_replaced_node_samples_with_flux_dev_s_published_list(manager):
    replaced = prompt()
    manager.apply_replacements(replaced)
    inputs = {name: v for name, v in replaced["2"]["inputs"].items() if "." not in name}
    inner = {n.partition(".")[2]: v for n, v in replaced["2"]["inputs"].items() if "." in n}
    rule = {"rule": inputs.pop("rule"), **inner}
    model = build("flux_dev")
    patched, plan = BraidMagCache.execute(**inputs | {"model": model, "rule": rule}).args
    assert plan.name == "FLUX.1-dev"
    assert sample(patched, "flux_dev", steps=28).isfinite().all()


def test_every_input_named_is_one_of_our_node(manager):
    names, declared = set(), BraidMagCache.INPUT_TYPES()
    for part in ("required", "optional"):
        for name, (kind, *rest) in declared[part].items():
            names.add(name)
            for option in rest[0]["options"] if kind == "COMFY_DYNAMICCOMBO_V3" else ():
                inner = option["inputs"]
                names |= {f"{name}.{n}" for p in inner.values() for n in p}
    mapping = replacements.magcache().as_dict()["input_mapping"]
    assert {entry["new_id"] for entry in mapping} <= names


def test_a_pack_that_is_there_keeps_its_own_node(manager, monkeypatch):
    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, "MagCache", object)
    kept = prompt()
    manager.apply_replacements(kept)
    assert kept == prompt()
