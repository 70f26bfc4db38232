"""A small OpenAI-compatible provider on loopback: real sockets and real HTTP under ``dspy.LM``, no mock of DSPy.

``dspy.LM("openai/canary-model", api_base=server.api_base, api_key="sk-…")`` talks to it as to any provider. How it
answers is a *behaviour*, which may change while requests run: ``server.behaviour = Hang()``, or for some requests
only: ``server.behave(Status(429), api_key="sk-…")``. Behaviours run on the server's loop, in its own thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import tornado.httpserver
import tornado.iostream
import tornado.netutil
import tornado.web

from tests.lm_answers import canary, compose, read_prompt

__all__ = [
    "Answer",
    "Disconnect",
    "EchoKeyInError",
    "Hang",
    "Hold",
    "Junk",
    "LMServer",
    "NotJSON",
    "RecordedRequest",
    "Sequence",
    "Slow",
    "Status",
    "canary",
]

MODEL = "canary-model"
_BACKLOG = 4096  # 500 clients that connect at once must not meet a full accept queue
_CHUNK = 12  # characters of text in one streamed event
_MESSAGES = {
    400: ("invalid_request_error", "invalid_request"),
    401: ("invalid_request_error", "invalid_api_key"),
    404: ("invalid_request_error", "model_not_found"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "overloaded"),
}


@dataclass
class RecordedRequest:
    """One request as it arrived.

    Attributes:
        arrived_at: ``time.monotonic()`` of its arrival, headers and body complete.
        path: "/v1/chat/completions" or "/v1/models".
        headers: Names lower case.
        body: The parsed JSON body; {} where there is none.
        api_key: The bearer token; "" without one.
        peer_port: The client's port: equal for requests of one connection.
        answered_at: ``time.monotonic()`` when the server was done with it, by an answer or by ``Disconnect``;
            None before.
        disconnected_at: ``time.monotonic()`` when the client closed the socket before that; None when it did not.
    """

    arrived_at: float
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    api_key: str
    peer_port: int
    answered_at: float | None = None
    disconnected_at: float | None = None

    @property
    def prompt(self) -> str:
        """All messages' text, one after another."""
        return "\n".join(str(message.get("content")) for message in self.body.get("messages", []))


class Behaviour(Protocol):
    """How one request is answered."""

    async def respond(self, exchange: Exchange) -> None:
        """Answer it. Called on the server's loop; cancelled when the client leaves or the server closes."""


class Exchange:
    """One request and the means to answer it: what a behaviour is given."""

    def __init__(self, handler: _Completions, request: RecordedRequest) -> None:
        self._handler = handler
        self.request = request

    @property
    def streams(self) -> bool:
        """Whether the client asked for server-sent events."""
        return bool(self.request.body.get("stream"))

    def send(self, status: int, content: str, *, headers: dict[str, str] | None = None) -> None:
        """The whole answer at once."""
        self._handler.set_status(status)
        self._handler.set_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self._handler.set_header(name, value)
        self._handler.write(content)

    def send_error(self, status: int, message: str, *, headers: dict[str, str] | None = None) -> None:
        """An error as OpenAI words it."""
        kind, code = _MESSAGES.get(status, ("server_error", f"http_{status}"))
        error = {"message": message, "type": kind, "param": None, "code": code}
        self.send(status, json.dumps({"error": error}), headers=headers)

    async def send_text(self, text: str, *, stop_after: int | None = None) -> None:
        """The model's text: a completion, or events where the client asked for them.

        Args:
            text: What the model says.
            stop_after: Stop after so many events of text and leave the stream open; None is all.
        """
        if not self.streams:
            self.send(200, json.dumps(completion(self.request.body, text)))
            return
        self._handler.set_header("Content-Type", "text/event-stream")
        for number, event in enumerate(stream_events(self.request.body, text)):
            if stop_after is not None and number > stop_after:  # the first event carries the role, no text
                return
            self._handler.write(f"data: {event}\n\n")
            await self._handler.flush()

    def drop(self) -> None:
        """Close the socket without an answer, or in the middle of one."""
        self._handler.mark_answered()
        self._handler.request.connection.stream.close()  # type: ignore[union-attr]  # HTTP/1 connections have one


