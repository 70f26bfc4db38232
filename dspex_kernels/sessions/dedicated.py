"""The dedicated backend: one kernel a session, started by kernelspec name and watched until its end.

A kernel's death is read off its process (a pidfd on the event loop, or the provisioner's own ``wait()``), not off a
heartbeat: it is noticed at once, without polling and without a thread. Jupyter's restarter is left out on purpose:
it would bring a kernel without state back under the same id (enterprise_gateway#819).
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import zmq.asyncio
from jupyter_client.kernelspec import NoSuchKernel
from jupyter_client.multikernelmanager import AsyncMultiKernelManager
from jupyter_client.provisioning import LocalProvisioner
from jupyter_core.paths import jupyter_runtime_dir

from dspex_kernels import config, errors
from dspex_kernels.protocol.commands import Command
from dspex_kernels.sessions.backend import Place, SessionBackend
from dspex_kernels.sessions.calls import Call
from dspex_kernels.sessions.kernel_connection import KernelConnection, new_context
from dspex_kernels.sessions.model import SessionRecord
from dspex_kernels.sessions.tasks import Tasks

LOG_NAME = "kernel.log"
"""A kernel's stdout and stderr, in its session's directory; the last kernel's is beside it with ``.1``."""
LINK_NAME = "kernel.json"
"""In a session's directory, a link to its kernel's connection file, which tells what to remove after a crash."""
LOG_TAIL_BYTES = 4000
"""How much of the log a failed start shows."""
SHUTDOWN_TIMEOUT = 15.0
"""Seconds for one kernel to end: Jupyter asks, terminates and kills within ten."""

SERVICE_SECRETS = (
    "JUPYTER*_TOKEN",
    "JUPYTER_TOKEN_FILE",
    "JUPYTERHUB_*SECRET*",
    "JUPYTERHUB_CRYPT_KEY",
    "JPY_*TOKEN",
    "CONFIGPROXY_AUTH_TOKEN",
    "DSPEX_CRYPT_KEY",
)
"""Variables that are the service's alone: no kernel gets them."""
LIKELY_SECRETS = (
    "*API_KEY*",
    "*_KEY",
    "*_KEY_ID",
    "*TOKEN*",
    "*SECRET*",
    "*PASSWORD*",
    "*PASSWD*",
    "*CREDENTIALS*",
    "DATABASE_URL",
)
"""Variables that a restricted LMPolicy withholds, unless its ``allowed_keys`` name them."""


def kernel_environment(source: dict[str, str], policy: config.LMPolicy) -> dict[str, str]:
    """What of the service's environment a kernel may see.

    Args:
        source: The service's environment.
        policy: Whose ``allowed_keys`` may pass; an unrestricted one lets everything pass but the service's own.
    """
    allowed = {variable for variable, _ in policy.allowed_keys}

    def passes(name: str) -> bool:
        if _matches(name, SERVICE_SECRETS):
            return False
        return policy.unrestricted or name in allowed or not _matches(name, LIKELY_SECRETS)

    return {name: value for name, value in source.items() if passes(name)}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name.upper(), pattern) for pattern in patterns)


@dataclass(eq=False)
class _Kernel:
    """A kernel of ours, from before its start until it is buried."""

    session_id: str
    kernel_id: str
    generation: int
    log_path: Path
    connection: KernelConnection | None = None
    place: Place | None = None
    """None until it has answered."""
    ending: bool = False
    """Its end is known: asked for, or noticed."""
    death: str | None = None
    """How its process ended, when it was not asked to."""
    unwatch: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


