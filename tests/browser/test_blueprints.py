"""The subgraph blueprints: listed by the server, inserted by the front end, run for real."""

import json

import pytest

from tools.blueprints import BLUEPRINTS, FOLDER

INSERT = """async ({ name, text }) => {
    const blueprint = JSON.parse(text);
    const items = { nodes: blueprint.nodes, subgraphs: blueprint.definitions.subgraphs };
    const made = app.canvas._deserializeItems(items, { position: [600, 0] });
    const node = made.nodes.values().next().value;
    window.inserted = node;
    return {
        inputs: node.inputs.map((input) => input.name),
        outputs: node.outputs.map((output) => output.name),
        widgets: (node.widgets ?? []).map((widget) => widget.name),
    };
}"""
"""As the front end inserts a blueprint that is chosen in the node library."""

CONNECT = """async ({ sources, values, shown }) => {
    const node = window.inserted;
    for (const [input, [type, slot, settings]] of Object.entries(sources)) {
        const source = LiteGraph.createNode(type);
        app.graph.add(source);
        for (const [name, value] of Object.entries(settings))
            source.widgets.find((widget) => widget.name === name).value = value;
        source.connect(slot, node, node.inputs.findIndex((socket) => socket.name === input));
    }
    for (const [name, value] of Object.entries(values)) {
        const widget = node.widgets.find((widget) => widget.name === name);
        widget.value = value;
        widget.callback?.(value);
    }
    for (const [output, type, input] of shown) {
        const sink = LiteGraph.createNode(type);
        app.graph.add(sink);
        const slot = node.outputs.findIndex((socket) => socket.name === output);
        node.connect(slot, sink, sink.inputs.findIndex((socket) => socket.name === input));
    }
    return (await app.graphToPrompt()).output;
}"""

LETTER = ["BraidPlaygroundPrompt", 0, {"glyph": "R"}]
NOTHING = ["BraidPlaygroundPrompt", 0, {"glyph": "none"}]
MODEL = ["BraidPlaygroundModel", 0, {}]
SIZE = {"width": 128, "height": 128}
RUNS = {
    "Train and average a LoRA": {
        "sources": {
            "model": MODEL,
            "latents": ["BraidPlaygroundDataset", 0, {"count": 8}],
            "positive": ["BraidPlaygroundDataset", 1, {"count": 8}],
        },
        "values": {
            "network_dim": 4,
            "steps": 6,
            "save_every_n_steps": 2,
            "sigma_rel": 0.2,
            "output_name": "from_a_blueprint",
        },
        "shown": [["path", "PreviewAny", "source"], ["weights", "PreviewImage", "images"]],
    },
    "Calibrated MagCache sampling": {
        "sources": {
            "model": MODEL,
            "positive": LETTER,
            "negative": NOTHING,
            "latent_image": ["EmptySD3LatentImage", 0, SIZE],
        },
        "values": {"steps": 12, "cfg": 2.0, "speedup": 2.0, "scheduler": "simple"},
        "shown": [
            ["LATENT", "BraidPlaygroundDecode", "latent"],
            ["report", "PreviewAny", "source"],
        ],
    },
}


def text_of(name: str, server) -> str:
    """The blueprint as the server hands it out."""
    listed = server.get("/global_subgraphs")
    number = next(key for key, entry in listed.items() if entry["name"] == name)
    assert listed[number]["info"]["node_pack"] == "custom_nodes.My-Pack"
    return server.get(f"/global_subgraphs/{number}")["data"]


def shown_text(entry: dict, prompt: dict) -> list[str]:
    previews = [number for number, node in prompt.items() if node["class_type"] == "PreviewAny"]
    return [entry["outputs"][number]["text"][0] for number in previews]


def test_every_file_is_a_described_blueprint_with_an_own_subgraph_id():
    assert {path.stem for path in FOLDER.glob("*.json")} == {b.name for b in BLUEPRINTS}
    numbers = {json.loads(p.read_text())["nodes"][0]["type"] for p in FOLDER.glob("*.json")}
    assert len(numbers) == len(BLUEPRINTS)


@pytest.mark.parametrize("name", RUNS)
def test_a_blueprint_is_listed_inserted_and_runs(name, server, open_page, console_errors):
    page = open_page({"Comfy.VueNodes.Enabled": False})
    text = text_of(name, server)
    frame = page.evaluate(INSERT, {"name": name, "text": text})
    assert set(RUNS[name]["sources"]) <= set(frame["inputs"])
    assert set(RUNS[name]["values"]) <= set(frame["widgets"])
    prompt = page.evaluate(CONNECT, RUNS[name])
    entry = server.queue(prompt)
    (text,) = shown_text(entry, prompt)
    if name == "Train and average a LoRA":
        assert _values(prompt, "BraidTrainLora")["steps"] == 6
        assert _values(prompt, "BraidPostHocEma")["method.sigma_rel"] == 0.2
        assert text.endswith(".safetensors") and (server.base / "output" / "loras").is_dir()
    else:
        report = json.loads(text)
        assert report["conditionings"] and all(
            c["skipped"] for c in report["conditionings"].values()
        )
        samplers = [n["inputs"] for n in prompt.values() if n["class_type"] == "KSampler"]
        assert [sampler["steps"] for sampler in samplers] == [12, 12]
    assert console_errors == []


def _values(prompt: dict, kind: str) -> dict:
    return next(node["inputs"] for node in prompt.values() if node["class_type"] == kind)
