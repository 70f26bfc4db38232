"""What named calls ended with: fetched later, copied, bounded, and never in the way of the call itself."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from dspex_kernels import errors
from dspex_kernels.sessions.outcomes import Outcomes


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work

    asyncio.run(bounded())


def ended(outcomes: Outcomes, request_id: str, outcome: Any = None, session_id: str = "s") -> None:
    outcomes.begin(session_id, request_id)
    outcomes.keep(session_id, request_id, {"answer": request_id} if outcome is None else outcome)


def reply(request_id: str, session_id: str = "s", **content: Any) -> dict[str, Any]:
    return {"status": "ok", "result": {"late": True}, "session_id": session_id, "request_id": request_id, **content}


GONE = errors.CommandCancelled("its caller went away")


async def is_unknown(outcomes: Outcomes, request_id: str, session_id: str = "s") -> bool:
    try:
        await outcomes.fetch(session_id, request_id)
    except errors.ResultNotFound:
        return True
    return False


def test_a_result_is_fetched_as_often_as_one_likes_and_is_nobodys_to_change() -> None:
    async def main() -> None:
        outcomes, result = Outcomes(), {"outputs": {"answer": ["blue"]}}
        ended(outcomes, "r", result)
        result["outputs"]["answer"].append("red")
        first = await outcomes.fetch("s", "r")
        first["outputs"].clear()
        assert await outcomes.fetch("s", "r") == {"outputs": {"answer": ["blue"]}}

    run(main())


@pytest.mark.parametrize(
    "error",
    [
        errors.ProgramFailed("it failed", ename="ValueError", evalue="no", traceback=["line \ud800"]),
        errors.KernelDied("it died", retryable=True, details={"kernel_id": "k"}),
        errors.ProviderFailure("slow down", code="rate_limit", retryable=True, retry_after=3.0),
        errors.BudgetExceeded("too much", details={"huge": 10**40}),
    ],
    ids=lambda error: error.code,
)
def test_an_error_is_raised_anew_with_all_it_told(error: errors.DSPexError) -> None:
    async def main() -> None:
        outcomes = Outcomes()
        try:
            raise error
        except errors.DSPexError as failure:
            ended(outcomes, "r", failure)
        raised = []
        for _ in range(2):
            with pytest.raises(type(error)) as told:
                await outcomes.fetch("s", "r")
            raised.append(told.value)
        assert [vars(again) for again in raised] == [vars(error)] * 2
        assert len({id(again) for again in (error, *raised)}) == 3

    run(main())


def test_a_fetch_waits_for_a_call_that_runs() -> None:
    async def main() -> None:
        outcomes = Outcomes()
        outcomes.begin("s", "r")
        fetches = [asyncio.create_task(outcomes.fetch("s", "r", 20)) for _ in range(3)]
        await asyncio.sleep(0)
        fetches[0].cancel()  # one that leaves takes nothing from the others
        outcomes.keep("s", "r", {"answer": 1})
        assert await asyncio.gather(*fetches[1:]) == [{"answer": 1}] * 2
        assert await outcomes.fetch("s", "r") == {"answer": 1}
        with pytest.raises(asyncio.CancelledError):
            await fetches[0]

    run(main())


@pytest.mark.parametrize("timeout", [0.0, 0.01])
def test_a_fetch_that_waits_too_long_is_told_that_the_call_runs(timeout: float) -> None:
    async def main() -> None:
        outcomes = Outcomes()
        outcomes.begin("s", "r")
        with pytest.raises(errors.CommandTimeout, match="still runs") as late:
            await outcomes.fetch("s", "r", timeout)
        assert late.value.details == {"session_id": "s", "request_id": "r"}
        outcomes.keep("s", "r", {"answer": 1})
        assert await outcomes.fetch("s", "r", timeout) == {"answer": 1}

    run(main())


def test_what_was_never_asked_is_not_found() -> None:
    async def main() -> None:
        outcomes = Outcomes()
        ended(outcomes, "r")
        outcomes.keep("s", "unasked", {"answer": 1})
        for session_id, request_id in [("s", "unasked"), ("other", "r"), ("", "")]:
            with pytest.raises(errors.ResultNotFound, match="is kept") as unknown:
                await outcomes.fetch(session_id, request_id)
            assert unknown.value.details == {"session_id": session_id, "request_id": request_id}

    run(main())


def test_a_name_is_given_to_one_running_call_and_may_be_used_again_after_it() -> None:
    async def main() -> None:
        outcomes = Outcomes()
        outcomes.begin("s", "r")
        with pytest.raises(errors.DuplicateRequest, match="is running already"):
            outcomes.begin("s", "r")
        outcomes.begin("other", "r")
        outcomes.keep("s", "r", {"answer": 1})
        outcomes.begin("s", "r")
        with pytest.raises(errors.CommandTimeout):
            await outcomes.fetch("s", "r")
        outcomes.keep("s", "r", {"answer": 2})
        assert await outcomes.fetch("s", "r") == {"answer": 2}

    run(main())


def test_the_oldest_go_when_there_are_too_many() -> None:
    async def main() -> None:
        outcomes = Outcomes(max_count=3)
        for number in range(5):
            ended(outcomes, f"r{number}", session_id=f"s{number % 2}")
        assert [await is_unknown(outcomes, f"r{n}", f"s{n % 2}") for n in range(5)] == [True] * 2 + [False] * 3

    run(main())


def test_calls_that_run_are_not_forgotten_for_those_that_ended() -> None:
    async def main() -> None:
        outcomes = Outcomes(max_count=1)
        outcomes.begin("s", "running")
        for number in range(5):
            ended(outcomes, f"r{number}")
        outcomes.keep("s", "running", {"answer": 1})
        assert await outcomes.fetch("s", "running") == {"answer": 1}

    run(main())


@pytest.mark.parametrize("large", [{"answer": "x" * 400}, errors.ProgramFailed("x" * 100, traceback=["y" * 300])])
def test_the_oldest_go_when_they_are_too_large_together(large: Any) -> None:
    async def main() -> None:
        outcomes = Outcomes(max_bytes=1400)
        for number in range(4):
            ended(outcomes, f"r{number}", large)

        async def is_kept(request_id: str) -> bool:
            try:
                await outcomes.fetch("s", request_id)
            except errors.DSPexError as failure:
                return not isinstance(failure, errors.ResultNotFound)
            return True

        kept = [await is_kept(f"r{number}") for number in range(4)]
        assert kept == sorted(kept)
        assert not kept[0]
        assert kept[3]

    run(main())


def test_one_that_is_too_large_goes_to_who_waits_and_pushes_nothing_else_out() -> None:
    async def main() -> None:
        outcomes = Outcomes(max_bytes=1000)
        ended(outcomes, "small")
        outcomes.begin("s", "large")
        fetch = asyncio.create_task(outcomes.fetch("s", "large", 20))
        await asyncio.sleep(0)
        outcomes.keep("s", "large", {"answer": "x" * 2000})
        assert await fetch == {"answer": "x" * 2000}
        assert await is_unknown(outcomes, "large")
        assert not await is_unknown(outcomes, "small")

    run(main())


def test_what_is_too_old_is_not_found() -> None:
    async def main() -> None:
        clock = Clock()
        outcomes = Outcomes(max_age=60, clock=clock)
        ended(outcomes, "old")
        clock.now += 30
        ended(outcomes, "young")
        clock.now += 30
        assert [await is_unknown(outcomes, name) for name in ("old", "young")] == [True, False]

    run(main())


def test_a_forgotten_session_has_no_results_and_its_calls_leave_none() -> None:
    async def main() -> None:
        outcomes = Outcomes()
        ended(outcomes, "r")
        ended(outcomes, "r", session_id="other")
        outcomes.begin("s", "running")
        fetch = asyncio.create_task(outcomes.fetch("s", "running", 20))
        await asyncio.sleep(0)
        outcomes.forget("s")
        with pytest.raises(errors.ResultNotFound):
            await fetch
        outcomes.keep("s", "running", {"answer": 1})
        outcomes.replied(reply("r"))
        assert [await is_unknown(outcomes, name) for name in ("r", "running")] == [True, True]
        assert not await is_unknown(outcomes, "r", "other")

    run(main())


@pytest.mark.parametrize("gone", [GONE, errors.CommandTimeout("its time was over")], ids=lambda gone: gone.code)
@pytest.mark.parametrize("early", [True, False], ids=["before its caller is gone", "after its caller is gone"])
def test_a_kernels_answer_is_kept_for_a_caller_that_left(gone: errors.DSPexError, early: bool) -> None:
    async def main() -> None:
        outcomes = Outcomes()
        outcomes.begin("s", "r")
        if early:
            outcomes.replied(reply("r"))
        outcomes.keep("s", "r", gone)
        if not early:
            with pytest.raises(type(gone)):
                await outcomes.fetch("s", "r")
            outcomes.replied(reply("r"))
        assert await outcomes.fetch("s", "r") == {"late": True}

    run(main())


def test_a_late_error_is_kept_with_what_the_users_code_told() -> None:
    async def main() -> None:
        outcomes = Outcomes()
        ended(outcomes, "r", GONE)
        failure = errors.ProgramFailed("it failed").to_dict()
        outcomes.replied(
            reply("r", status="error", error=failure, ename="KeyError", evalue="'x'", traceback=["line 1"])
        )
        with pytest.raises(errors.ProgramFailed) as told:
            await outcomes.fetch("s", "r")
        assert (told.value.ename, told.value.evalue, told.value.traceback) == ("KeyError", "'x'", ["line 1"])

    run(main())


@pytest.mark.parametrize("told", [{"answer": 1}, errors.StoreError("the disk is full")], ids=["result", "error"])
@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
def test_what_the_caller_was_answered_stands_against_the_kernels_reply(told: Any, early: bool) -> None:
    async def main() -> None:
        outcomes = Outcomes()
        outcomes.begin("s", "r")
        if early:
            outcomes.replied(reply("r"))
        outcomes.keep("s", "r", told)
        if not early:
            outcomes.replied(reply("r"))
        if isinstance(told, dict):
            assert await outcomes.fetch("s", "r") == told
        else:
            with pytest.raises(errors.StoreError, match="the disk is full"):
                await outcomes.fetch("s", "r")

    run(main())


@pytest.mark.parametrize(
    "content",
    [{}, {"session_id": ["s"], "request_id": {}}, reply("unknown"), reply("r", session_id="other")],
    ids=["empty", "no names", "unknown", "other session"],
)
def test_replies_of_nobodys_calls_change_nothing(content: dict[str, Any]) -> None:
    async def main() -> None:
        outcomes = Outcomes()
        ended(outcomes, "r", GONE)
        outcomes.replied(content)
        with pytest.raises(errors.CommandCancelled):
            await outcomes.fetch("s", "r")

    run(main())


@pytest.mark.parametrize("content", [{"result": None}, {"status": "strange"}, {"status": "error", "error": "no"}])
def test_a_late_reply_that_cannot_be_read_is_an_error(content: dict[str, Any]) -> None:
    async def main() -> None:
        outcomes = Outcomes()
        ended(outcomes, "r", GONE)
        outcomes.replied(reply("r", **content))
        with pytest.raises(errors.DSPexError, match="the kernel answered"):
            await outcomes.fetch("s", "r")

    run(main())


def test_what_only_python_reads_as_json_is_kept_too() -> None:
    """A dedicated kernel's owner may answer in its place: neither the call nor the reader of replies may fail."""

    async def main() -> None:
        outcomes, strange = Outcomes(), {"outputs": {"n": 2**70, "text": "\ud800"}}
        ended(outcomes, "r", strange)
        assert await outcomes.fetch("s", "r") == strange

    asyncio.run(main())
