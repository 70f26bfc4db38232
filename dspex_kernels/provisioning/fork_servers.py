"""The fork servers of a guardian, and the kernels that stand by: who wants one gets it at once.

Theory of operation. A fork server can fork what would be started by the same interpreter with the same flags, the
same module and the same variables that are read on import: its *origin*. It is started when the first kernel of its
origin is wanted, which waits for it. From then on some kernels are forked ahead: they are handed out at once, and
replaced one at a time while nobody waits for a fork, so that who wants kernels never competes with those that will
be wanted. They are nobody's until then: no listing, no culler, no owner knows them.

Whatever goes wrong here costs time, not the kernel: the caller starts it plainly.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from dspex_kernels import config, logs, room

if TYPE_CHECKING:
    from dspex_kernels.provisioning.guardian_client import GuardedProcess, Guardian

FORK_SERVER = "dspex_kernels.provisioning.forkserver"
MAX_SERVERS = 4
"""Fork servers of one guardian: each has some 100 MB."""
ROOM = "." * 256
"""A word of its command line that is there to be overwritten: a forked kernel shows its own."""
MAX_FAILURES = 3
"""Fork servers of one origin that may end before they can fork; after that its kernels are started plainly."""
MAX_STILLBORN = 3
"""Kernels in a row that may die while they stand by; after that none is forked ahead until one is wanted."""

REFILL_AFTER = 0.15
"""Seconds after which a kernel is forked in the place of one that was taken: sooner it would take a processor from
that one's first moments (a sixth of a session's creation, on two)."""

_READ_ON_IMPORT = (
    *("PYTHON", "LD_", "MALLOC_", "GLIBC_", "LC_", "XDG_", "SSL_", "REQUESTS_", "CURL_"),
    *("JUPYTER_", "IPYTHON", "PYDEVD_", "DEBUGPY_", "MPL"),
    *("DSPY_", "LITELLM_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "TIKTOKEN_"),
    *("OMP_", "OPENBLAS_", "MKL_", "NUMEXPR_"),
)
"""What the names of variables begin with that libraries read when they are imported."""
_ALSO_READ = (
    *("HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "USER", "LOGNAME"),
    *(config.ENV_LEAN, config.ENV_LM_POLICY, config.ENV_PROVIDER_LIMITS),  # what a kernel makes ready standing by
)
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIALS")
"""Words in the names of variables that no fork server sees, whoever may read them on import."""

_log = logs.get_logger(__name__)


class NoFork(Exception):
    """A kernel cannot be forked; the message says why."""


@dataclass(frozen=True)
class Origin:
    """What a fork server is started with, and so all that it forks.

    Attributes:
        interpreter: The interpreter and its flags.
        module: What follows ``-m``.
        environment: The variables that are read on import, in order.
    """

    interpreter: tuple[str, ...]
    module: str
    environment: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, argv: Sequence[str], env: Mapping[str, str]) -> Self:
        """The origin of a kernel that would be started so.

        Raises:
            NoFork: It is no ``PYTHON [flags] -m MODULE -f FILE``.
        """
        match list(argv):
            case [*interpreter, "-m", module, "-f", _] if interpreter and _are_flags(interpreter[1:]):
                read = ((name, value) for name, value in env.items() if _is_read_on_import(name))
                return cls(tuple(interpreter), module, tuple(sorted(read)))
        raise NoFork("its command is not PYTHON [flags] -m MODULE -f FILE")

    @property
    def imports_from_cwd(self) -> bool:
        """Whether its kernels find modules in their directory, as ``python -m`` has it."""
        flags = "".join(flag[1:] for flag in self.interpreter[1:] if not flag.startswith("-X"))
        return not ({"P", "I"} & set(flags) or dict(self.environment).get("PYTHONSAFEPATH"))

    def command(self, directory: Path) -> list[str]:
        """The fork server's. It never finds modules in its directory: that is no kernel's.

        Args:
            directory: Its service's.
        """
        return [*self.interpreter, "-P", "-m", FORK_SERVER, f"{self.module}.template", str(directory), ROOM]


def _are_flags(words: Sequence[str]) -> bool:
    # Not "-X opt" and "-W arg" in two words, nor "-c": nobody writes them so in a kernelspec.
    return all(
        word.startswith("-") and not word.startswith("--") and word not in ("-X", "-W", "-c") for word in words
    )


def _is_read_on_import(name: str) -> bool:
    is_secret = any(word in name.upper() for word in _SECRET)
    return not is_secret and (name.startswith(_READ_ON_IMPORT) or name in _ALSO_READ)


class ForkServer:
    """The fork server of one origin, started anew when it is lost or out of date; and the kernels that stand by.

    Its methods are called from any thread, its callbacks in the guardian's.
    """

    def __init__(self, guardian: Guardian, origin: Origin) -> None:
        self._guardian = guardian
        self._origin = origin
        self._lock = threading.RLock()  # of all below: a future that is done calls back at once, where it is asked
        self._process: Future[GuardedProcess] | None = None
        self._sources: dict[str, tuple[int, int] | None] = {}
        self._failures = 0
        self._refused = ""
        self._standby: deque[GuardedProcess] = deque()
        self._wanted = 0
        """How many shall stand by."""
        self._forking = 0
        """Kernels that somebody waits for."""
        self._will_refill = self._is_refilling = False
        self._stillborn = 0
        self._retired = 0
        """How often it was."""

    @property
    def pid(self) -> int | None:
        """Its process id; None where it does not run just now."""
        process = self._process
        is_there = process is not None and process.done() and process.exception() is None
        return process.result().pid if process is not None and is_there else None

    @property
    def standby(self) -> list[int]:
        """Process ids of the kernels that stand by."""
        with self._lock:
            return [kernel.pid for kernel in self._standby if kernel.poll() is None]

    def take(self, standby: int) -> Future[GuardedProcess]:
        """A kernel that waits to be assigned.

        Args:
            standby: How many shall stand by from now on.

        Returns:
            The kernel. The future fails with NoFork where this origin cannot be forked, with an OSError where no
            process is to be had, and with KernelStartFailed where the guardian is lost.
        """
        with self._lock:
            self._check_sources()
            self._wanted, self._stillborn = standby, 0
            while self._standby:
                kernel = self._standby.popleft()
                if kernel.poll() is None:
                    return _done(kernel)
            self._forking += 1
        taken: Future[GuardedProcess] = Future()
        taken.set_running_or_notify_cancel()
        taken.add_done_callback(self._taken)
        self._fork_into(taken)
        return taken

    @property
    def age(self) -> int:
        """Changes when what its kernels have loaded is out of date."""
        with self._lock:
            self._check_sources()
            return self._retired

    def refill(self) -> None:
        """Have kernels forked ahead again, soon. Called when one that was taken is bound, or is lost."""
        with self._lock:
            if not self._will_refill:
                self._will_refill = True
                self._guardian.call_later(self, REFILL_AFTER, self._refill_now)

    def _refill_now(self) -> None:
        with self._lock:
            self._will_refill = False
            self._refill()

    def _taken(self, _: Future[GuardedProcess]) -> None:
        with self._lock:
            self._forking -= 1

    def _fork_into(self, forked: Future[GuardedProcess], tries: int = MAX_FAILURES) -> None:
        """Fork a kernel, after starting the fork server where there is none."""
        try:
            with self._lock:
                starting = self._start()
        except Exception as failure:  # noqa: BLE001  # whatever it is, the one who waits is told
            forked.set_exception(failure)
            return

        def fork(started: Future[GuardedProcess]) -> None:
            if (failure := started.exception()) is not None:
                forked.set_exception(failure)
            else:
                _follow(started.result().fork, tell)

        def tell(kernel: GuardedProcess | None, failure: BaseException | None) -> None:
            if kernel is not None:
                forked.set_result(kernel)
            elif isinstance(failure, ConnectionError) and tries > 1:  # the fork server has just died
                self._ended(starting)
                self._fork_into(forked, tries - 1)
            else:
                forked.set_exception(failure)

        starting.add_done_callback(fork)

    def _start(self) -> Future[GuardedProcess]:
        """The fork server that can fork, or will soon."""
        if self._refused:
            raise NoFork(self._refused)
        if self._process is not None:
            return self._process
        ready: Future[GuardedProcess] = Future()
        ready.set_running_or_notify_cancel()
        self._process = ready
        path = {name: os.environ[name] for name in ("PATH",) if name in os.environ}
        launching = self._guardian.launch(
            self._origin.command(self._guardian.directory),
            env={**path, **dict(self._origin.environment)},
            cwd="/",
            stdout=subprocess.DEVNULL,
            forks=True,
        )
        launching.add_done_callback(lambda launched: self._launched(launched, ready))
        return ready

    def _launched(self, launched: Future[GuardedProcess], ready: Future[GuardedProcess]) -> None:
        if (failure := launched.exception()) is not None:
            self._failed(ready, f"it cannot be run: {failure}", is_final=isinstance(failure, OSError))
            return
        process = launched.result()
        process.template.add_done_callback(lambda _: self._told(process, ready))
        process.ended.add_done_callback(lambda _: self._ended(ready))

    def _told(self, process: GuardedProcess, ready: Future[GuardedProcess]) -> None:
        told = process.template.result()
        if "sources" not in told:
            self._failed(ready, told.get("refused") or told["lost"], is_final="refused" in told)
            return
        with self._lock:
            self._failures = 0
            self._sources = {path: _state(path) for path in told["sources"]}
        ready.set_result(process)

    def _failed(self, ready: Future[GuardedProcess], why: str, *, is_final: bool) -> None:
        with self._lock:
            self._failures += 1
            if is_final or self._failures >= MAX_FAILURES:
                self._refused = why
                _log.warning(
                    "kernels of module %s are started plainly: its fork server says: %s", self._origin.module, why
                )
            if self._process is ready:
                self._process = None
        ready.set_exception(NoFork(why))

    def _ended(self, ready: Future[GuardedProcess]) -> None:
        """Its kernels live on, those that stand by too; the next one who wants a kernel brings a new one."""
        with self._lock:
            if self._process is ready:
                self._process = None

    def _check_sources(self) -> None:
        """Start over where what it has built is out of date: what stands by is as well."""
        if all(_state(path) == state for path, state in self._sources.items()):
            return
        _log.info("the fork server of module %s is out of date: it is started anew", self._origin.module)
        self.retire()

    def retire(self) -> None:
        """End it, and the kernels that stand by. Who waits has a kernel all the same, of a new one."""
        with self._lock:
            self._sources, self._wanted = {}, 0
            self._retired += 1
            retired, self._process = self._process, None
            standby = list(self._standby)
            self._standby.clear()
        if retired is not None:
            retired.add_done_callback(_end)
        for kernel in standby:
            kernel.send_signal(signal.SIGKILL)

    def _refill(self) -> None:
        """Have one more kernel stand by, unless somebody waits for a fork."""
        alive = [kernel for kernel in self._standby if kernel.poll() is None]
        is_enough = len(alive) >= self._wanted or self._stillborn >= MAX_STILLBORN
        if self._is_refilling or self._forking or is_enough or not room.is_there():
            return
        self._is_refilling = True
        forked: Future[GuardedProcess] = Future()
        forked.set_running_or_notify_cancel()
        retired = self._retired
        forked.add_done_callback(lambda forked: self._refilled(forked, retired))
        self._fork_into(forked)

    def _refilled(self, forked: Future[GuardedProcess], retired: int) -> None:
        with self._lock:
            self._is_refilling = False
            if (failure := forked.exception()) is not None:
                # Nobody waits for it: the next one who wants a kernel is told.
                _log.debug("no kernel of module %s was forked ahead: %s", self._origin.module, failure)
                return
            kernel = forked.result()
            if retired != self._retired or len(self._standby) >= self._wanted:  # since it was asked for
                kernel.send_signal(signal.SIGKILL)
                return
            self._standby.append(kernel)
            kernel.ended.add_done_callback(lambda _: self._died(kernel))
            self._refill()

    def _died(self, kernel: GuardedProcess) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._standby.remove(kernel)  # else it was handed out, and its death is its owner's to see
            self._stillborn += 1
            self._refill()


def _state(path: str) -> tuple[int, int] | None:
    """What changes when a file does; None where there is none."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _follow(
    ask: Callable[[], Future[GuardedProcess]], tell: Callable[[GuardedProcess | None, BaseException | None], None]
) -> None:
    """Ask for a process, and tell which it is, or why there is none."""

    def answered(answer: Future[GuardedProcess]) -> None:
        failure = answer.exception()
        tell(None if failure is not None else answer.result(), failure)

    try:
        asked = ask()
    except Exception as failure:  # noqa: BLE001  # whatever it is, the one who waits is told
        tell(None, failure)
    else:
        asked.add_done_callback(answered)


def _end(started: Future[GuardedProcess]) -> None:
    if started.exception() is None:
        started.result().send_signal(signal.SIGKILL)


def _done(kernel: GuardedProcess) -> Future[GuardedProcess]:
    future: Future[GuardedProcess] = Future()
    future.set_result(kernel)
    return future


class ForkServers:
    """The fork servers of a guardian, by what they are started with; the least used is ended for one too many."""

    def __init__(self, guardian: Guardian) -> None:
        self._guardian = guardian
        self._lock = threading.Lock()
        self._servers: OrderedDict[Origin, ForkServer] = OrderedDict()

    def of(self, origin: Origin) -> ForkServer:
        """The fork server of that origin; it runs when the first kernel is taken."""
        with self._lock:
            server = self._servers.setdefault(origin, ForkServer(self._guardian, origin))
            self._servers.move_to_end(origin)
            retired = self._servers.popitem(last=False)[1] if len(self._servers) > MAX_SERVERS else None
        if retired is not None:
            retired.retire()
        return server

    def all(self) -> list[ForkServer]:
        """Those that were used last, at most ``MAX_SERVERS``."""
        with self._lock:
            return list(self._servers.values())
