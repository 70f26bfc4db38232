"""A short kernel's life, lived ahead: what a kernel does for the first time costs, and its forks need not pay.

``warm`` runs commands in the process that forks: modules are imported, validators built, caches filled, code is
specialised by the interpreter. Unless it is given a thread, it makes none, and it leaves none of what it made;
meanwhile it writes to the current directory. A kernel that stands by does it too: its pages are its own then.
``Visitor`` asks a kernel that runs, in a throw-away child, what a person and a service ask one: so a fork server
learns what else is imported.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import dspy
import zmq
from dspy.clients import base_lm, model_metadata
from jupyter_client.connect import write_connection_file
from jupyter_client.session import Session

from dspex_kernels import errors
from dspex_kernels.config import LMPolicy
from dspex_kernels.kernel.dispatch import Ask, CommandThread, Dispatcher, Identity
from dspex_kernels.kernel.journal import Journal
from dspex_kernels.kernel.lms import cache, gate, history
from dspex_kernels.kernel.namespaces import Namespace
from dspex_kernels.kernel.shelf import Shelf
from dspex_kernels.kernel.threads import Threads
from dspex_kernels.protocol.commands import OpenSessionArgs
from dspex_kernels.protocol.messages import REQUEST
from dspex_kernels.protocol.records import SessionContents, Spent

T = TypeVar("T")

SESSION_ID = "session_rehearsal"
OPENED = {"session_id": SESSION_ID, "contents": {}, "generation": 1, "created_at": "2000-01-01T00:00:00Z"}

COMMANDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("configure", {"lm": {"model": "offline/echo"}}),
    ("create_program", {"program_id": "a", "signature": "question -> answer"}),
    ("create_program", {"program_id": "b", "signature": "question -> answer", "module": "ChainOfThought"}),
    ("create_program", {"program_id": "c", "signature": "question: str, n: int -> answers: list[str], ok: bool"}),
    *(("execute_program", {"program_id": "a", "inputs": {"question": f"question {n}"}}) for n in range(10)),
    *(("execute_program", {"program_id": "b", "inputs": {"question": f"question {n}"}}) for n in range(3)),
    ("execute_program", {"program_id": "c", "inputs": {"question": "which?", "n": 2}}),
    ("list_programs", {}),
    ("get_program", {"program_id": "a"}),
    ("get_stats", {}),
    ("inspect_history", {}),
    ("delete_program", {"program_id": "a"}),
    ("execute_program", {"program_id": "a", "inputs": {"question": "gone?"}}),
    ("ping", {}),
)
"""What every session asks, the failure of a program that is gone among it."""

CELLS = (
    "1 + 1",
    "print('printed')",
    "import dspy; dspy.Prediction(answer='shown')",
    "%dspex list",
    "await __import__('asyncio').sleep(0)",
    # What completion needs, and not a completion: with an empty cache, jedi parses Python's own modules for 4 s.
    "import jedi; jedi.Interpreter('', [{}]).get_references",
    "1 / 0",
)
WAIT_MS = 10_000
IP, KEY = "k", b"rehearsal"
"""Of the kernel that rehearses. Its sockets' paths are relative: absolute ones may be too long for them."""


def warm(is_enough: Callable[[], bool] = lambda: False, commands: CommandThread | None = None) -> None:
    """Run commands of a session that is dropped; nothing that they made stays.

    Args:
        is_enough: Asked before each; True leaves the rest out.
        commands: Where they run; it goes on. None is in this thread.

    Raises:
        DependencyMissing: This DSPy has no place for the LM gate.
    """
    remembered = base_lm.GLOBAL_HISTORY
    thread = commands or _make_unstarted()
    take_out = gate.install(thread.loop, LMPolicy())
    history.install()
    cache.install()
    try:
        model_metadata._load()
        asking = _ask_all(thread, is_enough)
        if commands is None:
            thread.loop.run_until_complete(asking)
        else:
            asyncio.run_coroutine_threadsafe(asking, thread.loop).result()
        if not is_enough():
            _write_journal()
    finally:
        base_lm.GLOBAL_HISTORY = remembered
        del vars(dspy)["cache"]
        take_out()
        if commands is None:
            thread.loop.close()


