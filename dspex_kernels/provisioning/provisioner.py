"""Jupyter's view of the guardian: a provisioner whose kernels end with the process that started them.

It is the local provisioner in all but three things: who the kernel's parent is, how its end is learnt (from the
guardian, at once, instead of by polling), and that what a kernel started ends with it.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import LocalProvisioner
from traitlets import Integer, List, Unicode

from dspex_kernels import config, errors, logs
from dspex_kernels.provisioning.guardian_client import GuardedProcess, Guardian, unsupported
from dspex_kernels.provisioning.guardians import Guardians

LAUNCH_TIMEOUT = 30.0
"""Seconds for a guardian to start and to run a program; it takes tens of milliseconds on an idle machine."""
SIGNAL_TIMEOUT = 5.0
"""Seconds for a guardian to pass on a signal."""
STOP_TIMEOUT = 20.0
"""Seconds for a guardian to end: it gives up on what cannot be killed before that."""

_OPTIONS = {"env", "cwd", "stdin", "stdout", "stderr"}
_NOT_OURS = ("extra_arguments", "kernel_id", "independent")  # Jupyter's own, as LocalProvisioner drops them
_IPC_CHANNELS = ("shell_port", "iopub_port", "stdin_port", "hb_port", "control_port")

_guardians = Guardians()
_log = logs.get_logger(__name__)


def shared_guardians() -> Guardians:
    """The guardians of this process, by which provisioners find theirs."""
    return _guardians


class GuardedProvisioner(LocalProvisioner):
    """Starts kernels below this process's guardian.

    Chosen by a kernelspec's ``metadata.kernel_provisioner``: ``{"provisioner_name": "dspex-guarded", "config":
    {"service_id": …}}``. Where there can be no guardian, and for kernels that are meant to outlive their
    manager (``independent=True``), it is the local provisioner.
    """

    service_id = Unicode(
        "",
        help="Whose guardian to use, as opened by ``open_guardian``; empty is one shared by this process's other "
        "kernels, which is started for the first and ends with the last of them.",
    )
    remove_paths = List(
        Unicode(), help="Files and links that end with the service, beside the connection file and ipc sockets."
    )

    memory_limit = Integer(
        0,
        min=0,
        help="Bytes that the kernel's process may allocate, and each that it starts; 0 is no limit. What goes "
        "beyond it fails with a MemoryError, and the command that ran with ``kernel_out_of_memory``.",
    ).tag(config=True)

    process: Any = None
    _guardian: Guardian | None = None
    _guarded: GuardedProcess | None = None
    """The last process, also when it has ended."""

    @classmethod
    async def open_guardian(
        cls, service_id: str, services: str | Path, *, lease: int | None = None
    ) -> Guardian | None:
        """Start the guardian of a service in this process, after ending what dead services left.

        Args:
            service_id: The provisioners' ``service_id``; a file name.
            services: Where services have their directories; made when it is not there.
            lease: As ``Guardian`` takes it.

        Returns:
            The guardian. Its ``stop()`` is the orderly end. None where there can be none (``unsupported``).

        Raises:
            StoreError: The disk refuses, or a living service has this id.
        """
        if not _is_supported():
            return None
        guardian = _guardians.open(service_id, Path(services), lease)
        try:
            await asyncio.wrap_future(guardian.ready)
        except BaseException:
            guardian.stop()  # nobody else would
            raise
        return guardian

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Called from ``KernelManager.start_kernel()``, also for a restart.

        Raises:
            OSError: The program cannot be run.
            KernelStartFailed: There is no guardian to run it.
            TypeError: An option of Popen that a guarded kernel cannot have.
        """
        if kwargs.get("independent") or not _is_supported():
            return await super().launch_kernel(cmd, **kwargs)
        options = {name: value for name, value in kwargs.items() if name not in _NOT_OURS}
        options["env"] = {**(options.get("env") or os.environ), **self._road()}
        if unknown := sorted(set(options) - _OPTIONS):
            raise TypeError(f"a guarded kernel cannot be started with {', '.join(unknown)}")
        if self._guardian is None:
            self._guardian = _guardians.get(self.service_id) if self.service_id else _guardians.join()
        try:
            process = await self._launch(_expanded(cmd), options)
        except BaseException:
            if self._guarded is None:  # nobody calls cleanup() for a kernel that never was
                await self._leave_guardian()
            raise
        if self._guarded is not None:
            self._guarded.forget()  # only now: the last kernel's files are this one's too
        self._guarded = self.process = process
        self.pid = self.pgid = process.pid  # it leads a group of its own
        self.cwd = kwargs.get("cwd") or Path.cwd()
        return self.connection_info

    def _finalize_env(self, env: dict[str, str]) -> None:
        """Called by Jupyter with a kernel's whole environment: what is the host's alone is no kernel's."""
        super()._finalize_env(env)
        for name in config.host_secrets(env):
            del env[name]

    async def wait(self) -> int | None:
        """The exit code once the process has ended, negative for a signal; also long after. Any number may wait."""
        process = self._guarded
        if process is None:
            code: int | None = await super().wait()
            return code
        code = await asyncio.wrap_future(process.ended)
        if self.process is process:
            self.process = None  # has_process is False from now on, as with the local provisioner
        return code

    async def send_signal(self, signum: int) -> None:
        """Signal the kernel's process group; a kernel that has ended is none."""
        if not isinstance(self.process, GuardedProcess):
            await super().send_signal(signum)
            return
        if not await _is_done(self.process.send_signal(signum), SIGNAL_TIMEOUT):
            self.log.warning("kernel %s: signal %s was not passed on in %g s", self.pid, signum, SIGNAL_TIMEOUT)

    async def cleanup(self, restart: bool = False) -> None:
        """Called from ``KernelManager.cleanup_resources()``, when the kernel's files are removed."""
        await super().cleanup(restart=restart)
        if not restart:
            self._remove_road()
            if self._guarded is not None:
                self._guarded.forget()
            await self._leave_guardian()

    async def get_provisioner_info(self) -> dict[str, Any]:
        info: dict[str, Any] = await super().get_provisioner_info()
        return info | {"service_id": self.service_id}

    async def load_provisioner_info(self, provisioner_info: dict[str, Any]) -> None:
        await super().load_provisioner_info(provisioner_info)
        self.service_id = provisioner_info["service_id"]

    def remember(self, paths: Iterable[str]) -> None:
        """Have more files removed with the service. Called by a service that gives a kernel's files other names."""
        if self._guarded is not None:
            self._guarded.remember(paths)

    async def _leave_guardian(self) -> None:
        guardian, self._guardian = self._guardian, None
        stopped = _guardians.leave(guardian) if guardian is not None else None
        if stopped is not None and not await _is_done(stopped, STOP_TIMEOUT):
            self.log.warning("the kernels' guardian did not end within %g s", STOP_TIMEOUT)

    async def _launch(self, cmd: list[str], options: dict[str, Any]) -> GuardedProcess:
        assert self._guardian is not None
        paths = [*self._paths(), *self.remove_paths]
        return await self._answer(
            self._guardian.launch(cmd, paths=paths, memory_limit=self.memory_limit, **options)
        )

    async def _answer(self, launching: Future[GuardedProcess], timeout: float = LAUNCH_TIMEOUT) -> GuardedProcess:
        """The process that is being launched; one that nobody waits for any more is ended."""
        try:
            if await _is_done(launching, timeout):
                return launching.result()
        except asyncio.CancelledError:
            launching.add_done_callback(_end_unwanted)
            raise
        launching.add_done_callback(_end_unwanted)
        raise errors.KernelStartFailed(f"the guardian ran no kernel within {timeout:g} s; try again")

    def _remove_road(self) -> None:
        """Remove the sixth of a kernel's sockets: Jupyter removes five."""
        for path in self._road().values():
            Path(path).unlink(missing_ok=True)

    def _paths(self) -> list[str]:
        """What Jupyter removes when a kernel is shut down: the connection file, and ipc sockets."""
        info, manager = self.connection_info, self.parent
        paths = [os.path.realpath(manager.connection_file)] if manager is not None else []
        if info.get("transport") == "ipc":
            paths += [f"{info['ip']}-{info[channel]}" for channel in _IPC_CHANNELS]
        return [*paths, *self._road().values()]

    def _road(self) -> dict[str, str]:
        """What tells a kernel of ours that the socket of its own channel will be removed; nothing over tcp."""
        info = self.connection_info
        return {config.ENV_ROAD: config.road_path(info["ip"])} if info.get("transport") == "ipc" else {}


async def _is_done(future: Future[Any], timeout: float) -> bool:
    """Wait for what a guardian answers; False when there is none after ``timeout`` seconds."""
    waiting = asyncio.wrap_future(future)
    try:
        await asyncio.wait({waiting}, timeout=timeout)
    finally:
        if not waiting.cancel():
            waiting.exception()  # the caller asks the future itself; asyncio would log this one as never asked
    return future.done()


def _expanded(cmd: list[str]) -> list[str]:
    """A command as Jupyter's own launcher has it: "~" may stand in any word."""
    return [os.path.expanduser(word) for word in cmd]  # noqa: PTH111  # words are no paths, and stay as they are


def _end_unwanted(launching: Future[GuardedProcess]) -> None:
    """End a process that was launched after its caller had gone."""
    if launching.exception() is None:
        launching.result().send_signal(signal.SIGKILL)
        launching.result().forget()


@functools.cache
def _is_supported() -> bool:
    """Whether there can be a guardian. The reason why not is logged once."""
    reason = unsupported()
    if reason is not None:
        _log.warning("kernels are not guarded: %s; what they start may outlive this process", reason)
    return reason is None
