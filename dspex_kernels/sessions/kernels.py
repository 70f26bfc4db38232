"""Kernel processes of the service: started by kernelspec name, watched until their end, buried whole.

A kernel's death is read off its process (a pidfd on the event loop, or the provisioner's own ``wait()``), not off a
heartbeat: it is noticed at once, without polling and without a thread. Jupyter's restarter is left out on purpose:
it would bring a kernel without state back under the same id (enterprise_gateway#819).
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
import os
import resource
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import IO, Any

import zmq.asyncio
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.multikernelmanager import AsyncMultiKernelManager
from jupyter_client.provisioning import LocalProvisioner
from jupyter_core.paths import jupyter_runtime_dir
from traitlets import Unicode, default
from traitlets.config import Config, LoggingConfigurable

from dspex_kernels import config, errors
from dspex_kernels.protocol.commands import Command
from dspex_kernels.sessions import kernel_log
from dspex_kernels.sessions.calls import ReplyListener
from dspex_kernels.sessions.environment import kernel_environment
from dspex_kernels.sessions.happenings import KernelDied, KernelStarted, Listeners, ReplyLate
from dspex_kernels.sessions.kernel_connection import MAX_PENDING, KernelConnection, new_context
from dspex_kernels.sessions.sizes import memory_bytes
from dspex_kernels.sessions.tasks import Tasks
from dspex_kernels.sessions.tenure import Tenure

LOG_INTERVAL = 10.0
"""Seconds between two looks at the sizes of the kernels' logs."""
PROVISIONER = "dspex-forkserver"
"""The entry point of the provisioner whose kernels are forked, and end with their service, however it ends."""
PING_TIMEOUT = 10.0
"""Seconds in which a kernel must answer a ping; control is answered while everything computes, but a machine that
is overloaded may take its time."""
MAX_LAG = 5.0
"""Seconds after which a kernel whose command loop does not come round counts as hung."""
SUSPICION_AFTER = 2.0
"""Seconds after a call's end that was not its own: by then its program has ended, or counts as stuck."""
MAX_PORT_ATTEMPTS = 3
"""Starts of a kernel one of whose ports another process has taken (jupyter_client#487)."""
SETTLED_NS = 2_000_000_000
"""Age of a kernelspec's file from which it is remembered."""
PORT_TAKEN = "Address already in use"
SOCKETS_PREFIX = "dspex-"
SOCKET_NAME = 8
"""Characters of a kernel's own in its sockets' paths."""
MAX_SOCKET_PATH = 107
"""Bytes of the longest path that a socket may have (unix(7))."""
READ_INTERVAL = 2.0
"""Seconds between two readings of the kernels' memory."""
SHUTDOWN_TIMEOUT = 15.0
"""Seconds for one kernel to end: Jupyter asks, terminates and kills within ten."""
STOP_TIMEOUT = 30.0
"""Seconds for all kernels that are being ended or started: the guardian answers each launch within that."""
GUARDIAN_TIMEOUT = 20.0
"""Seconds for the guardian to end: it gives up on what cannot be killed before that."""


@dataclass(eq=False)
class Kernel:
    """A kernel of ours, from before its start until it is buried. Made by ``Kernels.start_kernel``."""

    whose: str
    """For messages and logs: "session 's'", "the pool"."""
    log_path: Path
    """Its stdout and stderr; the log of its predecessor is beside it with ``.1``."""
    link: Path | None
    """Where a link to its connection file is kept while it lives; None is nowhere."""
    backend: str
    """For which backend it runs."""
    died: Callable[[Kernel, str], None]
    """Called once, on the event loop, when its process ended unasked after its start: with one line how."""
    kernel_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    started_at: float = 0.0
    """When it answered, on the loop's clock."""
    pid: int | None = None
    """None where that is on another machine or unknown."""
    connection_file: str = ""
    memory_bytes: int = 0
    """Resident memory when it was last looked at."""
    ready: bool = False
    """It has answered."""
    ending: bool = False
    """Its end is known: asked for, or noticed."""
    death: str | None = None
    """How its process ended, when it was not asked to."""
    spare: bool = False
    """It is nobody's yet."""
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    """What it was given."""
    cwd: str = ""
    _renaming: asyncio.Task[None] | None = None
    """Gives its files the names of somebody's."""
    _log_moved: bool = False
    """Its log has its owner's name; what had it before is beside it."""
    _connection: KernelConnection | None = None
    _unwatch: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def connection(self) -> KernelConnection:
        """Its channels, from its launch on."""
        assert self._connection is not None
        return self._connection


