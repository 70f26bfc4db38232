"""A real kernel and the plainest client of it: stock jupyter_client, raw messages, every reply kept."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from pathlib import Path
from typing import IO, Any, Self

from jupyter_client.manager import KernelManager

from tests.waiting import wait_for


def plugin_path() -> str:
    """The ``PYTHONPATH`` with which a kernel finds the plugin beside this file, as if it were installed."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parent / "plugin"), os.environ.get("PYTHONPATH")]))


class LiveKernel:
    """A kernel started by stock jupyter_client, asked with raw messages.

    Replies and iopub messages are kept by the id of the request they answer, so that a test can have many
    requests open and count what came.
    """

    def __init__(
        self,
        kernel_name: str = "dspex",
        *,
        env: dict[str, str] | None = None,
        output: IO[bytes] | None = None,
        arguments: list[str] | None = None,
        **manager: Any,
    ) -> None:
        self.manager = KernelManager(kernel_name=kernel_name, **manager)
        self._env = env or {}
        self._output = output
        self._arguments = arguments or []
        self.replies: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.iopub: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self.manager.start_kernel(
            env={**os.environ, **self._env},
            extra_arguments=self._arguments,
            stdout=self._output,
            stderr=self._output,
        )
        try:
            self._connect()
        except BaseException:
            self.manager.shutdown_kernel(now=True)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=not self.manager.is_alive())
        self.manager.cleanup_resources()
        self.manager.context.destroy(linger=0)
        if self._output is not None:
            self._output.close()

    def _connect(self) -> None:
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def restart(self) -> None:
        """Restart as a front end does: same connection file."""
        self.client.stop_channels()
        self.manager.restart_kernel(now=True)
        self._connect()

    @property
    def pid(self) -> int:
        return int(self.manager.provisioner.pid)

    def send(
        self, command: str, args: dict[str, Any] | None = None, *, control: bool = False, **content: Any
    ) -> str:
        """Send a command; returns the message's id."""
        return self.send_raw({"command": command, "args": args or {}, **content}, control=control)

    def send_raw(self, content: Any, *, msg_type: str = "dspex_request", control: bool = False) -> str:
        message = self.client.session.msg(msg_type, content)
        (self.client.control_channel if control else self.client.shell_channel).send(message)
        return str(message["header"]["msg_id"])

    def execute(self, code: str, **options: Any) -> str:
        """Send a cell; returns the message's id."""
        return str(self.client.execute(code, **options))

    def pump(self) -> None:
        """Take in whatever has arrived."""
        for channel in (self.client.shell_channel, self.client.control_channel):
            while channel.msg_ready():
                message = channel.get_msg(timeout=1)
                self.replies[message["parent_header"].get("msg_id", "")].append(message)
        while self.client.iopub_channel.msg_ready():
            self.iopub.append(self.client.iopub_channel.get_msg(timeout=1))

    def reply(self, message_id: str, *, deadline: float = 20.0) -> dict[str, Any]:
        """The content of the reply to a message."""
        return wait_for(
            lambda: self.pump() or self.replies.get(message_id), deadline=deadline, what=f"reply {message_id}"
        )[0]["content"]

    def ask(self, command: str, args: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        """A command's reply content."""
        return self.reply(self.send(command, args, **options))

    def result(self, command: str, args: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        """A command's result; fails the test on any other answer."""
        answer = self.ask(command, args, **options)
        assert answer["status"] == "ok", answer
        return dict(answer["result"])

    def open_session(self, session_id: str, contents: dict[str, Any] | None = None, generation: int = 1) -> None:
        """Let a session into a pooled kernel, as its service does."""
        args = {"session_id": session_id, "contents": contents or {}, "generation": generation}
        args["created_at"] = "2026-01-01T00:00:00Z"
        self.result("open_session", args, session_id=session_id)

    def error(self, command: str, args: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        """A command's error; fails the test when it went well."""
        answer = self.ask(command, args, **options)
        assert answer["status"] != "ok", answer
        return dict(answer["error"])

    def run(self, code: str, *, deadline: float = 20.0) -> dict[str, Any]:
        """Run a cell; its reply's content. Fails the test when the cell failed."""
        answer = self.reply(self.execute(code), deadline=deadline)
        assert answer["status"] == "ok", answer
        return answer

    def of(self, message_id: str, msg_type: str) -> list[dict[str, Any]]:
        """The iopub messages of that type which a request caused, as far as they have arrived."""
        self.pump()
        return [
            m
            for m in self.iopub
            if m["parent_header"].get("msg_id") == message_id and m["header"]["msg_type"] == msg_type
        ]

    def output(self, message_id: str, name: str = "stdout") -> str:
        """What a request printed, as far as it has arrived."""
        return "".join(m["content"]["text"] for m in self.of(message_id, "stream") if m["content"]["name"] == name)

    def wait_for_state(self, message_id: str, state: str) -> dict[str, Any]:
        """The first status message of a request with that state."""
        return wait_for(
            lambda: [m for m in self.of(message_id, "status") if m["content"]["execution_state"] == state],
            what=f"status {state}",
        )[0]

    def interrupt(self) -> float:
        """SIGINT, as a front end's stop button; returns when it was sent."""
        sent = time.monotonic()
        self.manager.interrupt_kernel()
        return sent
