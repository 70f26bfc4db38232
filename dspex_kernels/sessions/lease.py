"""Which service may open or destroy a session: one at a time, by a lock in the session's directory.

Several services may share one store and one data directory: two scripts with the defaults do. Without the lease the
second would take a living kernel's log and connection file for those of a dead one, or remove a session while its
kernel acknowledges changes. The lock is the operating system's, so it ends with its process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Self

from dspex_kernels import errors

LOCK_NAME = "service.lock"


class Lease:
    """The right to a session; made by ``acquire``, held until ``release`` or the process's end."""

    def __init__(self, descriptor: int, directory: Path) -> None:
        self._descriptor = descriptor
        self._directory = directory

    @classmethod
    def acquire(cls, session_id: str, directory: Path) -> Self:
        """Take the session in ``directory`` (made, 0700, when it is not there).

        Raises:
            SessionNotReady: Another service has it.
            StoreError: The disk refuses.
        """
        path = directory / LOCK_NAME
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lease = cls(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), directory)
            try:
                lease._lock(session_id)
            except BaseException:
                lease.release()
                raise
        except OSError as failure:
            raise errors.StoreError(
                f"session {session_id!r}: {path} cannot be used: {failure.strerror}; make room, or make it writable"
            ) from failure
        return lease

    def _lock(self, session_id: str) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip()
            raise errors.SessionNotReady(
                f"session {session_id!r} is in use by another service (pid {holder or 'unknown'}): ask that one, "
                "or stop it first",
                details={"session_id": session_id, "pid": holder},
            ) from None  # the lock's own error tells nothing more
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let go; releasing twice is fine."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def discard(self) -> None:
        """Let go of a session that is none: a directory in which nothing but the lock is goes as well."""
        with contextlib.suppress(OSError):  # what cannot be tidied up is in nobody's way
            if [path.name for path in self._directory.iterdir()] == [LOCK_NAME]:
                (self._directory / LOCK_NAME).unlink()
                self._directory.rmdir()
        self.release()