class KnownKernelSpecs(KernelSpecManager):
    """Looks a kernelspec up once: Jupyter lists a dozen directories before each start.

    A file that changes is read again, at the place where it was found; one that is installed before it on the path
    is found when the service starts anew.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._known: dict[str, tuple[KernelSpec, int]] = {}

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """Called by Jupyter before each start.

        Raises:
            NoSuchKernel: There is none of that name.
        """
        with contextlib.suppress(KeyError, OSError):
            known, changed_at = self._known[kernel_name]
            if _changed_at(known) == changed_at:
                return copy.deepcopy(known)
        found = super().get_kernel_spec(kernel_name)
        with contextlib.suppress(OSError):  # a kernel without a file: found again each time
            changed_at = _changed_at(found)
            if time.time_ns() - changed_at > SETTLED_NS:  # else it may have changed since it was read
                self._known[kernel_name] = copy.deepcopy(found), changed_at
        return found


def _changed_at(spec: KernelSpec) -> int:
    return (Path(spec.resource_dir) / "kernel.json").stat().st_mtime_ns


class GuardedKernelManager(AsyncKernelManager):
    """Starts its kernel below the service's guardian, whatever provisioner the kernelspec names."""

    service_id = Unicode("", help="Whose guardian; empty leaves the kernelspec as it is.").tag(config=True)
    sockets_dir = Unicode("", help="Where ipc sockets are; empty is beside the connection file.").tag(config=True)
    _spec: tuple[KernelSpec, KernelSpec] | None = None
    """The kernelspec as it was found, and as it is used."""

    @default("transport")
    def _default_transport(self) -> str:
        # Nobody else's: tcp would leave them to every user of the machine but for the key, and takes ports.
        return "ipc" if self.sockets_dir else "tcp"

    def _ip_default(self) -> str:
        if self.transport == "ipc" and self.sockets_dir:
            return f"{self.sockets_dir}/{uuid.uuid4().hex[:SOCKET_NAME]}"
        return str(super()._ip_default())

    @property
    def kernel_spec(self) -> Any:
        """Called by Jupyter before each start."""
        spec = super().kernel_spec
        if not self.service_id or spec is None:
            return spec
        if self._spec is None or self._spec[0] is not spec:
            self._spec = spec, self._guarded(spec)
        return self._spec[1]

    def _guarded(self, spec: KernelSpec) -> KernelSpec:
        guarded = copy.copy(spec)
        given = {"service_id": self.service_id, "remove_paths": [self.sockets_dir] if self.sockets_dir else []}
        provisioner = {"provisioner_name": PROVISIONER, "config": given}
        guarded.metadata = {**spec.metadata, "kernel_provisioner": provisioner}
        return guarded

    async def _async_start_kernel(
        self, *, connection_file: str, log: asyncio.Task[IO[bytes]], **kwargs: Any
    ) -> None:
        """Called by Jupyter. Its own sleeps for 10 ms in the end, for its tests' sake.

        Args:
            connection_file: Where it is to be.
            log: Where its stdout and stderr go; it may be opened meanwhile.
            **kwargs: Jupyter's own.
        """
        self.connection_file = connection_file
        self._attempted_start = True
        self._ready = asyncio.get_running_loop().create_future()
        try:
            command, options = await self._async_pre_start_kernel(**kwargs)
            options |= {"stdout": await asyncio.shield(log), "stderr": subprocess.STDOUT}
            await self._async_launch_kernel(command, **options)
            await self._async_post_start_kernel(**options)
        except Exception as failure:
            self._ready.set_exception(failure)
            raise
        self._ready.set_result(None)

    start_kernel = _async_start_kernel

    async def _async_post_start_kernel(self, **kwargs: Any) -> None:
        """Called by Jupyter after the launch. Its control socket is connected when the kernel is shut down.

        For each of a thousand kernels that is two descriptors less; there is no restarter either.
        """
        await self.provisioner.post_launch(**kwargs)

    post_start_kernel = _async_post_start_kernel


