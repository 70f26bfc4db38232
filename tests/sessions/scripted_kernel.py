"""A kernel's sockets without a kernel: real ZMQ, real signatures, answers as the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Self

import zmq
import zmq.asyncio
from jupyter_client.session import Session as MessageSession

from dspex_kernels import config
from dspex_kernels.streams import StreamListener

Answer = Callable[["ScriptedKernel", dict[str, Any]], Awaitable[dict[str, Any] | None]]
"""Takes the kernel and a request's message; returns the reply's content, or None for silence."""

ABOUT = {
    "session_id": "s1",
    "protocol_version": "1.0",
    "backend": "dedicated",
    "kernel_id": "scripted",
    "generation": 1,
}


def ok(result: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"status": "ok", "result": result or {}}


def failed(error: dict[str, Any], status: str = "error", **told: Any) -> dict[str, Any]:
    return {"status": status, "ename": "E", "evalue": "e", "traceback": [], "error": error, **told}


async def echo(kernel: ScriptedKernel, message: dict[str, Any]) -> dict[str, Any] | None:
    return ok({"args": message["content"]["args"]})


class ScriptedKernel:
    """Listens on shell, control and iopub, each request answered by a task of its own.

    Args:
        answer: What it answers to ``dspex_request``.
        features: Its ``supported_features``.
        about: Its ``kernel_info_reply``'s ``dspex``.
        curve: Whether it encrypts.
        transport: ``tcp`` or ``ipc``.
        ip: For ipc, the sockets' path without the port.
        road: Whether it has a channel of its own, which it tells of.
    """

    def __init__(
        self,
        answer: Answer = echo,
        *,
        features: tuple[str, ...] = ("dspex",),
        about: dict[str, Any] | None = None,
        curve: bool = False,
        transport: str = "tcp",
        ip: str = "127.0.0.1",
        road: bool = False,
    ) -> None:
        self._answer = answer
        self._features = features
        self.about = about or ABOUT
        self._has_road = road
        self._curve = zmq.curve_keypair() if curve else None
        self._transport, self._ip = transport, ip
        self.session = MessageSession(key=b"a key of the test's own")
        self.requests: list[dict[str, Any]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._sockets: dict[str, zmq.asyncio.Socket] = {}
        self._listeners: dict[str, StreamListener] = {}
        self._senders: dict[str, Callable[[list[bytes]], Any]] = {}
        """By the id of a request that came over a unix socket: what sends its answers."""

    async def __aenter__(self) -> Self:
        self._context = zmq.asyncio.Context()
        self.connection_info: dict[str, Any] = {
            "transport": self._transport,
            "ip": self._ip,
            "key": self.session.key,
            "signature_scheme": "hmac-sha256",
        }
        if self._curve:
            public, secret = self._curve
            self.connection_info |= {"curve_publickey": public.decode(), "curve_secretkey": secret.decode()}
        for number, (channel, kind) in enumerate(
            {
                "shell": zmq.ROUTER,
                "control": zmq.ROUTER,
                "iopub": zmq.XPUB,
                "stdin": zmq.ROUTER,
                "hb": zmq.REP,
            }.items()
        ):
            self.connection_info[f"{channel}_port"] = self._bind(channel, kind, number + 1)
            if channel in ("shell", "control", "iopub"):
                self._spawn(self._serve(channel))
        if self._has_road:
            self.open_road()
        return self

    def open_road(self, channel: str = "dspex") -> None:
        """Open a channel of its own and tell of it from now on."""
        if self._transport == "ipc" and self._curve is None:
            listener = self._listeners[channel] = StreamListener(config.road_path(self._ip))
            listener.listen(lambda frames, send: self._take(channel, frames, send))
            address = f"unix://{listener.path}"
        else:
            place = self._bind(channel, zmq.ROUTER, 6)
            address = f"ipc://{self._ip}-{place}" if self._transport == "ipc" else f"tcp://0.0.0.0:{place}"
            self._spawn(self._serve(channel))
        self.about = {**self.about, "endpoint": address}

    def close_road(self, channel: str = "dspex") -> None:
        if channel in self._listeners:
            self._listeners.pop(channel).close(linger=0)
        else:
            self._sockets.pop(channel).close(linger=0)

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in list(self._listeners):
            self.close_road(channel)
        self._context.destroy(linger=0)

    def _bind(self, channel: str, kind: int, number: int) -> int:
        socket = self._sockets[channel] = self._context.socket(kind)
        socket.linger = 0
        if self._curve:
            socket.curve_publickey, socket.curve_secretkey = self._curve
            socket.curve_server = True
        if self._transport == "ipc":
            socket.bind(f"ipc://{self._ip}-{number}")
            return number
        return socket.bind_to_random_port(f"tcp://{self._ip}")

    async def _serve(self, channel: str) -> None:
        while channel in self._sockets:
            frames = await self._sockets[channel].recv_multipart()
            if channel == "iopub":
                await self.publish("iopub_welcome", {"subscription": ""}, {})
                continue
            self._take(channel, frames)

    def _take(self, channel: str, frames: list[bytes], send: Callable[[list[bytes]], Any] | None = None) -> None:
        idents, parts = self.session.feed_identities(frames)
        message = self.session.deserialize(parts)
        message["channel"] = channel
        if send is not None:
            self._senders[message["msg_id"]] = send
        self.requests.append(message)
        self._spawn(self._handle(channel, idents, message))

    async def _handle(self, channel: str, idents: list[bytes], message: dict[str, Any]) -> None:
        if message["msg_type"] == "kernel_info_request":
            content: dict[str, Any] | None = {"supported_features": list(self._features), "dspex": self.about}
            await self.reply(channel, idents, message, "kernel_info_reply", content)
            return
        if channel.startswith("dspex") and message["content"]["command"] == "ping":
            self.requests.remove(message)  # the connection's own, by which it makes sure
            await self.reply(channel, idents, message, "dspex_reply", ok({"kernel_id": "scripted"}))
            return
        content = await self._answer(self, {**message, "idents": idents})
        if content is not None:
            await self.reply(channel, idents, message, "dspex_reply", content)

    async def reply(
        self, channel: str, idents: list[bytes], parent: dict[str, Any], msg_type: str, content: Any
    ) -> None:
        message = self.session.msg(msg_type, content, parent=parent)
        frames = [*idents, *self.session.serialize(message)]
        if (send := self._senders.get(parent["msg_id"])) is not None:
            send(frames)
        else:
            await self._sockets[channel].send_multipart(frames)

    async def send_raw(self, channel: str, frames: list[bytes]) -> None:
        await self._sockets[channel].send_multipart(frames)

    async def publish(self, msg_type: str, content: dict[str, Any], parent: dict[str, Any]) -> None:
        message = self.session.msg(msg_type, content, parent=parent)
        await self._sockets["iopub"].send_multipart([b"kernel.scripted.event", *self.session.serialize(message)])

    def _spawn(self, work: Any) -> None:
        self._tasks.add(asyncio.ensure_future(work))