class DedicatedBackend(SessionBackend):
    """One kernel for each session, on a private ``AsyncMultiKernelManager``.

    Args:
        kernel_name: The kernelspec's name.
        policy: The LM policy that kernels are told.
        environment: What kernels inherit; None is this process's environment.
        max_starting: Kernels that start at the same time; others wait. None is twice the processors.
        **kwargs: For traitlets: ``parent``, ``config``, ``log``. ``KernelManager.transport`` and
            ``.transport_encryption`` are read from the configuration as Jupyter does.
    """

    name = "dedicated"

    def __init__(
        self,
        *,
        kernel_name: str,
        policy: config.LMPolicy,
        environment: dict[str, str] | None = None,
        max_starting: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._kernel_name = kernel_name
        self._policy = policy
        self._environment = environment
        self._starting = asyncio.Semaphore(max_starting or 2 * (os.cpu_count() or 1))
        self._kernels: dict[str, _Kernel] = {}
        self._tasks = Tasks(self.log)
        self._context: zmq.asyncio.Context | None = None
        self._multi: Any = None

    async def start(self) -> None:
        runtime_dir = Path(jupyter_runtime_dir())
        await asyncio.to_thread(runtime_dir.mkdir, mode=0o700, parents=True, exist_ok=True)
        self._context = new_context()
        self._multi = AsyncMultiKernelManager(
            parent=self,
            context=self._context,
            connection_dir=str(runtime_dir),
            # Not the default, AsyncIOLoopKernelManager: that one brings the restarter.
            kernel_manager_class="jupyter_client.manager.AsyncKernelManager",
        )

    async def stop(self) -> None:
        closed = errors.ServiceClosed("the session service is closing")
        endings = [self._end(kernel, closed) for kernel in list(self._kernels.values())]
        try:
            await asyncio.gather(*endings)
            while running := self._tasks.running:
                await asyncio.wait(running, timeout=SHUTDOWN_TIMEOUT)
        finally:
            if self._context is not None:
                self._context.destroy(linger=0)

    async def open(self, record: SessionRecord, *, timeout: float) -> Place:
        if record.directory is None:
            raise errors.KernelStartFailed(f"session {record.session_id!r} has no directory for its journal")
        log_path = Path(record.directory) / LOG_NAME
        async with self._starting:
            kernel = _Kernel(record.session_id, str(uuid.uuid4()), record.generation, log_path)
            self._kernels[record.session_id] = kernel
            try:
                async with asyncio.timeout(timeout):
                    await self._launch(kernel)
                    kernel.place = await self._greet(kernel, timeout)
            except BaseException as failure:
                failed = await self._start_failed(kernel, failure, timeout)
                if failed is None:
                    raise
                raise failed from failure
        return kernel.place

    async def call(self, session_id: str, call: Call) -> dict[str, Any]:
        kernel = self._kernels.get(session_id)
        if kernel is None or kernel.connection is None:
            raise errors.SessionNotReady(f"session {session_id!r} has no kernel: call again")
        return await kernel.connection.request(
            call.command,
            call.args,
            session_id=session_id,
            timeout=call.timeout,
            request_id=call.request_id,
            stream=call.stream,
            on_event=call.on_event,
        )

    async def close(self, session_id: str) -> None:
        kernel = self._kernels.get(session_id)
        if kernel is not None:
            await self._end(kernel, errors.CommandCancelled(f"session {session_id!r} was closed during the call"))

    async def interrupt(self, session_id: str) -> None:
        kernel = self._kernels.get(session_id)
        if kernel is not None and kernel.place is not None:
            await self._multi.interrupt_kernel(kernel.kernel_id)

    def get_place(self, session_id: str) -> Place | None:
        kernel = self._kernels.get(session_id)
        return kernel.place if kernel is not None else None

    async def _launch(self, kernel: _Kernel) -> None:
        """Start the process, watch it, and open the connection to it."""
        log_file = await asyncio.to_thread(_open_log, kernel.log_path)
        with log_file:
            # Never cancelled halfway: Jupyter would lose sight of a process that runs already.
            await self._tasks.finish(
                self._multi.start_kernel(
                    kernel_name=self._kernel_name,
                    kernel_id=kernel.kernel_id,
                    env=self._kernel_env(kernel),
                    stdout=log_file,
                    stderr=subprocess.STDOUT,
                )
            )
        manager = self._multi.get_kernel(kernel.kernel_id)
        await asyncio.to_thread(_link, kernel.log_path.with_name(LINK_NAME), manager.connection_file)
        kernel.connection = KernelConnection(
            manager.get_connection_info(), context=self._context, name=kernel.kernel_id
        )
        await kernel.connection.open()
        self._watch(kernel, manager.provisioner)

    async def _greet(self, kernel: _Kernel, timeout: float) -> Place:
        """Wait until the kernel answers, and see that it is one of ours."""
        assert kernel.connection is not None
        await kernel.connection.identify(timeout=timeout)
        manager = self._multi.get_kernel(kernel.kernel_id)
        pid = manager.provisioner.pid if isinstance(manager.provisioner, LocalProvisioner) else None
        return Place(kernel.kernel_id, pid, kernel.generation, manager.connection_file)

    async def _start_failed(
        self, kernel: _Kernel, failure: BaseException, timeout: float
    ) -> errors.KernelError | None:
        """Clear away what was started. The error to raise; None when ``failure`` itself is to pass."""
        kernel.ending = True
        self._forget(kernel)
        await self._tasks.finish(self._bury(kernel, now=True))
        if isinstance(failure, errors.NotADSPexKernel) or not isinstance(failure, Exception):
            return None
        tail = await asyncio.to_thread(_log_tail, kernel.log_path)
        if kernel.death is not None:
            why = f"its process {kernel.death}"
        elif isinstance(failure, (TimeoutError, errors.CommandTimeout)):
            why = f"it did not answer within {timeout:g} s (SessionService.kernel_start_timeout)"
        elif isinstance(failure, NoSuchKernel):
            why = "no such kernelspec: `dspex-kernels install` writes ours, `jupyter kernelspec list` shows all"
        else:
            why = f"{type(failure).__name__}: {failure}"
        last = f"; its log ends: {tail.splitlines()[-1]}" if tail else ""
        return errors.KernelStartFailed(
            f"session {kernel.session_id!r}: kernel {self._kernel_name!r} did not start: {why}{last}",
            details={"session_id": kernel.session_id, "kernel_name": self._kernel_name, "log_tail": tail},
        )

    def _kernel_env(self, kernel: _Kernel) -> dict[str, str]:
        source = dict(os.environ) if self._environment is None else self._environment
        return kernel_environment(source, self._policy) | {
            config.ENV_SESSION_ID: kernel.session_id,
            config.ENV_SESSION_DIR: str(kernel.log_path.parent),
            config.ENV_GENERATION: str(kernel.generation),
            config.ENV_KERNEL_ID: kernel.kernel_id,
            config.ENV_BACKEND: self.name,
            config.ENV_LM_POLICY: self._policy.to_json(),
        }

    def _watch(self, kernel: _Kernel, provisioner: Any) -> None:
        """Have ``_died`` called when the kernel's process ends."""
        # Another provisioner's pid may be another machine's, so only a local one is watched by pid.
        if isinstance(provisioner, LocalProvisioner) and hasattr(os, "pidfd_open"):
            loop = asyncio.get_running_loop()
            descriptor = os.pidfd_open(provisioner.pid)
            kernel.unwatch.callback(os.close, descriptor)
            loop.add_reader(descriptor, lambda: self._died(kernel, _exit_of(descriptor)))
            kernel.unwatch.callback(loop.remove_reader, descriptor)
        else:
            task = self._tasks.spawn(self._wait_for_end(kernel, provisioner))
            kernel.unwatch.callback(task.cancel)

    async def _wait_for_end(self, kernel: _Kernel, provisioner: Any) -> None:
        code = await provisioner.wait()
        self._died(kernel, f"ended with code {code}")

    def _died(self, kernel: _Kernel, how: str) -> None:
        """The kernel's process has ended, and nobody asked for it unless ``ending``."""
        kernel.unwatch.close()
        if kernel.ending:
            return
        kernel.death = how
        assert kernel.connection is not None
        kernel.connection.fail_all(lambda row: _kernel_died(kernel, row))
        if kernel.place is None:
            return  # open() waits for its answer, and clears away
        kernel.ending = True
        self.log.warning("session %s: kernel %s %s", kernel.session_id, kernel.kernel_id, how)
        self._forget(kernel)
        self._tasks.spawn(self._bury(kernel, now=True))
        if self.lost is not None:
            self.lost(kernel.session_id, kernel.place, f"its kernel {how}")

    async def _end(self, kernel: _Kernel, error: errors.DSPexError) -> None:
        """End a kernel on request; who waits for it is answered with ``error``."""
        kernel.ending = True
        if kernel.connection is not None:
            kernel.connection.fail_all(lambda _: error)
        self._forget(kernel)
        await self._tasks.finish(self._bury(kernel, now=False))

    async def _bury(self, kernel: _Kernel, *, now: bool) -> None:
        """Take everything of a kernel away: watch, sockets, process group, connection file."""
        kernel.unwatch.close()
        if kernel.connection is not None:
            await kernel.connection.close()
        connection_file = Path(self._multi.connection_dir) / f"kernel-{kernel.kernel_id}.json"
        try:
            if kernel.kernel_id in self._multi or kernel.kernel_id in self._multi._pending_kernels:
                async with asyncio.timeout(SHUTDOWN_TIMEOUT):
                    await self._multi.shutdown_kernel(kernel.kernel_id, now=now)
        except Exception:  # a provisioner may raise anything, and the others are to be buried too
            self.log.exception("session %s: kernel %s could not be ended", kernel.session_id, kernel.kernel_id)
        finally:
            self._multi._pending_kernels.pop(kernel.kernel_id, None)
            connection_file.unlink(missing_ok=True)  # Jupyter leaves it when the launch itself failed
            link = kernel.log_path.with_name(LINK_NAME)
            if link.is_symlink() and not link.exists():  # else it is the next kernel's already
                link.unlink()

    def _forget(self, kernel: _Kernel) -> None:
        if self._kernels.get(kernel.session_id) is kernel:
            del self._kernels[kernel.session_id]


def _kernel_died(kernel: _Kernel, row: Command | None) -> errors.KernelDied:
    command = row.name if row is not None else "kernel_info"
    return errors.KernelDied(
        f"session {kernel.session_id!r}: its kernel {kernel.death} during {command}; its programs are kept, and "
        "the next call brings a new kernel",
        retryable=row is not None and row.repeatable,
        details={"session_id": kernel.session_id, "kernel_id": kernel.kernel_id, "command": command},
    )


def _exit_of(descriptor: int) -> str:
    """How the process behind a pidfd ended, without reaping it: that is the provisioner's."""
    try:
        ended = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # reaped already, or another process's child
        return "ended"
    if ended is None:
        return "ended"
    if ended.si_code == os.CLD_EXITED:
        return f"exited with code {ended.si_status}"
    return f"was killed by {signal.Signals(ended.si_status).name}"


def _open_log(path: Path) -> IO[bytes]:
    """A fresh log for a kernel (0600); the last kernel's is kept beside it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.replace(path.with_name(f"{path.name}.1"))
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_EXCL, 0o600)
    return os.fdopen(descriptor, "wb", buffering=0)


def _link(link: Path, connection_file: str) -> None:
    """Point the link to this connection file; the one it pointed to is a dead kernel's whose service died too."""
    if link.is_symlink():
        link.readlink().unlink(missing_ok=True)
        link.unlink()
    link.symlink_to(connection_file)


def _log_tail(path: Path) -> str:
    """The last lines of a log; "" when there is none."""
    try:
        with path.open("rb") as log:  # it may be of any size
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            text = log.read(LOG_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(_nonempty(text)).strip()


def _nonempty(text: str) -> Iterator[str]:
    return (line.rstrip() for line in text.splitlines() if line.strip())
