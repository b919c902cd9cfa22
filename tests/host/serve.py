"""A real ComfyUI server on a free loopback port, with this pack linked in as `My-Pack`.

    with Server.start() as server:
        server.queue(prompt)["outputs"]

Everything it writes lies in a temporary base directory that is removed with it. Run as a script
(`python -m host.serve --port …`) this file is the launcher: stand-ins, then ComfyUI's own main.py.
"""

import contextlib
import json
import os
import runpy
import shutil
import site
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

from .find import PACK, find_comfyui

OPTIONAL = ("tensorboard", "wandb", "bitsandbytes", "prodigyopt", "schedulefree")
"""What requirements.txt does not name: absent from a server, as after an installation."""
ABSENT = "BRAID_ABSENT_PACKAGES"
"""The environment variable that tells the launcher which packages to hide."""
PACK_FOLDER = "My-Pack"
"""Not the package's name, so that nothing can depend on it."""
FOLDERS = ("output", "input", "temp", "user/default", "models", "custom_nodes")
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Queue.QPOV2": False}
"""A user who has seen the first-start dialogs."""


class Server:
    """One running ComfyUI; see `start`."""

    def __init__(self, process: subprocess.Popen, url: str, base: Path):
        self.process = process
        self.url = url
        """http://127.0.0.1:<port>"""
        self.base = base
        """Holds ComfyUI's folders, and HOME and TMPDIR of the process as home/ and tmp/."""

    @classmethod
    def start(
        cls,
        *arguments: str,
        settings: dict | None = None,
        absent: tuple[str, ...] = OPTIONAL,
        timeout: float = 180,
    ) -> "Server":
        """Start and wait until it answers; RuntimeError with its log when it does not."""
        comfyui = find_comfyui()
        if comfyui is None:
            raise RuntimeError("no ComfyUI found: set COMFYUI_PATH to a checkout")
        base = Path(tempfile.mkdtemp(prefix="braid-comfyui-"))
        for folder in (*FOLDERS, "home", "tmp"):
            (base / folder).mkdir(parents=True)
        (base / "custom_nodes" / PACK_FOLDER).symlink_to(PACK, target_is_directory=True)
        user_settings = base / "user" / "default" / "comfy.settings.json"
        user_settings.write_text(json.dumps(SETTINGS | (settings or {})))
        port = _free_port()
        command = [sys.executable, "-m", "host.serve", "--port", str(port), "--cpu"]
        command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-api-nodes", "--disable-auto-launch", *arguments]
        environment = os.environ | {
            "COMFYUI_PATH": str(comfyui),
            "PYTHONDONTWRITEBYTECODE": "1",
            ABSENT: " ".join(absent),
            "PYTHONUSERBASE": site.getuserbase(),  # packages of a user, who has another HOME here
            "HOME": str(base / "home"),
            "TMPDIR": str(base / "tmp"),
        }
        with (base / "server.log").open("w") as log:
            process = subprocess.Popen(
                command,
                cwd=Path(__file__).resolve().parent.parent,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        server = cls(process, f"http://127.0.0.1:{port}", base)
        try:
            server._wait_until_ready(timeout)
        except BaseException:
            server.stop()
            raise
        return server

    def log(self) -> str:
        """What the server has printed so far."""
        return (self.base / "server.log").read_text(errors="replace")

    def get(self, path: str):
        """The JSON answer of GET path."""
        return json.loads(self.get_bytes(path))

    def get_bytes(self, path: str) -> bytes:
        """The raw answer of GET path."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def post(self, path: str, body):
        """The JSON answer of POST path, also when the status is an error."""
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        return json.loads(text) if text else None

    def object_info(self) -> dict:
        """Every node's schema, by id."""
        return self.get("/object_info")

    def queue(self, prompt: dict, timeout: float = 300) -> dict:
        """Run an API-format prompt; its history entry. RuntimeError when it is refused or fails."""
        answer = self.post("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})
        if "prompt_id" not in answer or answer.get("node_errors"):
            raise RuntimeError(f"ComfyUI refused the prompt: {json.dumps(answer, indent=1)}")
        entry = self._wait_for_history(answer["prompt_id"], timeout)
        if entry["status"]["status_str"] != "success":
            raise RuntimeError(f"the prompt failed: {json.dumps(entry['status'], indent=1)}")
        return entry

    def stop(self) -> None:
        """End the process and remove its base directory."""
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.base, ignore_errors=True)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _wait_until_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.2)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log()[-4000:]}")

    def _wait_for_history(self, prompt_id: str, timeout: float) -> dict:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended:\n{self.log()[-4000:]}")
            time.sleep(0.1)
        raise RuntimeError(f"the prompt took over {timeout:g} s:\n{self.log()[-4000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _launch() -> None:
    from . import stand_ins

    root = find_comfyui()
    sys.path[:] = [str(root), *(p for p in sys.path if Path(p or ".").resolve() != Path.cwd())]
    stand_ins.install()
    absent = os.environ.get(ABSENT, "").split()
    sys.modules.update(dict.fromkeys(absent))  # importing None raises ModuleNotFoundError
    sys.argv[0] = str(root / "main.py")
    os.chdir(root)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    _launch()
