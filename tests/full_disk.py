"""A full disk by the kernel's own hand, which every real writer meets: no exception is made up.

    with largest_file(1000):
        ...  # what goes beyond 1000 bytes of any file fails, in every library and thread

RLIMIT_FSIZE lets the beginning of a file through and refuses the rest, as a disk that fills up
does, with EFBIG for ENOSPC (Python ignores SIGXFSZ, which would end the process). `NO_ROOM` fits
both. pytest's own files are small enough for any limit above a few hundred bytes.
"""

import contextlib

import pytest

NO_ROOM = "(No space left on device|File too large)"


@contextlib.contextmanager
def largest_file(size):
    """No file of this process may grow beyond `size` bytes until the end of the block."""
    resource = pytest.importorskip("resource")  # Unix
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files_below(folder):
    """Every file below a folder by its relative name, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
