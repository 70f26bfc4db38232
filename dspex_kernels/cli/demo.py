"""`dspex-kernels demo`: two sessions keep a program under the same id, each in a kernel of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traitlets import Bool, Unicode

from dspex_kernels import errors
from dspex_kernels.cli.base import BASE_ALIASES, BASE_FLAGS, EXIT_FAILED, Subcommand, say, say_json
from dspex_kernels.cli.ephemeral import ephemeral_service, lm_profile

if TYPE_CHECKING:
    from dspex_kernels.sessions.service import SessionService

PROGRAM_ID = "qa_bot"
SIGNATURE = "question -> answer"
QUESTION = "Why is the sky blue?"
OWNERS = {"alice": "Predict", "bob": "ChainOfThought"}
"""Each owner with the module that the program of the same id is made of."""

PAUSE_LIMIT_S = 600.0


@dataclass(frozen=True, slots=True)
class Resident:
    """A session of the demo, and where it lives."""

    owner: str
    session_id: str
    kernel_pid: int
    connection_file: str


class DemoApp(Subcommand):
    name = "jupyter-dspex-demo"
    usage = "demo [--lm=MODEL] [--json] [--pause]"
    description = (
        "Two sessions, with the owners alice and bob, each keep a program under the id qa_bot, in two real Jupyter "
        "kernels; each gets answers of its own, and what one deletes the other keeps. Needs no network and no key: "
        "the offline LM answers, and says so."
    )
    examples = """
    dspex-kernels demo
    dspex-kernels demo --lm=openai/gpt-5-mini                            # a real model, the key from OPENAI_API_KEY
    dspex-kernels demo --lm=openai/llama --api-base=http://127.0.0.1:8000/v1 --api-key-env=LLAMA_KEY
    dspex-kernels demo --json --pause                                    # one JSON object a line; ends on Enter
    """
    flags = BASE_FLAGS | {
        "json": ({"DemoApp": {"json": True}}, "One JSON object a line."),
        "pause": ({"DemoApp": {"pause": True}}, "Wait for Enter (at most 10 minutes) before the kernels end."),
    }
    aliases = BASE_ALIASES | {
        "lm": "DemoApp.lm",
        "api-base": "DemoApp.api_base",
        "api-key-env": "DemoApp.api_key_env",
        "question": "DemoApp.question",
    }
    shown_defaults = ("lm", "question")

    lm = Unicode("offline/echo", help="The model to ask.").tag(config=True)
    api_base = Unicode("", help="Another endpoint than the provider's own.").tag(config=True)
    api_key_env = Unicode("", help="The environment variable that holds the key, if not the usual one.").tag(
        config=True
    )
    question = Unicode(QUESTION, help="What to ask both.").tag(config=True)
    json = Bool(False, help="One JSON object a line.").tag(config=True)
    pause = Bool(False, help="Wait for Enter before the kernels end.").tag(config=True)

    async def run(self) -> int:
        """Show it, step by step."""
        if self.extra_args:
            self.fail_usage(f"demo takes no argument {self.extra_args[0]!r}: see --help")
        async with ephemeral_service(self) as service:
            residents = await self._start_sessions(service)
            await self._ask_each(service, residents)
            is_isolated = await self._delete_one(service, *residents)
            await self._show_statistics(service, residents)
            if self.pause:
                await self._pause()
            for resident in residents:
                await service.destroy_session(resident.session_id)
        self._report("done", f"Both kernels have ended. {'It works.' if is_isolated else 'It does NOT work.'}")
        return 0 if is_isolated else EXIT_FAILED

    async def _start_sessions(self, service: SessionService) -> list[Resident]:
        self._heading("Two sessions, each in a kernel of its own")
        residents = await asyncio.gather(*(self._start_session(service, owner) for owner in OWNERS))
        for resident in residents:
            self._report(
                "session",
                f"  {resident.owner:6} {resident.session_id}  kernel pid {resident.kernel_pid}  "
                f"{Path(resident.connection_file).name}",
                owner=resident.owner,
                session_id=resident.session_id,
                kernel_pid=resident.kernel_pid,
                connection_file=resident.connection_file,
            )
        return list(residents)

    async def _start_session(self, service: SessionService, owner: str) -> Resident:
        profile = lm_profile(model=self.lm, api_base=self.api_base, api_key_env=self.api_key_env)
        session = await service.create_session(owner=owner, lm=profile)
        info = await service.get_session_info(session.session_id)
        connection_file = await service.get_connection_file(session.session_id)
        assert info.kernel_pid is not None
        assert connection_file is not None
        return Resident(owner, info.session_id, info.kernel_pid, connection_file)

    async def _ask_each(self, service: SessionService, residents: list[Resident]) -> None:
        self._heading(f"Each makes a program {PROGRAM_ID!r} and asks it: {self.question}")
        answers = await asyncio.gather(*(self._make_and_ask(service, resident) for resident in residents))
        for resident, outputs in zip(residents, answers, strict=True):
            module = OWNERS[resident.owner]
            self._report(
                "answer",
                f"  {resident.owner:6} {module:15} {_one_line(outputs['answer'])}",
                owner=resident.owner,
                program_id=PROGRAM_ID,
                module=module,
                outputs=outputs,
            )

    async def _make_and_ask(self, service: SessionService, resident: Resident) -> Mapping[str, Any]:
        program = {"program_id": PROGRAM_ID, "signature": SIGNATURE, "module": OWNERS[resident.owner]}
        await service.call(resident.session_id, "create_program", program)
        return await self._ask(service, resident)

    async def _ask(self, service: SessionService, resident: Resident) -> Mapping[str, Any]:
        args = {"program_id": PROGRAM_ID, "inputs": {"question": self.question}}
        result = await service.call(resident.session_id, "execute_program", args, timeout=120.0)
        outputs: Mapping[str, Any] = result["outputs"]
        return outputs

    async def _delete_one(self, service: SessionService, alice: Resident, bob: Resident) -> bool:
        """Delete alice's program, and see who still has one; returns whether only bob does."""
        self._heading(f"alice deletes her {PROGRAM_ID!r}")
        await service.call(alice.session_id, "delete_program", {"program_id": PROGRAM_ID})
        left = {}
        for resident in (alice, bob):
            try:
                outputs = await self._ask(service, resident)
                found, text = True, f"still there, answers: {_one_line(outputs['answer'])}"
            except errors.ProgramNotFound as failure:
                found, text = False, f"gone ({failure.code})"
            left[resident.owner] = found
            self._report("after_delete", f"  {resident.owner:6} {text}", owner=resident.owner, has_program=found)
        return left == {"alice": False, "bob": True}

    async def _show_statistics(self, service: SessionService, residents: list[Resident]) -> None:
        self._heading("Statistics, each session's own")
        for resident in residents:
            stats = await service.call(resident.session_id, "get_stats", {})
            cost = "cost unknown" if stats["cost"] is None else f"{stats['cost']:.6f} USD"
            self._report(
                "statistics",
                f"  {resident.owner:6} programs {stats['programs']}, executions {stats['executions']}, "
                f"LM calls {stats['lm_calls']}, tokens {stats['total_tokens']}, {cost}",
                owner=resident.owner,
                stats=stats,
            )

    async def _pause(self) -> None:
        self._report("paused", "Press Enter to end the kernels.")
        try:
            async with asyncio.timeout(PAUSE_LIMIT_S):
                await _enter_pressed()
        except TimeoutError:
            self._report("resumed", f"Nobody pressed Enter for {PAUSE_LIMIT_S:.0f} s.")

    def _heading(self, text: str) -> None:
        if not self.json:
            say(text)

    def _report(self, event: str, text: str, **facts: Any) -> None:
        if self.json:
            say_json({"event": event, **facts})
        else:
            say(text)


def _one_line(text: Any) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= 100 else f"{line[:97]}…"


async def _enter_pressed() -> None:
    """Until a line, or the end, comes on stdin."""
    loop = asyncio.get_running_loop()
    pressed = asyncio.Event()

    def wait() -> None:
        # os.read, not sys.stdin: a daemon thread holding stdin's lock would abort the interpreter at its end.
        os.read(0, 4096)
        if not loop.is_closed():
            loop.call_soon_threadsafe(pressed.set)

    threading.Thread(target=wait, name="dspex-demo-enter", daemon=True).start()
    await pressed.wait()
