"""Jupyter's view of the fork server: a provisioner whose kernels are there at once.

Chosen by our kernelspec. It is the guarded provisioner in all but how the process comes to be: a kernel that stands
by, or is forked now, is told whose it is. What cannot be forked is started as the kernelspec says; the reason is
logged once.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from traitlets import Bool, Integer, default

from dspex_kernels import config, logs
from dspex_kernels.provisioning.fork_servers import ForkServer, NoFork, Origin
from dspex_kernels.provisioning.guardian_client import GuardedProcess
from dspex_kernels.provisioning.provisioner import GuardedProvisioner

FORK_TIMEOUT = 60.0
"""Seconds for a kernel to be forked, the start of its fork server included; that takes about two."""
MAX_ASSIGNMENTS = 3
"""Kernels that are tried, should one die while it stands by and before that is noticed."""

_log = logs.get_logger(__name__)
_told: set[str] = set()
"""Reasons for which kernels were started plainly, and which were logged."""


class ForkServerProvisioner(GuardedProvisioner):
    """Hands out kernels that were forked from a warm process.

    Chosen by a kernelspec's ``metadata.kernel_provisioner``: ``{"provisioner_name": "dspex-forkserver"}``.
    """

    enabled = Bool(
        True,
        help="Whether kernels are forked; else each is started anew. Default: yes, unless the environment has "
        f"{config.ENV_FORK}=0.",
    ).tag(config=True)
    standby = Integer(2, min=0, help="Kernels that stand by once one was started: the next are there at once.").tag(
        config=True
    )

    _origin: tuple[ForkServer, int] | None = None
    """The fork server that the kernel is of, and its age then; None where the kernel was started plainly."""

    @property
    def is_current(self) -> bool:
        """Whether the kernel was forked, and one that is forked now has loaded the same. Asked by its service."""
        return self._origin is not None and self._origin[0].age == self._origin[1]

    @default("enabled")
    def _default_enabled(self) -> bool:
        return os.environ.get(config.ENV_FORK, "1") != "0"

    async def _launch(self, cmd: list[str], options: dict[str, Any]) -> GuardedProcess:
        if self.enabled:
            try:
                return await self._fork(cmd, options)
            except NoFork as why:
                self._tell_once(str(why))
        return await super()._launch(cmd, options)

    async def _fork(self, cmd: list[str], options: dict[str, Any]) -> GuardedProcess:
        """A kernel that was forked, and whose sockets are bound.

        Raises:
            NoFork: It has to be started plainly.
            OSError: Its directory cannot be entered.
            KernelStartFailed: The guardian was lost, or is too slow.
        """
        assert self._guardian is not None
        origin = Origin.of(cmd, options["env"])
        server = self._guardian.fork_servers.of(origin)
        try:
            for _ in range(MAX_ASSIGNMENTS):
                age = server.age
                kernel = await self._take(server)
                with contextlib.suppress(ConnectionError):  # it died before it knew whose it was
                    process = await self._answer(self._assign(kernel, origin, cmd, options))
                    self._origin = server, age
                    return process
        finally:
            server.refill()
        raise NoFork(f"{MAX_ASSIGNMENTS} forked kernels died before they could be used")

    async def _take(self, server: ForkServer) -> GuardedProcess:
        try:
            return await self._answer(server.take(self.standby), FORK_TIMEOUT)
        except OSError as failure:  # no process, no descriptor, or the fork server ended just now
            raise NoFork(f"the fork failed: {failure}") from failure

    def _assign(
        self, kernel: GuardedProcess, origin: Origin, cmd: list[str], options: dict[str, Any]
    ) -> Future[GuardedProcess]:
        assignment = {
            "argv": cmd,
            "env": options["env"],
            "cwd": os.fspath(options.get("cwd") or Path.cwd()),
            "imports_from_cwd": origin.imports_from_cwd,
            "memory_limit": self.memory_limit,
        }
        streams = (options.get("stdin", subprocess.DEVNULL), options.get("stdout"), options.get("stderr"))
        return kernel.assign(assignment, streams, [*self._paths(), *self.remove_paths])

    def _tell_once(self, why: str) -> None:
        if why not in _told:
            _told.add(why)
            _log.info("kernel %s is started plainly: %s", self.kernel_id, why)
