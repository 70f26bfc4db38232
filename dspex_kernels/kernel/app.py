"""The kernel application: opens the session, puts our parts into DSPy, and wires the kernel together."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import dspy
import zmq
from dspy.dsp.utils.settings import main_thread_config
from ipykernel import kernelapp
from ipykernel.kernelapp import IPKernelApp
from jupyter_client.session import Session, new_id, new_id_bytes
from jupyter_core.paths import jupyter_data_dir
from tornado.ioloop import IOLoop
from traitlets import Float, TraitError, default
from traitlets.config import Config, catch_config_error
from zmq.eventloop.zmqstream import ZMQStream

from dspex_kernels import config, errors, logs
from dspex_kernels.kernel import rehearsal
from dspex_kernels.kernel.calls import SETTING, Call
from dspex_kernels.kernel.dispatch import CommandThread, Dispatcher, Identity
from dspex_kernels.kernel.iopub import CountingIOPubThread
from dspex_kernels.kernel.journal import Journal
from dspex_kernels.kernel.kernel import DSPexKernel
from dspex_kernels.kernel.lms import cache, gate, history
from dspex_kernels.kernel.lms.endpoints import Endpoints, read_limits
from dspex_kernels.kernel.namespaces import Namespace
from dspex_kernels.kernel.notebook import magics
from dspex_kernels.kernel.road import Road
from dspex_kernels.kernel.shelf import Shelf
from dspex_kernels.kernel.threads import MAX_THREADS_ALONE, Threads
from dspex_kernels.kernel.wires import Wires
from dspex_kernels.protocol.commands import AdoptSessionArgs, OpenSessionArgs
from dspex_kernels.protocol.names import is_session_id
from dspex_kernels.protocol.records import SessionContents

MAX_AGE_DAYS = 30
"""Days after which the directory of a notebook's kernel that ended without a shutdown is removed."""


CHANNELS = ("shell", "iopub", "stdin", "hb", "control")
ASIDE = "dspex-aside-"
"""Of the names of sockets that are nobody's yet. ZMQ removes them by these names at the end, in whatever directory
the kernel is in then: they must be nobody else's."""

GC_THRESHOLDS = (10_000, 20, 20)
"""For the garbage collector. What a prediction makes dies by itself; looking for the rest as often as Python does
unasked (700, 10, 10) takes a tenth of the time of predictions side by side."""

END_TIMEOUT = 5.0
"""Seconds for the control thread to end: it answers its last message."""