@dataclass(frozen=True)
class Answer:
    """The usual: a well-formed answer in the format that the prompt asks for.

    Attributes:
        fields: Values for some of the output fields.
    """

    fields: dict[str, Any] = field(default_factory=dict)

    async def respond(self, exchange: Exchange) -> None:
        request = exchange.request
        await exchange.send_text(compose(request.api_key, read_prompt(request.body), self.fields))


@dataclass(frozen=True)
class Hang:
    """Never answers; with ``after_events``, streams so much and then goes silent."""

    after_events: int | None = None

    async def respond(self, exchange: Exchange) -> None:
        if self.after_events is not None:
            request = exchange.request
            await exchange.send_text(
                compose(request.api_key, read_prompt(request.body)), stop_after=self.after_events
            )
        await asyncio.Event().wait()  # until the client leaves or the server closes


class Hold:
    """Holds every answer back until ``release()``: concurrency without guessing at times."""

    def __init__(self, then: Behaviour | None = None) -> None:
        self._then = then or Answer()
        self._released: concurrent.futures.Future[None] = concurrent.futures.Future()

    def release(self) -> None:
        """Let all held and all later requests be answered. From any thread, any number of times."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self._released.set_result(None)

    async def respond(self, exchange: Exchange) -> None:
        await asyncio.shield(asyncio.wrap_future(self._released))
        await self._then.respond(exchange)


@dataclass(frozen=True)
class Status:
    """An HTTP error.

    Attributes:
        status: 400 to 599.
        message: The error's text.
        retry_after: The ``Retry-After`` header, in seconds; None sends none.
    """

    status: int
    message: str = "the test asked for this error"
    retry_after: float | None = None

    async def respond(self, exchange: Exchange) -> None:
        headers = {} if self.retry_after is None else {"Retry-After": f"{self.retry_after:g}"}
        exchange.send_error(self.status, self.message, headers=headers)


@dataclass(frozen=True)
class Slow:
    """Answers after so many seconds."""

    seconds: float
    then: Behaviour = field(default_factory=Answer)

    async def respond(self, exchange: Exchange) -> None:
        await asyncio.sleep(self.seconds)
        await self.then.respond(exchange)


@dataclass(frozen=True)
class Junk:
    """A well-formed completion whose text is this, whatever format the prompt asks for."""

    text: str

    async def respond(self, exchange: Exchange) -> None:
        await exchange.send_text(self.text)


@dataclass(frozen=True)
class NotJSON:
    """A 200 whose body is no JSON: a proxy's login page."""

    async def respond(self, exchange: Exchange) -> None:
        exchange.send(200, "<html>please log in</html>", headers={"Content-Type": "text/html"})


@dataclass(frozen=True)
class EchoKeyInError:
    """A 401 that repeats the key in clear, as careless providers do: what redaction must survive."""

    async def respond(self, exchange: Exchange) -> None:
        exchange.send_error(401, f"Incorrect API key provided: {exchange.request.api_key}.")


@dataclass(frozen=True)
class Disconnect:
    """Closes the socket without a word."""

    async def respond(self, exchange: Exchange) -> None:
        exchange.drop()


class Sequence:
    """One behaviour per request, in order of arrival; the last one stays."""

    def __init__(self, behaviours: SequenceOf[Behaviour]) -> None:
        self._left = list(behaviours)  # only the server's loop takes from it

    async def respond(self, exchange: Exchange) -> None:
        behaviour = self._left.pop(0) if len(self._left) > 1 else self._left[0]
        await behaviour.respond(exchange)


