"""A kernel's log: its stdout and stderr in a file that stays bounded, with the one before it beside it.

Nothing stands between a kernel and its file: one that has grown too large is copied in part, and cut. The kernel
appends (O_APPEND), so it goes on at the new end. What it writes between copy and cut is lost.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from dspex_kernels import logs

MAX_BYTES = 10 << 20
"""Of a log; it may be over this for as long as until somebody looks."""
KEPT_BYTES = 1 << 20
"""How much of the end is kept when a log is cut."""
TAIL_BYTES = 4000
"""How much of the end a failed start shows."""

_log = logs.get_logger(__name__)


def open_log(path: Path) -> IO[bytes]:
    """A fresh log for a kernel (0600); the last kernel's is kept beside it, with ``.1``."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists():
        path.replace(_before(path))
    return os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_EXCL, 0o600), "wb", buffering=0)


def move_log(log: Path, path: Path) -> None:
    """Give a kernel's log its place; what was there is kept beside it. The kernel writes on."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists():
        path.replace(_before(path))
    log.rename(path)


def unmove_log(path: Path) -> None:
    """Remove a log that was moved, and give what was there before its place again."""
    path.unlink(missing_ok=True)
    if _before(path).exists():
        _before(path).replace(path)


def cut_logs(paths: Iterable[Path]) -> None:
    """Cut those that are larger than ``MAX_BYTES``; their last ``KEPT_BYTES`` are kept beside them, with ``.1``."""
    for path in paths:
        try:
            _cut(path)
        except OSError as failure:
            _log.warning("kernel log %s cannot be cut: %s", path, failure.strerror)


def read_tail(path: Path) -> str:
    """The last lines of a log, without empty ones; "" when there is none."""
    try:
        with _open(path, os.O_RDONLY) as log:
            text = _end_of(log, TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip()).strip()


def _cut(path: Path) -> None:
    if not path.exists() or path.stat().st_size <= MAX_BYTES:
        return
    with _open(path, os.O_RDWR) as log:
        kept = _end_of(log, KEPT_BYTES)
        _before(path).unlink(missing_ok=True)
        with _open(_before(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL) as before:
            before.write(kept)
        log.truncate(0)


def _end_of(log: IO[bytes], size: int) -> bytes:
    log.seek(max(0, log.seek(0, os.SEEK_END) - size))
    return log.read(size)


def _open(path: Path, flags: int) -> IO[bytes]:
    """Open a file of a directory in which a kernel's owner may put what he likes: no link, nothing that blocks."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    file = os.fdopen(descriptor, {os.O_RDONLY: "rb", os.O_RDWR: "r+b"}.get(flags & os.O_ACCMODE, "wb"))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(0, "it is no file")
    return file


def _before(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")