class Kernels(LoggingConfigurable):
    """The kernels of a service, on a private ``AsyncMultiKernelManager``.

    Args:
        kernel_name: The kernelspec's name.
        policy: The LM policy that kernels are told.
        listeners: Are told of kernels that start and die; None is nobody.
        limits: The providers' limits that kernels are told; None is none.
        limits_dir: Where they share what they have used of them; made by ``start``. None shares nothing.
        environment: What kernels inherit; None is this process's environment.
        max_starting: Kernels that start at the same time; others wait. None is twice the processors.
        **kwargs: For traitlets: ``parent``, ``config``, ``log``. ``KernelManager.transport`` and
            ``.transport_encryption`` are read from the configuration as Jupyter does.
    """

    def __init__(
        self,
        *,
        kernel_name: str,
        policy: config.LMPolicy,
        listeners: Listeners | None = None,
        limits: config.ProviderLimits | None = None,
        limits_dir: Path | None = None,
        environment: Mapping[str, str] | None = None,
        max_starting: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.kernel_name = kernel_name
        self._policy = policy
        self._listeners = listeners or Listeners(self.log)
        self._living: dict[str, Kernel] = {}
        """The kernels that answer."""
        self._read_at = -READ_INTERVAL
        self._limits = limits
        self._limits_dir = limits_dir
        self._environment = environment
        self._starting = asyncio.Semaphore(max_starting or 2 * (os.cpu_count() or 1))
        self._tasks = Tasks(self.log)
        self._context: zmq.asyncio.Context | None = None
        self._multi: Any = None
        self._guardian: Any = None
        self._sockets_dir: str | None = None
        self._cutting: asyncio.Task[None] | None = None

    async def start(self, tenure: Tenure | None = None, services: Path | None = None) -> None:
        """Make ready to start kernels.

        Args:
            tenure: Whose lock shall be held until the last kernel is gone; begun already. None leaves kernels to
                the kernelspec's own provisioner.
            services: Where services have their directories, which tell what to end after a crash; with ``tenure``.
        """
        if tenure is not None:
            assert services is not None
            self._guardian = await _open_guardian(tenure, services)
        raise_open_files()
        runtime_dir = Path(jupyter_runtime_dir())
        await asyncio.to_thread(runtime_dir.mkdir, mode=0o700, parents=True, exist_ok=True)
        self._sockets_dir = await asyncio.to_thread(make_sockets_dir) if self._guardian is not None else None
        if self._limits_dir is not None:
            await asyncio.to_thread(self._limits_dir.mkdir, mode=0o700, parents=True, exist_ok=True)
        self._context = new_context()
        self._multi = AsyncMultiKernelManager(
            parent=self,
            context=self._context,
            connection_dir=str(runtime_dir),
            kernel_spec_manager=KnownKernelSpecs(parent=self),
            # Not the default, AsyncIOLoopKernelManager: that one brings the restarter.
            kernel_manager_class=f"{GuardedKernelManager.__module__}.{GuardedKernelManager.__qualname__}",
            config=self._manager_config(tenure),
        )
        self._cutting = asyncio.create_task(self._cut_logs())

    def _manager_config(self, tenure: Tenure | None) -> Config:
        settings = Config(self.config)
        if tenure is not None and self._guardian is not None:
            settings.GuardedKernelManager.service_id = tenure.service_id
            settings.GuardedKernelManager.sockets_dir = self._sockets_dir or ""
        return settings

    async def stop(self) -> None:
        """Wait until every kernel is gone. The backends end their own before; those that are left are killed."""
        closed = errors.ServiceClosed("the session service is closing")
        try:
            if self._cutting is not None:
                self._cutting.cancel()
                await asyncio.wait({self._cutting})
            await asyncio.gather(*(self.end(kernel, closed, now=True) for kernel in list(self._living.values())))
            await self._finish_tasks(STOP_TIMEOUT)
        finally:
            if self._context is not None:
                self._context.destroy(linger=0)
            if self._guardian is not None:
                await self._stop_guardian()
            if self._sockets_dir is not None:
                with contextlib.suppress(FileNotFoundError):  # the guardian was quicker
                    await asyncio.to_thread(os.rmdir, self._sockets_dir)
            await self._finish_tasks(0.0)

    async def _finish_tasks(self, timeout: float) -> None:
        """Wait for what is under way, and for what that begins; end what does not end by itself."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while (running := self._tasks.running) and (left := deadline - loop.time()) > 0:
            await asyncio.wait(running, timeout=left)
        if running := self._tasks.running:
            self.log.warning("%d starts or ends of kernels were not over within %g s", len(running), timeout)
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=SHUTDOWN_TIMEOUT)

    async def _stop_guardian(self) -> None:
        stopped = asyncio.wrap_future(self._guardian.stop())
        await asyncio.wait({stopped}, timeout=GUARDIAN_TIMEOUT)
        if not stopped.done():
            self.log.warning("the kernels' guardian did not end within %g s", GUARDIAN_TIMEOUT)
        elif (failure := stopped.exception()) is not None:
            self.log.warning("the kernels' guardian broke: %s", failure)

    async def _cut_logs(self) -> None:
        while True:
            await asyncio.sleep(LOG_INTERVAL)
            await asyncio.to_thread(kernel_log.cut_logs, [kernel.log_path for kernel in self._living.values()])

    async def start_kernel(
        self,
        *,
        whose: str,
        backend: str,
        env: Mapping[str, str],
        log_path: Path,
        timeout: float,
        died: Callable[[Kernel, str], None],
        link: Path | None = None,
        on_reply: ReplyListener | None = None,
        max_pending: int = MAX_PENDING,
        spare: bool = False,
    ) -> Kernel:
        """Start a kernel and wait until it answers.

        Args:
            whose: For messages and logs: "session 's'", "the pool".
            backend: For which backend.
            env: Variables that it gets beside what kernels inherit.
            log_path: Where its stdout and stderr go; the file's predecessor is kept with ``.1``.
            timeout: Seconds in which it must answer, from its launch on; its turn to start does not count.
            died: Called once, on the event loop, if its process ends unasked; whoever waited for an answer has
                been told by then, and the kernel is buried by itself.
            link: Where to keep a link to its connection file; None is nowhere.
            on_reply: As ``KernelConnection`` takes it.
            max_pending: As ``KernelConnection`` takes it.
            spare: Whether it is nobody's until ``hand_over``: nobody else finds it.

        Raises:
            KernelStartFailed: It did not come up; nothing is left of it.
            NotADSPexKernel: It is another kind of kernel; nothing is left of it.
        """
        attempts = MAX_PORT_ATTEMPTS
        while True:
            attempts -= 1
            kernel = Kernel(whose, log_path, link, backend, died, spare=spare)
            began = asyncio.get_running_loop().time()
            try:
                async with self._starting:
                    await self._start(kernel, env, timeout, on_reply, max_pending)
            except errors.KernelStartFailed as failed:
                # Jupyter chooses ports before the kernel binds them: another process may be quicker.
                if not attempts or PORT_TAKEN not in failed.details["log_tail"]:
                    raise
                self.log.info("%s: a port of its kernel was taken meanwhile; it is started again", whose)
                continue
            self._living[kernel.kernel_id] = kernel
            kernel.started_at = asyncio.get_running_loop().time()
            self._listeners.tell(
                KernelStarted(backend=backend, kernel_id=kernel.kernel_id, duration_s=kernel.started_at - began)
            )
            return kernel

    async def _start(
        self,
        kernel: Kernel,
        env: Mapping[str, str],
        timeout: float,
        on_reply: ReplyListener | None,
        max_pending: int,
    ) -> None:
        """Launch a kernel and wait until it answers; what does not come up is cleared away."""
        try:
            async with asyncio.timeout(timeout):
                await self._launch(kernel, env, on_reply, max_pending)
                await kernel.connection.identify(timeout=timeout)
            _check_alive(kernel)
            kernel.ready = True  # from now on ``died`` tells
        except BaseException as failure:
            failed = await self._start_failed(kernel, failure, timeout)
            if failed is None:
                raise
            raise failed from failure

    def was_forked(self, kernel: Kernel) -> bool:
        """Whether a kernel was forked from a warm process, which still is what it was then."""
        return not kernel.ending and getattr(
            self._multi.get_kernel(kernel.kernel_id).provisioner, "is_current", False
        )

    def is_current(self, kernel: Kernel, env: Mapping[str, str]) -> bool:
        """Whether a spare kernel is what one that is forked now would be.

        Args:
            kernel: Which.
            env: As ``start_kernel`` took it.
        """
        is_same = kernel.environment == self._env(kernel, env) and kernel.cwd == os.getcwd()  # noqa: PTH109  # a text
        return is_same and self.was_forked(kernel)

    async def hand_over(self, kernel: Kernel, whose: str, log_path: Path, link: Path) -> None:
        """Give a spare kernel's files the names of somebody's.

        Args:
            kernel: Which.
            whose: As ``start_kernel`` takes it, as the next two.
            log_path: Where its log belongs.
            link: Where to keep a link to its connection file.

        Raises:
            OSError: They cannot have them.
        """
        manager = self._multi.get_kernel(kernel.kernel_id)
        hidden, log = kernel.connection_file, kernel.log_path
        kernel.spare, kernel.whose, kernel.log_path, kernel.link = False, whose, log_path, link
        kernel.connection_file = manager.connection_file = self.connection_file(kernel.kernel_id)
        kernel._renaming = self._tasks.spawn(asyncio.to_thread(_rename_files, kernel, Path(hidden), log))
        await asyncio.shield(kernel._renaming)

    async def take_back(self, kernel: Kernel) -> None:
        """End a kernel that could not become somebody's; its owner's files are as they were."""
        kernel.ending = True
        if kernel._renaming is not None:
            await asyncio.wait({kernel._renaming}, timeout=SHUTDOWN_TIMEOUT)  # a thread cannot be cancelled
        if kernel._log_moved:
            await asyncio.to_thread(kernel_log.unmove_log, kernel.log_path)
        await self.end(kernel, errors.ServiceClosed("this kernel was nobody's"), now=True)

    async def end(self, kernel: Kernel, error: errors.DSPexError, *, now: bool = False) -> None:
        """End a kernel on request; who waits for it is answered with ``error``.

        Args:
            kernel: Which.
            error: What its callers are told.
            now: Whether to kill it, where it would not listen.
        """
        kernel.ending = True
        if kernel._connection is not None:
            kernel._connection.fail_all(lambda _: error)
        await self._tasks.finish(self._bury(kernel, now=now))

    async def interrupt(self, kernel: Kernel) -> None:
        """Interrupt what a kernel runs, as Jupyter does."""
        with contextlib.suppress(KeyError):  # it is gone already
            await self._multi.interrupt_kernel(kernel.kernel_id)

    async def kill(self, kernel: Kernel) -> None:
        """Kill a kernel that will not end otherwise: it counts as died, and ``died`` is called."""
        with contextlib.suppress(KeyError):  # it is gone already
            await self._multi.get_kernel(kernel.kernel_id).signal_kernel(signal.SIGKILL)

    def memory_bytes(self, backend: str) -> int:
        """Resident memory of a backend's kernels, all together, as it was when it was last read.

        Called by ``health_check``. Reading a thousand kernels' takes 20 ms, so a thread does it now and then.
        """
        now = asyncio.get_running_loop().time()
        if now - self._read_at >= READ_INTERVAL:
            self._read_at = now
            self._tasks.spawn(asyncio.to_thread(_read_memory, list(self._living.values())))
        return sum(kernel.memory_bytes for kernel in self._living.values() if kernel.backend == backend)

    async def why_sick(self, kernel: Kernel) -> str:
        """One line why a kernel cannot go on; "" where it can, or has ended. Notes its memory."""
        try:
            told = await kernel.connection.request("ping", timeout=PING_TIMEOUT)
        except errors.CommandTimeout:
            return f"it did not answer a ping within {PING_TIMEOUT:g} s"
        except errors.DSPexError:
            return ""  # it died, or is being ended: that is somebody else's to see
        try:
            memory, lag, stuck = int(told["memory_bytes"]), float(told["lag_s"]), int(told["stuck"])
        except (KeyError, TypeError, ValueError, OverflowError):  # its owner's code may have changed what it says
            return "its answer to a ping cannot be read"
        kernel.memory_bytes = memory
        if lag > MAX_LAG:
            return f"its command loop has not come round for {lag:.1f} s"
        if stuck:
            return f"a program ignores its end ({stuck} calls)"
        return ""

    async def _launch(
        self, kernel: Kernel, env: Mapping[str, str], on_reply: ReplyListener | None, max_pending: int
    ) -> None:
        """Start the process, watch it, and open the connection to it."""
        kernel.connection_file = self.connection_file(kernel.kernel_id, spare=kernel.spare)
        kernel.environment, kernel.cwd = self._env(kernel, env), os.getcwd()  # noqa: PTH109  # a text
        opening = self._tasks.spawn(asyncio.to_thread(_make_files, kernel))
        starting = self._tasks.spawn(
            self._multi.start_kernel(
                kernel_name=self.kernel_name,
                kernel_id=kernel.kernel_id,
                env=kernel.environment,
                connection_file=kernel.connection_file,
                log=opening,
            )
        )
        starting.add_done_callback(lambda _: opening.add_done_callback(_close_result))
        try:
            # Never cancelled halfway: Jupyter would lose sight of a process that runs already.
            await asyncio.shield(starting)
        except BaseException:
            await asyncio.wait({opening}, timeout=SHUTDOWN_TIMEOUT)  # what it makes is to be cleared away too
            raise
        manager = self._multi.get_kernel(kernel.kernel_id)
        kernel.pid = manager.provisioner.pid if isinstance(manager.provisioner, LocalProvisioner) else None
        if kernel.spare:
            manager.provisioner.remember([self.connection_file(kernel.kernel_id)])  # what it will have
        kernel._connection = KernelConnection(
            manager.get_connection_info(),
            context=self._context,
            name=kernel.kernel_id,
            on_reply=on_reply,
            max_pending=max_pending,
            may_restart=False,
            on_late=lambda: self._listeners.tell(ReplyLate(backend=kernel.backend, kernel_id=kernel.kernel_id)),
        )
        await kernel._connection.open()
        self._watch(kernel, manager.provisioner)

    def connection_file(self, kernel_id: str, *, spare: bool = False) -> str:
        """Where Jupyter has it; a spare kernel's is where Jupyter's clients do not look for it."""
        if spare:
            return f"{self.spares_dir}/spare-{kernel_id}.connection"  # the guardian has records there, in .json
        return f"{self._multi.connection_dir}/kernel-{kernel_id}.json"

    @property
    def spares_dir(self) -> Path | None:
        """Where files of kernels are that are nobody's yet: the service's own, which its guardian clears away.

        None where there is no guardian.
        """
        return self._guardian.directory if self._guardian is not None else None

    async def _start_failed(
        self, kernel: Kernel, failure: BaseException, timeout: float
    ) -> errors.KernelError | None:
        """Clear away what was started. The error to raise; None when ``failure`` itself is to pass."""
        kernel.ending = True
        tail = await asyncio.to_thread(kernel_log.read_tail, kernel.log_path) if kernel.spare else None
        await self._tasks.finish(self._bury(kernel, now=True))
        if isinstance(failure, errors.NotADSPexKernel) or not isinstance(failure, Exception):
            return None
        if tail is None:  # else it is gone by now
            tail = await asyncio.to_thread(kernel_log.read_tail, kernel.log_path)
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
            f"{kernel.whose}: kernel {self.kernel_name!r} did not start: {why}{last}",
            details={"whose": kernel.whose, "kernel_name": self.kernel_name, "log_tail": tail},
        )

    def _env(self, kernel: Kernel, env: Mapping[str, str]) -> dict[str, str]:
        source = dict(os.environ if self._environment is None else self._environment)
        told = {config.ENV_PROVIDER_LIMITS: self._limits.to_json()} if self._limits is not None else {}
        if self._limits_dir is not None:
            told[config.ENV_LIMITS_DIR] = str(self._limits_dir)
        return {
            **kernel_environment(source, self._policy),
            **told,
            config.ENV_KERNEL_ID: kernel.kernel_id,
            config.ENV_LM_POLICY: self._policy.to_json(),
            **env,
        }

    def _watch(self, kernel: Kernel, provisioner: Any) -> None:
        """Have ``_died`` called when the kernel's process ends."""
        # Another provisioner's pid may be another machine's, and another's child: it knows better.
        if type(provisioner) is LocalProvisioner and hasattr(os, "pidfd_open"):
            loop = asyncio.get_running_loop()
            descriptor = os.pidfd_open(provisioner.pid)
            kernel._unwatch.callback(os.close, descriptor)
            loop.add_reader(descriptor, lambda: self._died(kernel, _exit_of(descriptor)))
            kernel._unwatch.callback(loop.remove_reader, descriptor)
        else:
            task = self._tasks.spawn(self._wait_for_end(kernel, provisioner))
            kernel._unwatch.callback(task.cancel)

    async def _wait_for_end(self, kernel: Kernel, provisioner: Any) -> None:
        try:
            how = _exit_by(await provisioner.wait())
        except Exception:  # a provisioner may raise anything; a kernel that nobody watches would fail all its calls
            self.log.exception("%s: kernel %s cannot be watched", kernel.whose, kernel.kernel_id)
            how = "cannot be watched any more"
        self._died(kernel, how)

    def _died(self, kernel: Kernel, how: str) -> None:
        """The kernel's process has ended, and nobody asked for it unless ``ending``."""
        kernel._unwatch.close()
        if kernel.ending:
            return
        kernel.death = how
        kernel.connection.fail_all(lambda row: _kernel_died(kernel, row))
        if not kernel.ready:
            return  # start_kernel() waits for its answer, and clears away
        kernel.ending = True
        self.log.warning("%s: kernel %s %s", kernel.whose, kernel.kernel_id, how)
        self._tasks.spawn(self._bury(kernel, now=True))
        self._listeners.tell(KernelDied(backend=kernel.backend, kernel_id=kernel.kernel_id, how=how))
        kernel.died(kernel, how)

    async def _bury(self, kernel: Kernel, *, now: bool) -> None:
        """Take everything of a kernel away: watch, sockets, process group, connection file."""
        self._living.pop(kernel.kernel_id, None)
        kernel._unwatch.close()
        if kernel._connection is not None:
            await kernel._connection.close()
        try:
            if kernel.kernel_id in self._multi or kernel.kernel_id in self._multi._pending_kernels:
                async with asyncio.timeout(SHUTDOWN_TIMEOUT):
                    await self._multi.shutdown_kernel(kernel.kernel_id, now=now)
        except Exception:  # a provisioner may raise anything, and the others are to be buried too
            self.log.exception("%s: kernel %s could not be ended", kernel.whose, kernel.kernel_id)
        finally:
            self._multi._pending_kernels.pop(kernel.kernel_id, None)
            # Jupyter leaves it when the launch itself failed.
            _remove_files(kernel, Path(self.connection_file(kernel.kernel_id, spare=kernel.spare)))


def make_sockets_dir() -> str | None:
    """A new private directory (0700) for ipc sockets, whose paths must be short; None where they would not be."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    longest = f"{base}/{SOCKETS_PREFIX}xxxxxxxx/{'x' * SOCKET_NAME}"
    if len(os.fsencode(config.road_path(longest))) > MAX_SOCKET_PATH or not os.access(base, os.W_OK):
        return None
    return tempfile.mkdtemp(prefix=SOCKETS_PREFIX, dir=base)


def raise_open_files() -> None:
    """Let this process open as many files as it may: three for each kernel, where systems begin with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _close_result(opening: asyncio.Task[IO[bytes]]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _check_alive(kernel: Kernel) -> None:
    """Refuse a kernel that answered with its last breath: its end may be noticed before its answer is looked at."""
    if kernel.death is not None:
        raise _kernel_died(kernel, None)


def _read_memory(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        if kernel.pid is not None:
            kernel.memory_bytes = memory_bytes(kernel.pid)


def _kernel_died(kernel: Kernel, row: Command | None) -> errors.KernelDied:
    command = row.name if row is not None else "kernel_info"
    return errors.KernelDied(
        f"{kernel.whose}: kernel {kernel.kernel_id} {kernel.death} during {command}; programs are kept, and the "
        "next call brings a new kernel",
        retryable=row is not None and row.repeatable,
        details={"kernel_id": kernel.kernel_id, "command": command},
    )


def _exit_of(descriptor: int) -> str:
    """How the process behind a pidfd ended, without reaping it: that is the provisioner's."""
    try:
        ended = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # reaped already, or another process's child
        return "ended"
    if ended is None:
        return "ended"
    return _exit_by(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)


def _exit_by(code: int | None) -> str:
    """How a process ended, by its exit code; negative for a signal."""
    if code is None:
        return "ended"
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # most of the real-time signals have no name
        return f"was killed by signal {-code}"


async def _open_guardian(tenure: Tenure, services: Path) -> Any:
    """The process below which the service's kernels live; None where there can be none.

    Reached by its entry point: how kernels are born is not this layer's.
    """
    found = entry_points(group="jupyter_client.kernel_provisioners", name=PROVISIONER)
    if not found:
        raise errors.KernelStartFailed(
            f"no kernel provisioner {PROVISIONER!r}: install dspex-kernels in this environment, not from a path"
        )
    provisioner = await asyncio.to_thread(next(iter(found)).load)
    return await provisioner.open_guardian(tenure.service_id, services, lease=tenure.lock)


def _make_files(kernel: Kernel) -> IO[bytes]:
    """Open a kernel's log, and point the link to its connection file, which may come later."""
    log = kernel_log.open_log(kernel.log_path)
    if kernel.link is not None:
        try:
            _link(kernel.link, kernel.connection_file)
        except BaseException:
            log.close()
            raise
    return log


def _rename_files(kernel: Kernel, hidden: Path, log: Path) -> None:
    """Give a kernel's log and connection file the names that it has for them now."""
    assert kernel.link is not None
    try:
        kernel_log.move_log(log, kernel.log_path)
        kernel._log_moved = True
        _move(hidden, Path(kernel.connection_file))
        _link(kernel.link, kernel.connection_file)
    finally:
        for path in (hidden, log):  # where that failed
            path.unlink(missing_ok=True)


def _move(source: Path, target: Path) -> None:
    """Rename a file that only its user may read; copied where that is another file system."""
    try:
        source.rename(target)
    except OSError as failure:
        if failure.errno != errno.EXDEV:
            raise
        with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123  # a descriptor
            file.write(source.read_bytes())
        source.unlink()


def _remove_files(kernel: Kernel, connection_file: Path) -> None:
    """Remove what a kernel leaves; its log stays with whom it was."""
    connection_file.unlink(missing_ok=True)
    if kernel.spare:
        kernel.log_path.unlink(missing_ok=True)
    link = kernel.link
    if link is not None and link.is_symlink() and not link.exists():  # else it is the next kernel's already
        link.unlink()


def _link(link: Path, connection_file: str) -> None:
    """Point the link to this connection file; the one it pointed to is a dead kernel's whose service died too."""
    if link.is_symlink():
        link.readlink().unlink(missing_ok=True)
        link.unlink()
    link.symlink_to(connection_file)