def usage_of(body: dict[str, Any], text: str) -> dict[str, int]:
    """The tokens of an exchange: a fourth of the characters, at least 1; the same for the same exchange."""
    prompt = max(1, sum(len(str(m.get("content") or "")) for m in body.get("messages", [])) // 4)
    answer = max(1, len(text) // 4)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def completion(body: dict[str, Any], text: str) -> dict[str, Any]:
    """A ``chat.completion`` object, with as many choices as ``n`` asks for."""
    message = {"role": "assistant", "content": text}
    choices = [
        {"index": index, "message": message, "finish_reason": "stop", "logprobs": None}
        for index in range(body.get("n") or 1)
    ]
    return _envelope(body, "chat.completion") | {"choices": choices, "usage": usage_of(body, text)}


def stream_events(body: dict[str, Any], text: str) -> list[str]:
    """The same answer as the data of server-sent events; the usage comes where it is asked for."""
    pieces = [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)]
    deltas: list[dict[str, str]] = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in pieces)]
    envelope = _envelope(body, "chat.completion.chunk")
    chunks = [envelope | {"choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
    chunks.append(envelope | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append(envelope | {"choices": [], "usage": usage_of(body, text)})
    return [*(json.dumps(chunk) for chunk in chunks), "[DONE]"]


def _envelope(body: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-canary", "object": kind, "created": 1700000000, "model": body.get("model", MODEL)}


@dataclass(frozen=True)
class _Rule:
    behaviour: Behaviour
    applies: Callable[[RecordedRequest], bool]


class LMServer:
    """The server; it listens when made, and must be closed (it is a context manager).

    Attributes:
        port: Its port on 127.0.0.1.
        api_base: What ``dspy.LM(api_base=…)`` takes.
    """

    def __init__(self) -> None:
        # Guards the rules and the records: tests read and set them while the server's thread works.
        self._lock = threading.Condition()
        self._rules: list[_Rule] = [_Rule(Answer(), lambda _request: True)]
        self._requests: list[RecordedRequest] = []
        self._sockets = tornado.netutil.bind_sockets(0, "127.0.0.1", backlog=_BACKLOG)
        self.port: int = self._sockets[0].getsockname()[1]
        self.api_base = f"http://127.0.0.1:{self.port}/v1"
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._responding: set[asyncio.Task[None]] = set()  # only the server's loop touches it
        self._thread = threading.Thread(target=self._run, name=f"lm-server-{self.port}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def behaviour(self) -> Behaviour:
        """What requests meet that no narrower rule takes."""
        with self._lock:
            return self._rules[0].behaviour

    @behaviour.setter
    def behaviour(self, behaviour: Behaviour) -> None:
        with self._lock:
            self._rules[0] = _Rule(behaviour, lambda _request: True)

    def behave(
        self,
        behaviour: Behaviour,
        *,
        api_key: str | None = None,
        when: Callable[[RecordedRequest], bool] | None = None,
    ) -> None:
        """A behaviour for some requests only; of several rules that apply, the last one given.

        Args:
            behaviour: What they meet.
            api_key: Requests with this key; None is any.
            when: Requests of which this is true; None is all. Called on the server's thread.
        """

        def applies(request: RecordedRequest) -> bool:
            return (api_key is None or request.api_key == api_key) and (when is None or when(request))

        with self._lock:
            self._rules.append(_Rule(behaviour, applies))

    @property
    def requests(self) -> list[RecordedRequest]:
        """The completions asked for so far, in order of arrival."""
        with self._lock:
            return list(self._requests)

    def wait_for_request(self, n: int = 1, deadline: float = 10.0) -> RecordedRequest:
        """Block until ``n`` requests have arrived in all; on an event loop use ``wait_until`` instead.

        Returns:
            The ``n``-th request.

        Raises:
            AssertionError: Fewer came within ``deadline`` seconds.
        """
        with self._lock:
            if not self._lock.wait_for(lambda: len(self._requests) >= n, timeout=deadline):
                raise AssertionError(f"waited {deadline:g} s for request {n}; {len(self._requests)} came")
            return self._requests[n - 1]

    def wait_for_disconnect(self, n: int = 1, deadline: float = 10.0) -> RecordedRequest:
        """Block until the client of the ``n``-th request has closed its socket unanswered.

        Raises:
            AssertionError: It did not within ``deadline`` seconds, or was answered.
        """
        request = self.wait_for_request(n, deadline)
        with self._lock:
            if not self._lock.wait_for(lambda: request.disconnected_at is not None, timeout=deadline):
                raise AssertionError(f"waited {deadline:g} s for the client of request {n} to leave: {request}")
            return request

    def close(self) -> None:
        """Drop every connection and end the thread; a second call does nothing."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(timeout=10)
            assert not self._thread.is_alive(), f"{self._thread.name} did not end within 10 s"

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        app = tornado.web.Application(
            [(r"/v1/chat/completions", _Completions), (r"/v1/models", _Models)],
            lm_server=self,
            log_function=lambda _handler: None,  # a 503 that a test asked for is no news
        )
        server = tornado.httpserver.HTTPServer(app)
        server.add_sockets(self._sockets)
        await self._closing.wait()
        server.stop()
        for task in self._responding:
            task.cancel()
        await asyncio.gather(*self._responding, return_exceptions=True)
        await server.close_all_connections()

    def _arrived(self, request: RecordedRequest) -> Behaviour:
        with self._lock:
            self._requests.append(request)
            self._lock.notify_all()
            rules = list(self._rules)
        return next(rule.behaviour for rule in reversed(rules) if rule.applies(request))

    def _mark(self, request: RecordedRequest, **times: float) -> None:
        with self._lock:
            for name, value in times.items():
                setattr(request, name, value)
            self._lock.notify_all()


class _Handler(tornado.web.RequestHandler):
    def record(self) -> RecordedRequest:
        scheme, _, token = self.request.headers.get("Authorization", "").partition(" ")
        body = json.loads(self.request.body) if self.request.body else {}
        return RecordedRequest(
            arrived_at=time.monotonic(),
            path=self.request.path,
            headers={name.lower(): value for name, value in self.request.headers.get_all()},
            body=body,
            api_key=token if scheme.lower() == "bearer" else "",
            peer_port=self.request.connection.context.address[1],  # type: ignore[union-attr]  # HTTP/1 has one
        )


class _Models(_Handler):
    def get(self) -> None:
        self.write({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "tests"}]})


class _Completions(_Handler):
    _request: RecordedRequest | None = None
    _responding: asyncio.Task[None] | None = None

    async def post(self) -> None:
        server: LMServer = self.settings["lm_server"]
        self._request = self.record()
        exchange = Exchange(self, self._request)
        if not self._request.api_key:
            exchange.send_error(401, "You didn't provide an API key.")
            return
        task = asyncio.ensure_future(server._arrived(self._request).respond(exchange))
        self._responding = task
        server._responding.add(task)
        try:
            await asyncio.wait([task])
        finally:
            server._responding.discard(task)
        if task.cancelled() or isinstance(task.exception(), tornado.iostream.StreamClosedError):
            exchange.drop()
        else:
            task.result()

    def on_connection_close(self) -> None:
        if self._request is not None and self._request.answered_at is None:
            self.settings["lm_server"]._mark(self._request, disconnected_at=time.monotonic())
        if self._responding is not None:
            self._responding.cancel()

    def finish(self, chunk: str | bytes | dict[str, Any] | None = None) -> asyncio.Future[None]:
        self.mark_answered()
        return super().finish(chunk)

    def mark_answered(self) -> None:
        # Before the last byte leaves: the client, once it has the answer, finds it on record.
        if self._request is not None and self._request.disconnected_at is None:
            self.settings["lm_server"]._mark(self._request, answered_at=time.monotonic())