def _make_unstarted() -> CommandThread:
    """A command thread whose loop runs in this one."""
    thread = CommandThread()
    thread.loop.set_default_executor(_InPlace())
    return thread


class _InPlace(ThreadPoolExecutor):
    """Works where it is asked to: asyncio takes no other class for its hops, and a thread must not be left."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as failure:  # noqa: BLE001  # the future's reader gets it
            future.set_exception(failure)
        return future


async def _ask_all(thread: CommandThread, is_enough: Callable[[], bool]) -> None:
    threads, shelf = Threads(), Shelf()

    def open_namespace(session_id: str, opened: OpenSessionArgs | None) -> Namespace:
        return Namespace(
            session_id,
            lane=threads.lane(),
            shelf=shelf,
            policy=LMPolicy(),
            executor=_InPlace(),
            contents=SessionContents(),
            shares_process=True,
        )

    dispatcher = Dispatcher(
        Identity("rehearsal", None, allow_code=False),
        open_namespace=open_namespace,
        thread=thread,
        threads=threads,
        heartbeat_interval=60.0,
    )
    for command, args in (("open_session", OPENED), *COMMANDS, ("close_session", {})):
        if command not in ("open_session", "close_session") and is_enough():
            continue
        answered: asyncio.Future[dict[str, Any]] = thread.loop.create_future()
        content = {"command": command, "args": args, "session_id": SESSION_ID}
        dispatcher.submit(Ask(content, message_id=command, reply=answered.set_result))
        await answered
    await dispatcher._close(errors.KernelDied("the rehearsal is over"))


def _write_journal() -> None:
    with tempfile.TemporaryDirectory(dir=".") as directory:  # who is killed here leaves no more than the directory
        journal, _ = Journal.open(Path(directory) / "session")
        journal.append(Spent())
        journal.close()


def _write_connection_file() -> str:
    """Make one in the current directory, with the sockets beside it; its path."""
    path = str(Path("k.json").absolute())
    channels = ("shell_port", "iopub_port", "stdin_port", "hb_port", "control_port")
    ports = dict(zip(channels, range(1, 6), strict=True))
    write_connection_file(path, transport="ipc", ip=IP, key=KEY, **ports)
    return path


class Visitor(threading.Thread):
    """Asks the kernel of a connection file in a thread of the kernel's own process, and shuts it down.

    Both live in the current directory.
    """

    def __init__(self) -> None:
        super().__init__(name="dspex-visitor", daemon=True)
        self.connection_file = _write_connection_file()
        self._session = Session(key=KEY)

    def run(self) -> None:
        with zmq.Context() as context, self._connect(context, 1) as shell, self._connect(context, 5) as control:
            try:
                self._visit(shell, control)
            finally:
                self._ask(control, "shutdown_request", {"restart": False})

    def _connect(self, context: Any, port: int) -> Any:
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.connect(f"ipc://{IP}-{port}")
        return socket

    def _visit(self, shell: Any, control: Any) -> None:
        self._ask(control, "kernel_info_request", {})
        for channel in (shell, control):
            self._ask(channel, REQUEST, {"command": "ping"})
        for command, args in COMMANDS:
            self._ask(shell, REQUEST, {"command": command, "args": args})
        for code in CELLS:
            self._ask(shell, "execute_request", {"code": code, "silent": False, "allow_stdin": False})
        self._ask(shell, "inspect_request", {"code": "print", "cursor_pos": 5, "detail_level": 0})
        self._ask(shell, "is_complete_request", {"code": "for x in y:"})
        self._ask(shell, "history_request", {"hist_access_type": "tail", "output": False, "raw": True, "n": 1})
        self._ask(shell, "comm_info_request", {})
        self._ask(control, "usage_request", {})

    def _ask(self, socket: Any, msg_type: str, content: dict[str, Any]) -> None:
        message = self._session.msg(msg_type, content)
        self._session.send(socket, message)
        while socket.poll(WAIT_MS):
            _, frames = self._session.feed_identities(socket.recv_multipart())
            if json.loads(frames[2]).get("msg_id") == message["header"]["msg_id"]:
                return
