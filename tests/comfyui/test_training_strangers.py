"""A stranger's workflow in a real server: what it names does not run, and the queue lives on."""

import json
import os
import urllib.error
import urllib.parse
import urllib.request

import pytest
from host.serve import Server
from optimizer_packages import OPTIMIZER, install, plant, traces

PLANTED = ("input.evil", "models.loras.pack.readme", "lion_pytorch", "came_pytorch", "braid_stray")
MODULES = {
    "braid_try.offered": OPTIMIZER.format(name="Offered"),
    "braid_try.allowed": OPTIMIZER.format(name="Allowed"),
    "braid_try.leaves": "import sys\nsys.exit(3)\n",
}
ENTRY_POINT = (
    '[project.entry-points."comfyui_braid.optimizers"]\nMine = "braid_try.offered:Offered"'
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """On sys.path, as ComfyUI's own folder is: files of strangers, and packages of the owner."""
    root = tmp_path_factory.mktemp("comfyui")
    for name in PLANTED:
        plant(root, name)
    install(root / "project", MODULES, root / "site-packages", entry_points=ENTRY_POINT)
    return root


@pytest.fixture(scope="module")
def server(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(root), str(root / "site-packages")]))
        with Server.start() as running:
            yield running


@pytest.fixture
def settings(server):
    """The owner's file, which allows two classes."""
    path = server.base / "user" / "__braid" / "settings.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"optimizers": ["braid_try.allowed.Allowed", "braid_try.leaves.X"]}))
    yield path
    path.unlink()


def optimizer(name: str) -> dict:
    inputs = {
        "optimizer_type": "custom",
        "optimizer_args": "",
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0.0,
        "lr_scheduler_args": "",
        "optimizer_class": name,
    }
    return {"class_type": "BraidOptimizer", "inputs": inputs}


def shown(server, name: str) -> str:
    """Queue the node alone; the settings that it passes on, as text."""
    preview = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
    entry = server.queue({"1": optimizer(name), "2": preview})
    return json.dumps(entry["outputs"])


def refusal(server, name: str) -> str:
    with pytest.raises(RuntimeError) as failed:
        shown(server, name)
    return str(failed.value)


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("input.evil.X", "is not an optimizer class that a workflow may name"),
        ("models.loras.pack.readme.X", "is not an optimizer class that a workflow may name"),
        ("braid_stray.X", "is not an optimizer class that a workflow may name"),
        ("venv.__main__.X", "is not an optimizer class that a workflow may name"),
        ("unittest.__main__.X", "is not an optimizer class that a workflow may name"),
        ("lib2to3.__main__.X", "is not an optimizer class that a workflow may name"),
        ("idlelib.idle.X", "is not an optimizer class that a workflow may name"),
        ("test.__main__.X", "is not an optimizer class that a workflow may name"),
        ("main.X", "is not an optimizer class that a workflow may name"),
        ("lion_pytorch.X", "which is not of an installed package"),
        ("came_pytorch.CAME", "which is not of an installed package"),
        ("braid_try.allowed.Allowed", "is not an optimizer class that a workflow may name"),
        ("braid_try.leaves.X", "is not an optimizer class that a workflow may name"),
    ],
)
def test_what_a_workflow_names_does_not_run_and_the_next_prompt_does(name, sentence, server, root):
    assert sentence in refusal(server, name)
    assert traces(root) == []
    assert "NAdam" in shown(server, "torch.optim.NAdam")


def test_the_owners_file_and_an_entry_point_allow_a_class(server, settings):
    assert "braid_try.allowed.Allowed" in shown(server, "braid_try.allowed.Allowed")
    assert "braid_try.offered.Offered" in shown(server, "Mine")
    settings.write_text("{}")
    assert "is not an optimizer class" in refusal(server, "braid_try.allowed.Allowed")


def test_an_allowed_package_that_exits_while_it_is_imported_leaves_the_queue_alive(
    server, settings
):
    assert "cannot be imported (it would end the program: 3)" in refusal(
        server, "braid_try.leaves.X"
    )
    assert "NAdam" in shown(server, "torch.optim.NAdam")


def test_a_run_trains_after_all_that(server):
    schemas = server.object_info()

    def node(kind, **inputs):
        required = schemas[kind]["input"].get("required", {})
        defaults = {
            key: spec[1]["default"] for key, spec in required.items() if "default" in spec[-1]
        }
        return {"class_type": kind, "inputs": {**defaults, **inputs}}

    graph = {
        "1": node("BraidPlaygroundModel"),
        "2": node("BraidPlaygroundDataset", count=2),
        "3": node("BraidNetwork", network_dim=2),
        "4": optimizer("Mine"),
        "5": node(
            "BraidTrainLora",
            model=["1", 0],
            latents=["2", 0],
            positive=["2", 1],
            network=["3", 0],
            optimizer=["4", 0],
            steps=2,
            output_name="mine",
        ),
    }
    server.queue(graph)
    assert (server.base / "output" / "loras" / "mine" / "mine.safetensors").is_file()
    graph["4"]["inputs"] |= {"optimizer_class": "SparseAdam"}
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
        server.queue(graph)
    assert sorted(p.name for p in (server.base / "output" / "loras").iterdir()) == ["mine"]


@pytest.mark.parametrize(
    "route, headers",
    [
        ("/userdata/{}".format(urllib.parse.quote("../__braid/settings.json", safe="")), {}),
        ("/userdata/settings.json", {"comfy-user": "__braid"}),
        ("/userdata/{}".format(urllib.parse.quote("..\\__braid\\settings.json", safe="")), {}),
    ],
)
def test_no_route_of_comfyui_writes_the_owners_file(route, headers, server, settings):
    before = settings.read_text()
    request = urllib.request.Request(
        server.url + route, data=b'{"optimizers": ["input.evil.X"]}', headers=headers, method="POST"
    )
    try:
        urllib.request.urlopen(request, timeout=60).close()
    except urllib.error.HTTPError as error:
        assert error.code in (400, 403, 404, 500)
    assert settings.read_text() == before
    assert "is not an optimizer class" in refusal(server, "input.evil.X")


def test_an_upload_does_not_reach_the_owners_file(server, settings):
    before = settings.read_text()
    for kind in ("input", "output", "temp"):
        body = (
            '--x\r\nContent-Disposition: form-data; name="image"; filename="settings.json"\r\n\r\n'
            '{"optimizers": ["input.evil.X"]}\r\n'
            '--x\r\nContent-Disposition: form-data; name="subfolder"\r\n\r\n../user/__braid\r\n'
            f'--x\r\nContent-Disposition: form-data; name="type"\r\n\r\n{kind}\r\n'
            '--x\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n--x--\r\n'
        )
        request = urllib.request.Request(
            server.url + "/upload/image",
            data=body.encode(),
            headers={"Content-Type": "multipart/form-data; boundary=x"},
        )
        with pytest.raises(urllib.error.HTTPError, match="400|403"):
            urllib.request.urlopen(request, timeout=60)
    assert settings.read_text() == before
