"""Describes the subgraph blueprints and writes them: a part of `make workflows`.

A blueprint is a workflow file with one node, whose type is the id of the subgraph below
`definitions`. The front end itself serializes the inner nodes, so that their slots are in the order
in which it makes them; what is written here is the frame: which of them are seen from outside.
"""

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from host.browse import browsing, measured
from host.find import PACK
from host.serve import Server

from .graph import BLUE, GREEN, PURPLE, Graph, Node

FOLDER = PACK / "subgraphs"
INPUTS, OUTPUTS = -10, -20
"""The ids that the front end gives the two ends of a subgraph."""
NAMESPACE = uuid.UUID("6f1c0b1e-9d0e-5b7a-8f1d-2b7a1d000008")
"""Of the ids below, which stay the same when a blueprint is written again."""
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """What of a graph is seen from outside."""

    inputs: dict[str, list[tuple[Node, str]]]
    """Name outside -> the inputs, sockets or widgets, that it feeds."""
    outputs: dict[str, tuple[Node, str]]
    """Name outside -> an output, as node["name"]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """A subgraph that can be inserted from the node library."""

    name: str
    description: str
    category: str
    describe: Callable[[Graph], Frame] = field(repr=False)


def train_and_average(graph: Graph) -> Frame:
    graph.column("What is trained", PURPLE)
    network = graph.add("BraidNetwork", network_dim=16, network_alpha=16)
    timesteps = graph.add("BraidTimestepSampling", timestep_sampling="sigmoid")
    options = graph.add("BraidCheckpointing", save_every_n_steps=50, save_last_n=0)
    graph.column("Train", GREEN, 440)
    trained = graph.add(
        "BraidTrainLora",
        820,
        network=network["network"],
        timesteps=timesteps["timesteps"],
        options=options["options"],
        steps=500,
    )
    graph.column("Average", BLUE, 440)
    average = graph.add(
        "BraidPostHocEma",
        checkpoints=trained["checkpoints"],
        method="sigma_rel",
        method__sigma_rel=0.15,
        filename_prefix="loras/average",
    )
    return Frame(
        inputs={
            "model": [(trained, "model")],
            "latents": [(trained, "latents")],
            "positive": [(trained, "positive")],
            "network_dim": [(network, "network_dim")],
            "network_alpha": [(network, "network_alpha")],
            "steps": [(trained, "steps")],
            "batch_size": [(trained, "batch_size")],
            "learning_rate": [(trained, "learning_rate")],
            "seed": [(trained, "seed")],
            "output_name": [(trained, "output_name")],
            "save_every_n_steps": [(options, "save_every_n_steps")],
            "sigma_rel": [(average, "method.sigma_rel")],
            "filename_prefix": [(average, "filename_prefix")],
        },
        outputs={
            "lora": average["lora"],
            "last_lora": trained["lora"],
            "checkpoints": trained["checkpoints"],
            "loss_map": trained["loss_map"],
            "weights": average["image"],
            "path": average["path"],
        },
    )


def calibrated_sampling(graph: Graph) -> Frame:
    graph.column("Measure one full run", PURPLE)
    calibrating = graph.add("BraidMagCacheCalibrate")
    measured = graph.add("KSampler", title="Full run, its own seed", model=calibrating["model"])
    calibration = graph.add(
        "BraidMagCacheCalibration",
        calibrator=calibrating["calibrator"],
        latent=measured["LATENT"],
        filename_prefix="",
    )
    graph.column("Sample with it", GREEN, 440)
    cached = graph.add("BraidMagCache", plan=calibration["plan"], rule="planned")
    sampled = graph.add("KSampler", title="With MagCache", model=cached["model"])
    report = graph.add("BraidMagCacheReport", model=cached["model"], latent=sampled["LATENT"])
    both = [measured, sampled]
    return Frame(
        inputs={
            "model": [(calibrating, "model"), (cached, "model")],
            "positive": [(sampler, "positive") for sampler in both],
            "negative": [(sampler, "negative") for sampler in both],
            "latent_image": [(sampler, "latent_image") for sampler in both],
            "seed": [(sampled, "seed")],
            "steps": [(sampler, "steps") for sampler in both],
            "cfg": [(sampler, "cfg") for sampler in both],
            "sampler_name": [(sampler, "sampler_name") for sampler in both],
            "scheduler": [(sampler, "scheduler") for sampler in both],
            "speedup": [(cached, "rule.speedup")],
        },
        outputs={
            "LATENT": report["latent"],
            "full_run": measured["LATENT"],
            "plan": calibration["plan"],
            "calibration": calibration["image"],
            "report": report["report"],
        },
    )


BLUEPRINTS = [
    Blueprint(
        name="Train and average a LoRA",
        description="Trains a LoRA and averages its checkpoints (post-hoc EMA, sigma_rel).",
        category="Braid/training",
        describe=train_and_average,
    ),
    Blueprint(
        name="Calibrated MagCache sampling",
        description="Measures one full run, then samples with a planned part of its steps. The "
        "measurement is kept while only the seed changes.",
        category="Braid/magcache",
        describe=calibrated_sampling,
    ),
]

SERIALIZE = """async (workflow) => {
    await app.loadGraphData(workflow);
    await new Promise((done) => setTimeout(done, 500));
    return app.graph.serialize().nodes;
}"""


def to_json(blueprint: Blueprint, graph: Graph, frame: Frame) -> dict:
    """The file of a blueprint, from a graph whose nodes the front end has serialized."""
    nodes = {node["id"]: node for node in graph.nodes}
    links = [dict(zip(LINK, link, strict=True)) for link in graph.links]

    def link(origin: tuple[int, int], target: tuple[int, int], kind: str) -> int:
        made = (len(links) + 1, *origin, *target, kind)
        links.append(dict(zip(LINK, made, strict=True)))
        return len(links)

    inputs, outputs = [], []
    for slot, (name, targets) in enumerate(frame.inputs.items()):
        fed = []
        for node, socket in targets:
            sockets = nodes[node.json["id"]]["inputs"]
            at = next(i for i, s in enumerate(sockets) if s["name"] == socket)
            sockets[at]["link"] = link((INPUTS, slot), (node.json["id"], at), sockets[at]["type"])
            fed.append(sockets[at])
        widget = fed[0].get("widget") and {"widget": {"name": name}}
        inputs.append(
            _end(blueprint, "input", name, fed[0]["type"], [s["link"] for s in fed])
            | {"widget": widget}
        )
    for slot, (name, (node, output)) in enumerate(frame.outputs.items()):
        source = nodes[node.json["id"]]["outputs"]
        at = next(i for i, o in enumerate(source) if o["name"] == output)
        number = link((node.json["id"], at), (OUTPUTS, slot), source[at]["type"])
        source[at]["links"] = [*(source[at].get("links") or []), number]
        outputs.append(_end(blueprint, "output", name, source[at]["type"], [number]))
    return _file(blueprint, graph, links, inputs, outputs, frame)


def _end(blueprint: Blueprint, side: str, name: str, kind: str, links: list[int]) -> dict:
    number = str(uuid.uuid5(NAMESPACE, f"{blueprint.name} {side} {name}"))
    return {"id": number, "name": name, "type": kind, "linkIds": links}


def _file(blueprint, graph, links, inputs, outputs, frame) -> dict:
    number = str(uuid.uuid5(NAMESPACE, blueprint.name))
    right = max(node["pos"][0] + node["size"][0] for node in graph.nodes)
    seen = [
        {"name": end["name"], "type": end["type"], "link": None} | (end.pop("widget") or {})
        for end in inputs
    ]
    proxied = [
        [str(targets[0][0].json["id"]), targets[0][1]]
        for name, targets in frame.inputs.items()
        if any(s["name"] == name and "widget" in s for s in seen)
    ]
    definition = {
        "id": number,
        "version": 1,
        "revision": 0,
        "state": {
            "lastGroupId": len(graph.columns),
            "lastNodeId": len(graph.nodes),
            "lastLinkId": len(links),
            "lastRerouteId": 0,
        },
        "config": {},
        "name": blueprint.name,
        "description": blueprint.description,
        "category": blueprint.category,
        "inputNode": {"id": INPUTS, "bounding": [-260, 0, 160, 40 + 20 * len(inputs)]},
        "outputNode": {"id": OUTPUTS, "bounding": [right + 100, 0, 160, 40 + 20 * len(outputs)]},
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": graph.nodes,
        "groups": graph.to_json()["groups"],
        "links": links,
        "extra": {},
    }
    outside = {
        "id": 1,
        "type": number,
        "pos": [0, 0],
        "size": [380, 120 + 26 * len(inputs)],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": seen,
        "outputs": [{"name": o["name"], "type": o["type"], "links": []} for o in outputs],
        "properties": {"proxyWidgets": proxied},
        "widgets_values": [],
        "title": blueprint.name,
    }
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [outside],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [definition]},
        "extra": {},
    }


def write(blueprint: Blueprint, page, object_info: dict, folder: Path = FOLDER) -> Path:
    """Describe, measure in the front end, write; the path of the file."""
    graph = Graph(object_info)
    frame = blueprint.describe(graph)
    graph.lay_out(measured(page, graph.to_json()))
    places = {node["id"]: (node["pos"], node["size"]) for node in graph.nodes}
    graph.nodes = sorted(page.evaluate(SERIALIZE, graph.to_json()), key=lambda node: node["id"])
    for node in graph.nodes:
        node["pos"], node["size"] = places[node["id"]]
    _renumber(graph)
    path = folder / f"{blueprint.name}.json"
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps(to_json(blueprint, graph, frame), indent=1) + "\n", encoding="utf-8")
    return path


def _renumber(graph: Graph) -> None:
    """Put the target slots of the links at where the front end has put the sockets."""
    at = {
        socket["link"]: slot
        for node in graph.nodes
        for slot, socket in enumerate(node.get("inputs", []))
        if socket.get("link") is not None
    }
    for link in graph.links:
        link[4] = at[link[0]]


def main() -> None:
    with Server.start() as server, browsing(server.url) as page:
        object_info = server.object_info()
        for blueprint in BLUEPRINTS:
            write(blueprint, page, object_info)


if __name__ == "__main__":
    main()
