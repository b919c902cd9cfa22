"""These tests run inside a real ComfyUI, imported in-process; without one they are skipped."""

import pytest
from host.inprocess import import_comfyui

HAS_COMFYUI = import_comfyui()

if not HAS_COMFYUI:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _inference_tensors_and_flags_do_not_leak():
    """Every test starts and ends outside training mode, as the host expects between nodes."""
    import comfy.model_management as mm

    assert not mm.in_training
    yield
    assert not mm.in_training


@pytest.fixture
def flux_file(tmp_path, monkeypatch):
    """A tiny FLUX in bf16, as a file that ComfyUI recognises."""
    from fp8_files import write_model

    return write_model(tmp_path, monkeypatch)
