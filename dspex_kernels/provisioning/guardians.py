"""The guardians of this process: one for each service that it runs, and one for kernels that no service owns."""

from __future__ import annotations

import os
import threading
import uuid
from concurrent.futures import Future
from pathlib import Path

from jupyter_core.paths import jupyter_data_dir

from dspex_kernels import errors
from dspex_kernels.provisioning.guardian_client import Guardian

LINGER = 600.0
"""Seconds; see ``Guardians``."""


def default_directory() -> Path:
    """Where services without a choice of their own have their directories."""
    return Path(jupyter_data_dir()) / "dspex" / "services"


class Guardians:
    """Finds a provisioner's guardian by its service's id. No method blocks: a guardian's own thread does.

    Args:
        linger: Seconds for which the guardian of kernels that no service owns stays after the last of them, with
            its fork servers: whoever closes one notebook may open the next.
    """

    def __init__(self, linger: float = LINGER) -> None:
        self.linger = linger
        self._lock = threading.Lock()  # of all below: blocking Jupyter clients come from several threads
        self._by_service: dict[str, Guardian] = {}
        self._shared: Guardian | None = None
        self._users = 0

    def open(self, service_id: str, services: Path, lease: int | None = None) -> Guardian:
        """Start a service's guardian; its ``ready`` tells whether that went well. For the arguments see there."""
        guardian = Guardian(service_id, services, lease)
        with self._lock:
            self._by_service = {key: value for key, value in self._by_service.items() if _works(value)}
            self._by_service.setdefault(service_id, guardian)  # one that works keeps its place: the other will fail
        return guardian

    def get(self, service_id: str) -> Guardian:
        """The guardian of a service that was opened in this process.

        Raises:
            KernelStartFailed: It was not, or it has been stopped.
        """
        guardian = self._by_service.get(service_id)
        if guardian is None or not _works(guardian):
            raise errors.KernelStartFailed(
                f"service {service_id!r} has no guardian in this process: open it first, or give no service_id"
            )
        return guardian

    def join(self) -> Guardian:
        """The guardian of kernels that no service owns: started for the first (``leave`` tells when it ends)."""
        with self._lock:
            if self._shared is None or not _works(self._shared):
                self._shared, self._users = Guardian(f"process-{uuid.uuid4().hex}", default_directory()), 0
            self._users += 1
            return self._shared

    def leave(self, guardian: Guardian) -> Future[None] | None:
        """Called once for each ``join``. The guardian's end, if it is asked for now."""
        with self._lock:
            if guardian is not self._shared:
                return None
            self._users -= 1
        if self.linger > 0:
            guardian.call_later(self, self.linger, lambda: self._end_unused(guardian))
            return None
        return self._end_unused(guardian)

    def _end_unused(self, guardian: Guardian) -> Future[None] | None:
        with self._lock:
            if self._users > 0 or guardian is not self._shared:
                return None
            self._shared = None
        return guardian.stop()


def _works(guardian: Guardian) -> bool:
    return not guardian.stopping and guardian.owner_pid == os.getpid()
