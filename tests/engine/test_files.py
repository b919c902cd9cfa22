import os

import pytest

from comfyui_braid.engine.files import replaced_when_whole


def test_a_file_is_flushed_through_a_handle_that_may_write_as_windows_demands(
    tmp_path, monkeypatch
):
    fcntl = pytest.importorskip("fcntl")  # Unix
    modes = []
    monkeypatch.setattr(os, "fsync", lambda fd: modes.append(fcntl.fcntl(fd, fcntl.F_GETFL)))
    with replaced_when_whole(tmp_path / "file") as temporary:
        temporary.write_bytes(b"whole")
    assert [mode & os.O_ACCMODE for mode in modes] == [os.O_RDWR]
    assert (tmp_path / "file").read_bytes() == b"whole"
