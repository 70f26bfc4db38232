"""Answers any signature without a network: the LM of demos, notebooks and tests (``offline/echo``).

Theory of operation. An engine pair for ``dspy.LM(model, engine=…, async_engine=…, num_retries=0)``. A request's
prompt tells the adapter, the output fields and their types (`offline_prompts`); each field is filled with a value
that fits (`offline_samples`), drawn from a hash of the seed, the field's name and the last user message. So one
session gives one answer to one input, in any process, and another session another. Nothing else is looked at:
not the time, not the requests before; only scripted answers and failures are counted.

Strings say "offline" wherever their type, bounds, format or pattern leaves room for it.

XMLAdapter, as far as DSPy's own limits let it:

- The prompt does not tell the types inside lists, mappings and models, so they are taken from the signature of the
  Predict that is calling; an adapter called without one gets text there, which DSPy refuses.
- Such a field's value is written as JSON text within its tag. The nested tags that the prompt shows lose leaf
  types when DSPy reads them: a ReAct tool would get "3" for 3, a ``Literal[1, 2]`` or a discriminated union inside
  a model would be refused.
- DSPy strips the white space at both ends of a text.

In every adapter: an ``Enum`` whose values are integers, as a whole output field, cannot be answered in ChatAdapter
or XMLAdapter (DSPy compares the text "1" with 1), nor can one whose values are text that looks like integers in
JSONAdapter (the prompt shows both alike). TwoStepAdapter works when its extraction model is an offline LM too;
ReAct in it runs to ``max_iters``, for the extraction prompt shows neither tools nor observations. Modules that
run the LM's code or call tools natively (ReActV2, ProgramOfThought, CodeAct, RLM) need scripted answers.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Self

from dspy.clients.engines.base import StreamEvent  # dspy.lm15 exports its members, not the union
from dspy.clients.errors import ERROR_MAPPING
from dspy.lm15 import Message, ProviderError, Request, Response, Usage, response_to_events

from dspex_kernels.errors import InvalidLMProfile
from dspex_kernels.kernel.offline.prompts import OutputField, Prompt, read_prompt
from dspex_kernels.kernel.offline.samples import Draw, sample, text
from dspex_kernels.protocol.records import OfflineOptions

CHARACTERS_PER_TOKEN = 4  # the usual rule of thumb for English
DELTA_LENGTH = 12  # characters of one streamed piece: small, so that a short answer still streams
_NEXT_JSON_FIELD = re.compile(r'(", "\w+": [\[{]*")')

_FAILURES: dict[str, type[Exception]] = {"unexpected": RuntimeError}  # DSPy's word for what lm15 has no class for
for _canonical, _public in ERROR_MAPPING:
    _FAILURES.setdefault(_public.default_code, _canonical)
_STATUS = {
    "rate_limit": 429,
    "auth": 401,
    "billing": 402,
    "invalid_request": 400,
    "context_window_exceeded": 400,
    "unsupported_model": 404,
    "timeout": 504,
    "server": 503,
    "provider": 502,
}


def offline_engines(options: OfflineOptions, seed: str) -> tuple[OfflineEngine, AsyncOfflineEngine]:
    """The engine pair of one offline LM; both count the same requests.

    Args:
        options: Latency, scripted answers, failures.
        seed: What makes these answers differ from another session's: the session id and the model string.

    Raises:
        InvalidLMProfile: A failure is no error code of DSPy's.
    """
    script = _Script(options, seed)
    return OfflineEngine(script), AsyncOfflineEngine(script)


class _Script:
    """What the requests of one LM get, in the order they come in, whichever engine they reach."""

    def __init__(self, options: OfflineOptions, seed: str) -> None:
        unknown = sorted({code for code in options.failures if code is not None} - _FAILURES.keys())
        if unknown:
            raise InvalidLMProfile(
                f"offline.failures: {', '.join(map(repr, unknown))} is not an error code of DSPy's; known are "
                f"{', '.join(sorted(_FAILURES))} (for adapter_parse_error, script a raw text in offline.answers)",
                details={"unknown": unknown, "known": sorted(_FAILURES)},
            )
        self.options = options
        self.seed = seed
        self._lock = threading.Lock()  # guards the two counters: DSPy's modules ask from several threads
        self._requests = 0
        self._answers = 0

    def next_turn(self) -> _Turn:
        """Count a request; a failing one leaves its scripted answer for the next."""
        with self._lock:
            index = self._requests
            self._requests += 1
            failures, answers = self.options.failures, self.options.answers
            failure = failures[index] if index < len(failures) else None
            if failure is not None or self._answers >= len(answers):
                return _Turn(index + 1, failure, None)
            self._answers += 1
            return _Turn(index + 1, None, answers[self._answers - 1])

    def respond(self, request: Request, turn: _Turn) -> Response:
        """The response to a request, or the failure that its turn holds."""
        if turn.failure is not None:
            raise _failure(turn.failure, turn.number)
        prompt = read_prompt(request)
        answer = turn.answer if isinstance(turn.answer, str) else _answer(prompt, self.seed, turn.answer)
        return Response(
            id=None,
            model=request.model,
            message=Message.assistant(answer),
            finish_reason="stop",
            usage=Usage(input_tokens=_tokens(prompt.characters), output_tokens=_tokens(len(answer))),
        )

    def events(self, request: Request, turn: _Turn) -> Iterator[StreamEvent]:
        """The same response as a stream, its text in small pieces."""
        for event in response_to_events(self.respond(request, turn)):
            whole = event.delta.text if event.type == "delta" and event.delta.type == "text" else None
            if whole is None:
                yield event
                continue
            for piece in _pieces(whole):
                yield replace(event, delta=replace(event.delta, text=piece))


@dataclass(frozen=True)
class _Turn:
    """What one request gets: the `number`-th, from 1; neither failure nor answer means a sampled answer."""

    number: int
    failure: str | None
    answer: dict[str, Any] | str | None


class _Engine:
    """What both engines share with DSPy: what the LM can do, saving, copying."""

    supports_function_calling = False
    supports_reasoning = False
    supports_response_schema = False
    supported_params: frozenset[str] = frozenset()

    def __init__(self, script: _Script) -> None:
        self._script = script

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # DSPy's optimizers copy programs with their LM: the copies go on with the same script.
        return self

    def dump_state(self) -> dict[str, Any]:
        """What `load_state` builds an equal engine from, its script at the start. Called by DSPy on saving."""
        return {"options": self._script.options.model_dump(mode="json"), "seed": self._script.seed}

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> Self:
        """An engine from `dump_state`; it shares its count of requests with no other."""
        return cls(_Script(OfflineOptions.model_validate(state["options"]), state["seed"]))


class OfflineEngine(_Engine):
    """Answers synchronous requests (``dspy.clients.engines.base.Engine``)."""

    def complete(self, request: Request) -> Response:
        """The whole response, after the latency."""
        turn = self._script.next_turn()
        self._wait()
        return self._script.respond(request, turn)

    def stream(self, request: Request) -> Iterator[StreamEvent]:
        """The response in pieces, the first after the latency."""
        turn = self._script.next_turn()
        self._wait()
        yield from self._script.events(request, turn)

    def close(self) -> None:
        """Nothing is held open."""

    def _wait(self) -> None:
        if self._script.options.latency_s:
            time.sleep(self._script.options.latency_s)


class AsyncOfflineEngine(_Engine):
    """Answers asynchronous requests (``dspy.clients.engines.base.AsyncEngine``)."""

    async def complete(self, request: Request) -> Response:
        """The whole response, after the latency; other tasks run meanwhile."""
        turn = self._script.next_turn()
        await self._wait()
        return self._script.respond(request, turn)

    async def stream(self, request: Request) -> AsyncIterator[StreamEvent]:
        """The response in pieces, the first after the latency; other tasks run between two pieces."""
        turn = self._script.next_turn()
        await self._wait()
        for event in self._script.events(request, turn):
            yield event
            await asyncio.sleep(0)

    async def aclose(self) -> None:
        """Nothing is held open."""

    async def _wait(self) -> None:
        if self._script.options.latency_s:
            await asyncio.sleep(self._script.options.latency_s)


def _failure(code: str, number: int) -> Exception:
    cls = _FAILURES[code]
    message = f"offline failure {code!r} of request {number}, as the LM profile's offline.failures asks"
    facts: dict[str, Any] = {"provider": "offline", "status": _STATUS.get(code)}
    return cls(message, **facts) if issubclass(cls, ProviderError) else cls(message)


def _pieces(answer: str) -> Iterator[str]:
    # One piece from a JSON field to the next: DSPy's listener hands out all it has before it sees the next name.
    for index, part in enumerate(_NEXT_JSON_FIELD.split(answer)):
        step = max(1, len(part)) if index % 2 else DELTA_LENGTH
        yield from (part[start : start + step] for start in range(0, len(part), step))


def _tokens(characters: int) -> int:
    return max(1, -(-characters // CHARACTERS_PER_TOKEN))


def _answer(prompt: Prompt, seed: str, scripted: dict[str, Any] | None) -> str:
    """The answer's text: scripted fields as they are, what they leave out sampled."""
    if prompt.form == "text":
        if scripted is not None:
            return json.dumps(scripted, ensure_ascii=False)
        return text("reply", _draw(seed, "reply", prompt.user)(""), prompt.quote)
    values = {name: _value(name, wanted, prompt, seed) for name, wanted in prompt.fields.items()}
    if prompt.tools:
        values |= _tool_call(prompt, seed)
    values |= scripted or {}
    if prompt.form == "json":
        return json.dumps(values, ensure_ascii=False)
    # DSPy takes an absent field for None where the type allows it; a written "null" would be text to it.
    written = {n: _written(v, prompt.fields.get(n)) for n, v in values.items() if v is not None}
    if prompt.form == "xml":
        return "\n\n".join(f"<{name}>\n{escape(value, quote=False)}\n</{name}>" for name, value in written.items())
    sections = [f"[[ ## {name} ## ]]\n{value}" for name, value in written.items()]
    return "\n\n".join([*sections, "[[ ## completed ## ]]"])


