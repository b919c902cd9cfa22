"""Files that are whole or absent, and the one place that says why one could not be written.

    with replaced_when_whole(path, size=len(data)) as file:
        file.write(data)

Every failure is a NotWrittenError, whose message is the sentence for the user.
"""

import contextlib
import errno
import io
import os
import re
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if sys.platform == "win32":  # which removes no file that is open
    fcntl = resource = None
else:
    import fcntl
    import resource
if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PARTIAL_SUFFIX = ".partial"
"""Of files that are being written; only a killed process leaves one."""
_PARTIAL_NAME = re.compile(r"\..+\.[0-9a-f]{32}" + re.escape(PARTIAL_SUFFIX))
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class NotWrittenError(OSError):
    """A file could not be written; the message says which, why, and what to do."""


class PartialFile(io.FileIO):
    """A file under its temporary name, locked while it is written, that writes all or raises."""

    def __init__(self, target: Path, size: int | None) -> None:
        """`size`: bytes it will have, as far as that is known."""
        self.target = target
        self.size = size
        self.path = target.parent / f".{target.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}"
        super().__init__(self.path, "x+")
        if fcntl:
            with contextlib.suppress(OSError):  # file systems without locks
                fcntl.flock(self, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, data: "ReadableBuffer") -> int:
        """All of `data`; NotWrittenError where there is no room for it."""
        rest = memoryview(data).cast("B")
        total = len(rest)
        with self.failures_said():
            while rest:
                rest = rest[super().write(rest) :]
        return total

    @contextmanager
    def failures_said(self) -> Iterator[None]:
        """Every OSError of what is done to this file as a NotWrittenError."""
        try:
            yield
        except NotWrittenError:
            raise
        except OSError as error:
            written = 0 if self.closed else os.fstat(self.fileno()).st_size
            raise not_written(self.target, error, self.size, written) from error


@contextmanager
def replaced_when_whole(path: Path, size: int | None = None) -> Iterator[PartialFile]:
    """Yield a file beside `path` to write to; on success flush it to disk and rename it to `path`.

    On any exception that file is removed and `path` is left as it was. `size`: its bytes, where
    they are known, for the message of the NotWrittenError.
    """
    with failures_said(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = PartialFile(path, size)
    try:
        yield file
        with file.failures_said():
            os.fsync(file.fileno())  # Windows flushes only what may be written to
            file.close()
            os.replace(file.path, path)
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        with contextlib.suppress(OSError):  # a later start sweeps it
            file.path.unlink(missing_ok=True)
        raise


@contextmanager
def failures_said(path: Path, size: int | None = None) -> Iterator[None]:
    """Every OSError inside as a NotWrittenError about `path`."""
    try:
        yield
    except NotWrittenError:
        raise
    except OSError as error:
        raise not_written(path, error, size) from error


def not_written(
    path: Path, error: OSError, size: int | None = None, written: int = 0
) -> NotWrittenError:
    """The sentence for `error`: of `size` bytes for `path`, `written` are on the disk until now."""
    reason = error.strerror or str(error)
    sentence = f"{path} could not be written: {reason}"
    takes = f"it takes {in_bytes(size)}" if size is not None else ""
    if error.errno in _FULL:
        free = free_bytes(path.parent) if error.errno == errno.ENOSPC else None  # not of a quota
        has = "" if free is None else f"{in_bytes(free + written)} are free there"
        numbers = " and ".join(part for part in (takes, has) if part)
        return NotWrittenError(f"{sentence} ({numbers or 'full'}); free some space there")
    if error.errno == errno.EFBIG:
        limit = largest_file()
        has = "" if limit is None else f"the largest file allowed here is {in_bytes(limit)}"
        numbers = ", ".join(part for part in (takes, has) if part)
        return NotWrittenError(
            f"{sentence} ({numbers or 'too large'}); save it where a file may be that large"
        )
    if error.errno in _DENIED:
        return NotWrittenError(
            f"{sentence}; close what has it open, or let ComfyUI write to {path.parent}"
        )
    return NotWrittenError(f"{sentence}; look after that folder, or save elsewhere")


def free_bytes(folder: Path) -> int | None:
    """Free space where `folder` is or would be made; None where that cannot be told."""
    existing = next((place for place in (folder, *folder.parents) if place.is_dir()), None)
    if existing is None:
        return None
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(existing)
        return usage.free if usage.total else None  # some network drives say 0 of 0
    return None


def largest_file() -> int | None:
    """Bytes that this process may write to one file; None without a limit."""
    if resource is None:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if limit == resource.RLIM_INFINITY else limit


def in_bytes(count: int) -> str:
    """A number of bytes for people: 1.5 GiB."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def remove_leftovers(folder: Path, min_age_s: float = 0.0) -> list[Path]:
    """Remove what killed processes left below `folder`; returns the files that are gone.

    Only temporary files of `replaced_when_whole`, not touched for `min_age_s` seconds, that no
    process is writing. Links below `folder` are not followed, and nothing raises.
    """
    removed = []
    for root, _, names in os.walk(folder):
        for path in (Path(root, name) for name in names if _PARTIAL_NAME.fullmatch(name)):
            with contextlib.suppress(OSError):
                if _is_old_file(path, min_age_s) and _removed_unless_in_use(path):
                    removed.append(path)
    return removed


def _is_old_file(path: Path, min_age_s: float) -> bool:
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime >= min_age_s


def _removed_unless_in_use(path: Path) -> bool:
    if fcntl is None:
        path.unlink()
        return True
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # a file system without locks: its age has to do
        path.unlink()
    return True