class DSPexKernelApp(IPKernelApp):
    """``python -m dspex_kernels.kernel -f CONNECTION_FILE``: stock options and behaviour, and commands.

    Whose kernel it is stands in the environment (``dspex_kernels.config``). Without it (picked in a notebook) the
    session's id is made from the connection file's path, which a restart keeps, so that programs come back.
    """

    name = "dspex-kernel"

    heartbeat_interval = Float(
        10.0,
        min=0.01,
        help="Seconds of silence after which a running command reports that it lives: a third of a culler's "
        "timeout, at most.",
    ).tag(config=True)

    kernel_class = DSPexKernel
    road: Road | None = None

    lean = False
    """Whether it does without what only notebooks expect: ``DSPEX_LEAN``, read when the application starts."""

    bound: Callable[[], None] | None = None
    """Called once Jupyter's channels are bound. Set by who waits for that."""

    _wires: Wires | None = None
    """Of a lean kernel."""
    _aside: str | None = None
    """Where they are bound while it stands by."""
    _is_prepared = False

    _commands: CommandThread | None = None
    _binding = threading.Lock()

    _built_with: Config | None = None
    """The configuration of the kernel that is built; None while there is none."""

    @catch_config_error
    def initialize(self, argv: list[str] | None = None) -> None:
        """Start up, or say in one line why not, and exit."""
        gc.set_threshold(*GC_THRESHOLDS)  # before what a notebook's user has run first, who may know better
        try:
            self.lean = _flag(config.ENV_LEAN, default="0")
            self._take_environment()
            if self.lean:
                self._initialize_lean(argv)
            else:
                super().initialize(argv)
        except errors.DSPexError as refusal:
            self.log.critical("this kernel cannot start: %s", refusal.message)
            self.exit(1)
        except zmq.ZMQError as failure:
            # Not exit(): closing would wait for ever for the sockets of threads that have not begun.
            self.log.critical("this kernel cannot start: a port cannot be bound: %s", failure)
            for stream in (sys.__stdout__, sys.__stderr__):
                if stream is not None:
                    stream.flush()
            os._exit(1)

    def _initialize_lean(self, argv: list[str] | None) -> None:
        """As stock, without what only notebooks expect: a profile, its configuration, a poller, a debugger."""
        self.parse_command_line(argv)
        if os.path.isabs(self.connection_file):  # noqa: PTH117  # else Jupyter's own is looked for: 0.4 ms
            self.connection_dir = os.path.dirname(self.connection_file)  # noqa: PTH120  # a text too
        self.init_connection_file()
        self.init_sockets()
        if self.bound is not None:
            self.bound()
        if not self._is_prepared:
            self._prepare()
        self.init_kernel()
        self.init_path()
        self.init_shell()
        self.init_gui_pylab()
        if not self.shell.extension_manager.loaded:  # else the template has
            self.init_extensions()
        if self.hide_initial_ns:
            self.shell.user_ns_hidden.update(self.shell.user_ns)

    def park(self, is_wanted: Callable[[], bool]) -> None:
        """Make and try ahead what a lean kernel needs. Called in a child that stands by, before ``initialize``.

        Its channels are bound in the current directory, which has to stay until they are renamed.

        Args:
            is_wanted: Whether somebody waits now.
        """
        self._aside = os.getcwd()  # noqa: PTH109  # a path's text
        self._wires = Wires(self.session)
        self._wires.start(_bind_aside)
        self._commands = CommandThread()
        self._commands.start()
        self.journals.submit(int)  # an executor starts its thread with the first work
        self._prepare()
        for read, name in ((_read_policy, config.ENV_LM_POLICY), (read_limits, config.ENV_PROVIDER_LIMITS)):
            with contextlib.suppress(ValueError, TypeError, TraitError):  # it is refused when it is its own
                read(os.environ.get(name) or "{}")
        if not is_wanted():
            rehearsal.warm(is_wanted, self._commands)

    def _prepare(self) -> None:
        """Do what asks for no more than the channels."""
        self._is_prepared = True
        wires = self._wires
        assert wires is not None
        self.shell_socket, self.stdin_socket, self.control_socket = wires.shell, wires.stdin, wires.control
        self.control_thread, self.shell_channel_thread = wires.control_thread, wires.shell_channel_thread
        self.iopub_thread, self.iopub_socket = wires.iopub_thread, wires.iopub_thread.background_socket
        self.configure_tornado_logger()
        self.init_crash_handler()
        self.init_blackhole()
        self.init_io()
        self.init_signal()
        self._build()
        self._connect_kernel(wires.shell_stream, wires.control_stream)
        # Made when they are first asked for, else: a loop, and four sockets.
        IOLoop.current()
        assert self.shell_channel_thread.manager is not None

    def build(self) -> None:
        """Build the kernel and its shell, as far as that takes no environment, no directory and no socket.

        Called in a fork server, for whichever kernel will be forked; else with the rest of ``initialize``.
        """
        self.init_pdb()
        self._built_with = deepcopy(self.config)
        # A copy: the shell writes into it (ipykernel's help for tqdm), and the application would warn of that.
        own = deepcopy(self.config)
        kernel = self.kernel_class.instance(
            parent=self, config=own, log=self.log, session=self.session, user_ns=self.user_ns
        )
        shell = kernel.shell
        shell.configurables.append(self)
        shell.push({"dspy": dspy}, interactive=False)
        shell.set_custom_exc((errors.CallStopped,), _show_stopped)
        magics.load(shell, kernel.asker)
        self.kernel, self.shell = kernel, shell
        self.journals = ThreadPoolExecutor(1, thread_name_prefix="dspex-journal")
        logs.install(self._named_call)

    def _build(self) -> None:
        """Build the kernel, where that is not done, or what its user configured was not known then."""
        if self._built_with == self.config:
            return
        if self._built_with is not None:
            atexit.unregister(self.shell.atexit_operations)
            type(self.shell).clear_instance()
            type(self.kernel).clear_instance()
        self.build()

    # The steps of ``initialize``, in the order in which IPython and ipykernel call them

    def _take_environment(self) -> None:
        """Undo what was read or opened when the application was made, perhaps in a fork server."""
        self.session.username = os.environ.get("USER", "username")
        self.session.session = new_id()
        self.session.key = new_id_bytes()  # unless the connection file names one
        self.session.pid = os.getpid()
        self.parent_handle = int(os.environ.get("JPY_PARENT_PID") or 0)
        for handler in self.log.handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.__stderr__)  # what stands by has redirected the other

    @default("session")
    def _default_session(self) -> Session:
        # It guards against replayed requests; the default of 65,536 grows to 8 MB in each kernel.
        return Session(parent=self, digest_history_size=4096)

    def parse_command_line(self, argv: list[str] | None = None) -> None:
        """Read the arguments. Where there are none, nothing: stock flattens the tree of all classes even so.

        That takes 10 ms, and copies a thousand pages in a kernel that was forked.
        """
        if argv is None or argv:
            super().parse_command_line(argv)

    def _bind_socket(self, s: zmq.Socket[bytes], port: int) -> int:
        """Called with each socket before it is bound: no reply is dropped because its reader is slow."""
        if s.socket_type == zmq.ROUTER:
            s.sndhwm = 0  # as in ``make_router``
        bound: int = super()._bind_socket(s, port)
        return bound

    def init_iopub(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Called with the other sockets: from the first subscription on, count who listens."""
        # Swapped for this moment: replaced later, the thread would have seen subscriptions that nobody counted.
        stock, kernelapp.IOPubThread = kernelapp.IOPubThread, CountingIOPubThread
        try:
            super().init_iopub(context)
        finally:
            kernelapp.IOPubThread = stock

    def init_io(self) -> None:
        """Called when all channels are bound; a lean kernel does not watch what libraries write to descriptors."""
        if self._wires is not None:
            self.capture_fd_output = False
        elif self.bound is not None:
            self.bound()
        super().init_io()

    def init_sockets(self) -> None:
        """Called first: bind Jupyter's channels, and our own beside them."""
        if self.lean:
            self._bind_wires()
        else:
            super().init_sockets()
        self.road = Road.bind(self)

    def _bind_wires(self) -> None:
        stood_by = self._wires is not None
        wires = self._wires = self._wires or Wires(self.session)
        self.context = wires.context
        atexit.register(self.close)
        if self.transport == "tcp" and self.curve_secretkey is None:
            self.log.warning("this kernel runs over tcp without encryption: others may read what is said to it")
        if self._take_names():
            return
        if stood_by:
            wires.bind(self._bind_channel)
        else:
            wires.start(self._bind_channel)
        self.write_connection_file()

    def _take_names(self) -> bool:
        """Rename the sockets of a kernel that stood by. False where they have to be bound anew.

        Who connects looks for the name, and finds the socket; binding five takes 7 ms.
        """
        if self._aside is None or self.transport != "ipc" or self.curve_secretkey is not None:
            return False
        ports = {channel: getattr(self, f"{channel}_port") for channel in CHANNELS}
        if not all(ports.values()):
            return False
        try:
            for channel, port in ports.items():
                os.rename(f"{self._aside}/{ASIDE}{channel}", f"{self.ip}-{port}")  # noqa: PTH104  # no files
        except OSError as failure:  # they are on another file system
            self.log.debug("the sockets are bound anew: %s", failure)
            return False
        self._ports = ports
        return True

    def _bind_channel(self, channel: str, socket: zmq.Socket[bytes]) -> None:
        """Called for each channel of a lean kernel, in the thread that will read it."""
        port = f"{channel}_port"
        with self._binding:  # over ipc a free "port" is looked for, and taken when it is bound
            self._apply_curve_server_options(socket)
            if self._aside is not None:
                socket.unbind(_aside(channel))
            self._ports[channel] = self._bind_socket(socket, getattr(self, port))
            setattr(self, port, self._ports[channel])

    def close(self) -> None:
        """Called at the process's end: the context waits for sockets that are not closed."""
        if self.road is not None:
            self.road.close()
        if self._wires is not None:
            self._end_control()
            self._wires.close_heart()
        super().close()

    def start(self) -> None:
        """Be the kernel until it is shut down."""
        super().start()
        # Before iopub ends, which is at exit: what control answered last flushes the output, and would wait for
        # iopub for ten seconds.
        self._end_control()

    def _end_control(self) -> None:
        if self.control_thread.is_alive():
            self.control_thread.stop()
            self.control_thread.join(END_TIMEOUT)

    def init_kernel(self) -> None:
        """Called once the sockets are bound: build the dispatcher, and make the kernel that is built its own."""
        self.policy, identity = self._policy(), self._identity()  # first: what is refused has opened nothing
        self.threads = Threads()
        self.shelf = Shelf()
        thread = self._commands or CommandThread()
        self.dispatcher = Dispatcher(
            identity,
            open_namespace=self._open_namespace,
            thread=thread,
            threads=self.threads,
            heartbeat_interval=self.heartbeat_interval,
        )
        self.dispatcher.clients = self.iopub_thread.clients
        gate.install(thread.loop, self.policy, Endpoints.from_environment())
        history.install()
        cache.install()
        # The first thread that configures owns DSPy's settings: it must be the one where cells run.
        dspy.configure()
        if self._wires is None:
            self._build()
            self._start_channels()
        self.kernel.attach(self.dispatcher, self.road)
        # Those of the template were asked for before; in a notebook's kernel anything may have added its own.
        logs.install(self._named_call, *(["tornado"] if self.lean else []))
        self.kernel.record_ports({f"{name}_port": port for name, port in self._ports.items()})
        self.displayhook.get_execution_count = lambda: self.kernel.execution_count
        signal.signal(signal.SIGINT, self.kernel.on_sigint)

    def _start_channels(self) -> None:
        """As stock does it."""
        shell_stream = ZMQStream(self.shell_socket, self.shell_channel_thread.io_loop)
        self.shell_channel_thread.shell_stream = shell_stream
        control_stream = ZMQStream(self.control_socket, self.control_thread.io_loop)
        debugpy_stream = ZMQStream(self.debugpy_socket, self.control_thread.io_loop)
        self.control_thread.start()
        self.shell_channel_thread.start()
        self._connect_kernel(shell_stream, control_stream, debugpy_stream)

    def _connect_kernel(
        self, shell_stream: ZMQStream, control_stream: ZMQStream, debugpy_stream: ZMQStream | None = None
    ) -> None:
        self.kernel.connect(
            session=self.session,
            control_stream=control_stream,
            debugpy_stream=debugpy_stream,
            debug_shell_socket=self.debug_shell_socket,
            shell_stream=shell_stream,
            control_thread=self.control_thread,
            shell_channel_thread=self.shell_channel_thread,
            iopub_thread=self.iopub_thread,
            iopub_socket=self.iopub_socket,
            stdin_socket=self.stdin_socket,
        )

    def init_shell(self) -> None:
        """Called after the kernel: settle the shell in this process, and give cells their session."""
        if self.lean:
            self.shell.settle(history=False)
        else:
            self.kernel.profile_dir = self.profile_dir
            self.shell.settle(self.profile_dir, history=True)
        if self.dispatcher.identity.session_id is not None:
            self._give_cells(self.dispatcher.namespace(None))
        elif _flag(config.ENV_SPARE, default="0"):
            self.dispatcher.adopt = self._adopt

    def _adopt(self, args: AdoptSessionArgs) -> None:
        """Called in a spare kernel, in place of what ``initialize`` does in others. Nobody else waits meanwhile."""
        if self.dispatcher.last_activity is not None:
            raise errors.SessionMismatch("this spare kernel has been used by somebody: end it")
        told = {
            config.ENV_SESSION_ID: args.session_id,
            config.ENV_SESSION_DIR: args.directory,
            config.ENV_GENERATION: str(args.generation),
        }
        os.environ.update(told)
        identity = replace(
            self.dispatcher.identity, session_id=args.session_id, generation=args.generation, is_spare=False
        )
        try:
            namespace = self.dispatcher.adopted(identity)
        except BaseException:
            for name in told:
                del os.environ[name]
            raise
        self._give_cells(namespace)
        del os.environ[config.ENV_SPARE]
        self.connection_file = sys.argv[-1] = args.connection_file

    @staticmethod
    def _give_cells(namespace: Namespace) -> None:
        """Have cells run as their session's."""
        main_thread_config[SETTING] = Call(namespace)
        namespace.restore_settings()

    def forget_session(self) -> None:
        """Called when the kernel is shut down for good: a session that no service owns ends with it."""
        if config.ENV_SESSION_DIR not in os.environ and self.dispatcher.identity.session_id is not None:
            shutil.rmtree(self._directory(self.dispatcher.identity.session_id), ignore_errors=True)

    def _identity(self) -> Identity:
        path = Path(self.abs_connection_file)
        kernel_id = os.environ.get(config.ENV_KERNEL_ID) or path.stem.removeprefix("kernel-")
        generation = os.environ.get(config.ENV_GENERATION) or "1"
        if not (generation.isdecimal() and int(generation) > 0):
            raise errors.InvalidSession(f"{config.ENV_GENERATION}={generation!r}: give a whole number from 1")
        if _flag(config.ENV_SPARE, default="0"):
            allow_code = _flag(config.ENV_ALLOW_CODE, default="1")
            return Identity(kernel_id, None, allow_code=allow_code, is_spare=True)
        if os.environ.get(config.ENV_BACKEND) == "pooled":
            return Identity(kernel_id, None, int(generation), allow_code=False)
        session_id = os.environ.get(config.ENV_SESSION_ID)
        if session_id is None:
            session_id = f"session_{sha256(str(path).encode()).hexdigest()[:16]}"
        elif not is_session_id(session_id):
            raise errors.InvalidSession(f"{config.ENV_SESSION_ID}={session_id!r} cannot be a session's id")
        return Identity(
            kernel_id, session_id, int(generation), allow_code=_flag(config.ENV_ALLOW_CODE, default="1")
        )

    @staticmethod
    def _policy() -> config.LMPolicy:
        text = os.environ.get(config.ENV_LM_POLICY) or "{}"
        try:
            return _read_policy(text)
        except (ValueError, TypeError, TraitError) as failure:
            raise errors.InvalidLMProfile(
                f"{config.ENV_LM_POLICY} is no LM policy ({failure}): give what LMPolicy.to_json writes"
            ) from failure

    def _open_namespace(self, session_id: str, opened: OpenSessionArgs | None) -> Namespace:
        if opened is not None:
            return Namespace(
                session_id,
                lane=self.threads.lane(),
                shelf=self.shelf,
                policy=self.policy,
                executor=self.journals,
                contents=opened.contents,
                shares_process=True,
                generation=opened.generation,
                created_at=opened.created_at,
            )
        journal, contents = self._open_journal(session_id)
        if journal is not None:
            self.journals.submit(journal.settle)  # what fails then fails the first change
        return Namespace(
            session_id,
            lane=self.threads.lane(MAX_THREADS_ALONE),
            shelf=self.shelf,
            policy=self.policy,
            executor=self.journals,
            journal=journal,
            contents=contents,
            generation=self.dispatcher.identity.generation,
        )

    def _open_journal(self, session_id: str) -> tuple[Journal | None, SessionContents]:
        directory = self._directory(session_id)
        if config.ENV_SESSION_DIR in os.environ:
            return Journal.open(directory)
        try:
            opened = Journal.open(directory)
        except errors.StoreError as refusal:
            # A notebook without a writable home is still worth a kernel; a service's session is not.
            self.log.warning("programs of this kernel will not survive its restart: %s", refusal)
            return None, SessionContents()
        _sweep(directory.parent)
        return opened

    def _named_call(self) -> logs.Named | None:
        """The call of the running code, in threads that DSPy gives its settings only."""
        call = gate.current_call()
        if call is None or call.request_id is None:  # a cell
            return None
        return logs.Named(call.namespace.session_id, call.request_id, self.dispatcher.identity.kernel_id)

    @staticmethod
    def _directory(session_id: str) -> Path:
        given = os.environ.get(config.ENV_SESSION_DIR)
        return Path(given) if given else Path(jupyter_data_dir()) / "dspex" / "kernels" / session_id


@functools.cache
def _read_policy(text: str) -> config.LMPolicy:
    return config.LMPolicy.from_json(text)


def _aside(channel: str) -> str:
    return f"ipc://{ASIDE}{channel}"  # relative: the directory's path may be too long for a socket


def _bind_aside(channel: str, socket: zmq.Socket[bytes]) -> None:
    socket.bind(_aside(channel))


def _flag(variable: str, *, default: str) -> bool:
    value = os.environ.get(variable) or default
    if value not in ("0", "1"):
        raise errors.InvalidSession(f"{variable}={value!r}: give 0 or 1")
    return value == "1"


def _show_stopped(
    shell: object, _etype: type, value: errors.CallStopped, _tb: object, tb_offset: object = None
) -> None:
    """Show what stopped a cell's LM request as the error it is."""
    error = value.error
    shell._showtraceback(type(error), error, [f"{error.code}: {error.message}"])  # type: ignore[attr-defined]  # IPython's own hook


def _sweep(directory: Path) -> None:
    """Remove what notebook kernels that were killed left long ago."""
    oldest = time.time() - MAX_AGE_DAYS * 86400
    for session in directory.iterdir():
        try:
            if max(path.stat().st_mtime for path in (session, *session.iterdir())) >= oldest:
                continue
            journal, _ = Journal.open(session, lock_timeout=0)
        except (errors.DSPexError, OSError):
            continue  # a kernel that is long idle holds it, or another one sweeps it now
        shutil.rmtree(session, ignore_errors=True)
        journal.close()