def _value(name: str, wanted: OutputField, prompt: Prompt, seed: str) -> Any:
    draw = _draw(seed, name, prompt.user)
    if wanted.is_code:
        return f"```\n# {text(name, draw(name))}\n```"
    return sample(wanted.schema, draw, name=name, quote=prompt.quote)


def _tool_call(prompt: Prompt, seed: str) -> dict[str, Any]:
    """ReAct's next step: the first tool once, then ``finish``."""
    named = [name for name in prompt.tools if name != "finish"]
    tool = "finish" if prompt.has_observation or not named else named[0]
    draw = _draw(seed, "next_tool_args", prompt.user)
    arguments = {
        name: sample(schema, draw, name=name, quote=prompt.quote)
        for name, schema in prompt.tools.get(tool, {}).items()
    }
    return {"next_tool_name": tool, "next_tool_args": arguments}


def _written(value: Any, wanted: OutputField | None) -> str:
    """The value as text of a section or tag."""
    if isinstance(value, str) and not (wanted and wanted.is_json):
        return value
    return json.dumps(value, ensure_ascii=False)


def _draw(seed: str, name: str, user: str) -> Draw:
    """A source of numbers that depends on these three and nothing else."""
    # Lengths keep ("a", "bc") and ("ab", "c") apart; the long message is hashed once, not for every value.
    base = hashlib.sha256(f"{len(seed)}:{seed}{len(name)}:{name}{user}".encode()).digest()

    def draw(path: str) -> int:
        return int.from_bytes(hashlib.sha256(base + path.encode()).digest()[:8], "big")

    return draw
