"""Any number of calls share one connection; each gets its own answer, its deadline, or the reason why not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Coroutine
from typing import Any

import pytest

from dspex_kernels import config, errors
from dspex_kernels.sessions.kernel_connection import KernelConnection
from tests.peers import UnixPeer
from tests.sessions.scripted_kernel import ABOUT, ScriptedKernel, failed, ok
from tests.waiting import wait_until


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work

    asyncio.run(bounded())


def address(transport: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A kernel's ``ip``."""
    return "127.0.0.1" if transport == "tcp" else str(tmp_path_factory.mktemp("ipc") / "k")


async def silence(kernel: ScriptedKernel, message: dict[str, Any]) -> None:
    return None


async def silent_but_for_control(kernel: ScriptedKernel, message: dict[str, Any]) -> dict[str, Any] | None:
    return ok({"cancelled": True}) if message["channel"] == "control" else None


def commands(kernel: ScriptedKernel) -> list[str]:
    return [m["content"].get("command", m["msg_type"]) for m in kernel.requests]


def test_a_hundred_concurrent_calls_get_their_own_answers_in_whatever_order_they_come():
    async def work() -> None:
        arrived: list[dict[str, Any]] = []
        all_there = asyncio.Event()

        async def answer_backwards(kernel: ScriptedKernel, message: dict[str, Any]) -> None:
            arrived.append(message)
            if len(arrived) < 100:
                return
            for late in reversed(arrived):
                content = ok({"n": late["content"]["args"]["inputs"]["n"]})
                await kernel.reply("shell", late["idents"], late, "dspex_reply", content)
            all_there.set()

        async with ScriptedKernel(answer_backwards) as kernel, KernelConnection(kernel.connection_info) as link:
            results = await asyncio.gather(
                *(
                    link.request("execute_program", {"program_id": "p", "inputs": {"n": n}}, timeout=20)
                    for n in range(100)
                )
            )
            assert [r["n"] for r in results] == list(range(100))
            assert all_there.is_set()
            assert link.pending == 0
            assert link.strays == 0

    run(work())


@pytest.mark.parametrize(("transport", "curve"), [("tcp", False), ("tcp", True), ("ipc", False), ("ipc", True)])
def test_it_speaks_over_tcp_and_ipc_with_and_without_encryption(transport, curve, tmp_path_factory):
    async def work() -> None:
        ip = address(transport, tmp_path_factory)
        async with (
            ScriptedKernel(transport=transport, ip=ip, curve=curve) as kernel,
            KernelConnection(kernel.connection_info) as link,
        ):
            assert (await link.identify(timeout=10))["session_id"] == "s1"
            assert await link.request("ping") == {"args": {}}

    run(work())


def test_a_reply_that_answers_nobody_is_logged_counted_and_dropped(caplog):
    async def work() -> None:
        async def twice_and_a_stranger(kernel: ScriptedKernel, message: dict[str, Any]) -> dict[str, Any]:
            stranger = kernel.session.msg("dspex_request", {})
            await kernel.reply("shell", message["idents"], stranger, "dspex_reply", ok({"whose": "not yours"}))
            await kernel.send_raw("shell", [*message["idents"], b"no delimiter"])
            await kernel.send_raw(
                "shell", [*message["idents"], b"<IDS|MSG>", b"forged", b"{}", b"{}", b"{}", b"{}"]
            )
            return ok({"whose": "yours"})

        async with ScriptedKernel(twice_and_a_stranger) as kernel, KernelConnection(kernel.connection_info) as link:
            with caplog.at_level(logging.WARNING):
                assert await link.request("list_programs") == {"whose": "yours"}
            assert link.strays == 3
            assert "answers nobody" in caplog.text
            assert (await link.request("list_programs"))["whose"] == "yours"

    run(work())


def test_a_reply_that_cannot_be_taken_in_is_not_acknowledged_and_others_are_read_on(caplog):
    async def work() -> None:
        def take(content: dict[str, Any]) -> None:
            if content["result"] == {"n": 1}:
                raise RuntimeError("no room for it")

        async def answer(kernel: ScriptedKernel, message: dict[str, Any]) -> dict[str, Any]:
            return ok({"n": len(kernel.requests)})

        async with (
            ScriptedKernel(answer) as kernel,
            KernelConnection(kernel.connection_info, on_reply=take) as link,
        ):
            with pytest.raises(errors.InvalidMessage, match="RuntimeError"):
                await link.request("list_programs", timeout=10)
            assert (await link.request("list_programs"))["n"] == 2
            assert "a reply could not be taken in" in caplog.text

    run(work())


def test_control_commands_travel_on_control_and_all_others_on_shell():
    async def work() -> None:
        async with ScriptedKernel() as kernel, KernelConnection(kernel.connection_info) as link:
            for command in ("ping", "get_stats", "list_programs"):
                await link.request(command)
            assert [m["channel"] for m in kernel.requests] == ["control", "control", "shell"]

    run(work())


def test_the_request_carries_what_the_caller_said():
    async def work() -> None:
        async with ScriptedKernel() as kernel, KernelConnection(kernel.connection_info) as link:
            await link.request(
                "execute_program", {"program_id": "p"}, session_id="s9", timeout=7, request_id="mine"
            )
            content = kernel.requests[0]["content"]
            assert content == {
                "protocol_version": "1.0",
                "session_id": "s9",
                "request_id": "mine",
                "command": "execute_program",
                "args": {"program_id": "p"},
                "timeout_s": 7,
                "stream": False,
            }

    run(work())


def test_an_error_reply_is_raised_as_the_error_it_tells_of():
    async def work() -> None:
        async def fail(kernel: ScriptedKernel, message: dict[str, Any]) -> dict[str, Any]:
            if message["content"]["command"] == "execute_program":
                error = {"code": "program_failed", "message": "it broke", "details": {"program_id": "p"}}
                return failed(error, ename="ZeroDivisionError", evalue="division by zero", traceback=["line 1"])
            return failed({"code": "rate_limit", "message": "slow down", "retryable": True, "retry_after": 3.0})

        async with ScriptedKernel(fail) as kernel, KernelConnection(kernel.connection_info) as link:
            with pytest.raises(errors.ProgramFailed, match="it broke") as own:
                await link.request("execute_program", {"program_id": "p"})
            assert own.value.ename == "ZeroDivisionError"
            assert own.value.traceback == ["line 1"]
            with pytest.raises(errors.ProviderFailure) as provider:
                await link.request("list_programs")
            assert (provider.value.code, provider.value.retryable, provider.value.retry_after) == (
                "rate_limit",
                True,
                3.0,
            )

    run(work())


def test_a_cancelled_caller_has_its_call_cancelled_in_the_kernel_and_the_cancellation_passes():
    async def work() -> None:
        async with (
            ScriptedKernel(silent_but_for_control) as kernel,
            KernelConnection(kernel.connection_info) as link,
        ):
            call = asyncio.create_task(
                link.request("execute_program", {"program_id": "p"}, session_id="s1", request_id="mine")
            )
            await wait_until(lambda: kernel.requests, what="the request")
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await wait_until(lambda: len(kernel.requests) == 2, what="the cancel")
            cancel = kernel.requests[1]
            assert cancel["channel"] == "control"
            assert cancel["content"]["command"] == "cancel"
            assert cancel["content"]["args"] == {"request_id": "mine"}
            assert cancel["content"]["session_id"] == "s1"
            await link.request("ping")
            assert link.strays == 0

    run(work())


def test_a_call_without_a_name_is_cancelled_by_its_message_id():
    async def work() -> None:
        async with (
            ScriptedKernel(silent_but_for_control) as kernel,
            KernelConnection(kernel.connection_info) as link,
        ):
            call = asyncio.create_task(link.request("execute_program", {"program_id": "p"}))
            await wait_until(lambda: kernel.requests, what="the request")
            call.cancel()
            await asyncio.wait({call})
            await wait_until(lambda: len(kernel.requests) == 2, what="the cancel")
            assert kernel.requests[1]["content"]["args"] == {"request_id": kernel.requests[0]["header"]["msg_id"]}

    run(work())


def test_a_cancel_that_overtakes_its_call_is_repeated():
    async def work() -> None:
        async def too_early_once(kernel: ScriptedKernel, message: dict[str, Any]) -> dict[str, Any] | None:
            if message["channel"] == "shell":
                return None
            return ok({"cancelled": commands(kernel).count("cancel") == 2})

        async with ScriptedKernel(too_early_once) as kernel, KernelConnection(kernel.connection_info) as link:
            call = asyncio.create_task(link.request("execute_program", {"program_id": "p"}))
            await wait_until(lambda: kernel.requests, what="the request")
            call.cancel()
            await asyncio.wait({call})
            await wait_until(lambda: commands(kernel).count("cancel") == 2, what="the second cancel")
            await wait_until(lambda: link.pending == 0, what="its answer")

    run(work())


def test_a_kernel_that_never_answers_costs_the_deadline_and_its_late_reply_is_no_stray():
    async def work() -> None:
        release = asyncio.Event()

        async def late(kernel: ScriptedKernel, message: dict[str, Any]) -> dict[str, Any]:
            if message["content"]["command"] == "execute_program":
                await release.wait()
            return ok()

        async with ScriptedKernel(late) as kernel, KernelConnection(kernel.connection_info, grace=0.05) as link:
            with pytest.raises(errors.CommandTimeout, match=r"execute_program.*0\.1 s"):
                await link.request("execute_program", {"program_id": "p"}, timeout=0.1)
            assert link.pending == 0
            await wait_until(lambda: "cancel" in commands(kernel), what="the cancel")
            release.set()
            await link.request("list_programs")
            await link.request("ping")
            assert link.strays == 0

    run(work())


def test_the_kernels_own_timeout_answer_is_heard_within_the_grace():
    async def work() -> None:
        async def answer(kernel: ScriptedKernel, message: dict[str, Any]) -> dict[str, Any]:
            # The kernel keeps the deadline: its answer leaves when the time is over, not before.
            loop = asyncio.get_running_loop()
            over = asyncio.Event()
            loop.call_later(message["content"]["timeout_s"], over.set)
            await over.wait()
            return failed({"code": "timeout", "message": "by the kernel"})

        async with ScriptedKernel(answer) as kernel, KernelConnection(kernel.connection_info) as link:
            with pytest.raises(errors.CommandTimeout, match="by the kernel"):
                await link.request("execute_program", {"program_id": "p"}, timeout=0.1)

    run(work())


def test_fail_all_answers_everyone_who_waits_and_everyone_who_asks_later():
    async def work() -> None:
        async with ScriptedKernel(silence) as kernel, KernelConnection(kernel.connection_info) as link:
            calls = [
                asyncio.create_task(link.request("execute_program", {"program_id": "p"})),
                asyncio.create_task(link.request("list_programs")),
            ]
            await wait_until(lambda: len(kernel.requests) == 2, what="both requests")
            link.fail_all(lambda row: errors.KernelDied("gone", retryable=row is not None and row.repeatable))
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(o) for o in outcomes] == [errors.KernelDied, errors.KernelDied]
            assert [o.retryable for o in outcomes] == [False, True]
            with pytest.raises(errors.KernelDied):
                await link.request("list_programs")
            assert link.pending == 0

    run(work())


def test_closing_answers_who_still_waits():
    async def work() -> None:
        async with ScriptedKernel(silence) as kernel:
            link = await KernelConnection(kernel.connection_info).open()
            call = asyncio.create_task(link.request("list_programs"))
            await wait_until(lambda: kernel.requests, what="the request")
            await link.close()
            with pytest.raises(errors.ServiceClosed):
                await call
            await link.close()

    run(work())


def test_more_calls_than_may_wait_are_refused_but_a_cancel_still_passes():
    async def work() -> None:
        async with (
            ScriptedKernel(silent_but_for_control) as kernel,
            KernelConnection(kernel.connection_info, max_pending=2) as link,
        ):
            calls = [asyncio.create_task(link.request("list_programs")) for _ in range(2)]
            await wait_until(lambda: len(kernel.requests) == 2, what="both requests")
            with pytest.raises(errors.SessionLimitReached, match="2 calls waiting, the limit is 2"):
                await link.request("list_programs")
            assert (await link.request("cancel", {"request_id": "x"}))["cancelled"]
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    run(work())


def test_events_reach_the_call_that_listens_in_order_and_before_it_returns():
    async def work() -> None:
        async def stream(kernel: ScriptedKernel, message: dict[str, Any]) -> dict[str, Any] | None:
            if not message["content"]["stream"]:
                return ok()
            await kernel.reply("shell", message["idents"], message, "dspex_reply", ok({"done": True}))
            for n in range(3):
                await kernel.publish("dspex_event", {"event": "token", "sequence": n}, message)
            await kernel.publish("status", {"execution_state": "idle"}, message)
            return None

        async with ScriptedKernel(stream) as kernel, KernelConnection(kernel.connection_info) as link:
            events: list[dict[str, Any]] = []
            others: list[dict[str, Any]] = []
            first = link.request("execute_program", {"program_id": "p"}, stream=True, on_event=events.append)
            second = link.request("execute_program", {"program_id": "p"}, on_event=others.append)
            assert (await asyncio.gather(first, second))[0] == {"done": True}
            assert [e["sequence"] for e in events] == [0, 1, 2]
            assert others == []

    run(work())


def test_a_listener_that_fails_costs_its_events_and_nothing_else(caplog):
    async def work() -> None:
        async def stream(kernel: ScriptedKernel, message: dict[str, Any]) -> dict[str, Any]:
            await kernel.publish("dspex_event", {"event": "token"}, message)
            await kernel.publish("dspex_event", {"event": "token"}, message)
            await kernel.publish("status", {"execution_state": "idle"}, message)
            return ok({"done": True})

        seen: list[dict[str, Any]] = []

        def broken(event: dict[str, Any]) -> None:
            seen.append(event)
            raise RuntimeError("the caller's own fault")

        async with ScriptedKernel(stream) as kernel, KernelConnection(kernel.connection_info) as link:
            with caplog.at_level(logging.ERROR):
                assert await link.request("list_programs", stream=True, on_event=broken) == {"done": True}
            assert len(seen) == 1
            assert "the caller's own fault" in caplog.text

    run(work())


def test_another_kind_of_kernel_is_refused_before_anything_is_asked_of_it():
    async def work() -> None:
        async with (
            ScriptedKernel(features=("debugger",)) as kernel,
            KernelConnection(kernel.connection_info) as link,
        ):
            with pytest.raises(errors.NotADSPexKernel, match="is not a dspex kernel"):
                await link.identify(timeout=10)

    run(work())


def test_a_kernel_of_another_major_version_is_refused():
    async def work() -> None:
        about = {"session_id": "s1", "protocol_version": "2.0"}
        async with ScriptedKernel(about=about) as kernel, KernelConnection(kernel.connection_info) as link:
            with pytest.raises(errors.ProtocolMismatch, match=r"2\.0"):
                await link.identify(timeout=10)

    run(work())


def test_where_no_kernel_listens_the_answer_is_a_timeout():
    async def work() -> None:
        async with ScriptedKernel() as kernel:
            info = dict(kernel.connection_info)
        async with KernelConnection(info) as link:
            with pytest.raises(errors.CommandTimeout, match="is it running"):
                await link.kernel_info(timeout=0.2)

    run(work())


def test_a_request_over_the_limit_or_malformed_never_travels():
    async def work() -> None:
        async with ScriptedKernel() as kernel, KernelConnection(kernel.connection_info) as link:
            with pytest.raises(errors.TooLarge):
                await link.request("execute_program", {"program_id": "p", "inputs": {"q": "x" * 9_000_000}})
            with pytest.raises(errors.InvalidMessage, match="timeout_s"):
                await link.request("list_programs", timeout=0)
            with pytest.raises(errors.InvalidMessage, match="session_id"):
                await link.request("list_programs", session_id="../etc")
            with pytest.raises(errors.UnknownCommand):
                await link.request("no_such_command")
            assert kernel.requests == []
            assert link.pending == 0

    run(work())


# The kernel's own channel


def channels(kernel: ScriptedKernel) -> list[str]:
    return [m["channel"] for m in kernel.requests if m["msg_type"] == "dspex_request"]


@pytest.mark.parametrize(
    ("transport", "curve", "scheme"),
    [("tcp", False, "tcp"), ("tcp", True, "tcp"), ("ipc", False, "unix"), ("ipc", True, "ipc")],
)
def test_commands_take_the_road_that_a_kernel_tells_of(transport, curve, scheme, tmp_path_factory):
    async def work() -> None:
        ip = address(transport, tmp_path_factory)
        async with (
            ScriptedKernel(transport=transport, ip=ip, curve=curve, road=True) as kernel,
            KernelConnection(kernel.connection_info) as link,
        ):
            assert (await link.identify(timeout=10))["endpoint"].startswith(f"{scheme}://")
            for command in ("list_programs", "get_stats", "list_programs"):
                assert await link.request(command) == {"args": {}}
            assert channels(kernel) == ["dspex", "control", "dspex"]
            assert link.strays == 0

    run(work())


@pytest.mark.parametrize(
    ("transport", "endpoint"),
    [
        *(("tcp", endpoint) for endpoint in (None, "", "nonsense", "tcp://127.0.0.1:1", "tcp://127.0.0.1:no-port")),
        *((transport, f"{scheme}:///nowhere/at-all") for transport in ("tcp", "ipc") for scheme in ("ipc", "unix")),
        *(("ipc", endpoint) for endpoint in ("unix://", "unix:///" + 30 * "long")),
    ],
)
def test_where_no_road_can_be_reached_commands_take_shell(transport, endpoint, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("dspex_kernels.sessions.kernel_connection.ROAD_TIMEOUT", 0.1)

    async def work() -> None:
        about = {**ABOUT, "endpoint": endpoint}
        ip = address(transport, tmp_path_factory)
        async with (
            ScriptedKernel(about=about, transport=transport, ip=ip) as kernel,
            KernelConnection(kernel.connection_info) as link,
        ):
            assert (await link.identify(timeout=10))["session_id"] == "s1"
            await link.request("list_programs")
            assert channels(kernel) == ["shell"]
            assert link.strays == 0

    run(work())


def test_a_unix_socket_that_a_kernel_tells_of_over_tcp_is_not_taken(tmp_path_factory):
    async def work() -> None:
        ip = address("ipc", tmp_path_factory)
        async with (
            ScriptedKernel(transport="ipc", ip=ip, road=True) as beside,
            ScriptedKernel(about=beside.about) as kernel,
            KernelConnection(kernel.connection_info) as link,
        ):
            assert (await link.identify(timeout=10))["endpoint"].startswith("unix://")
            await link.request("list_programs")
            assert channels(kernel) == ["shell"]
            assert beside.requests == []

    run(work())


@pytest.mark.parametrize("listens", [False, True], ids=["of a killed kernel", "of one that starts"])
def test_where_nobody_answers_on_its_road_a_kernel_is_asked_over_control(listens, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("dspex_kernels.sessions.kernel_connection.ROAD_TIMEOUT", 0.1)

    async def work() -> None:
        ip = address("ipc", tmp_path_factory)
        with socket.socket(socket.AF_UNIX) as silent:
            silent.settimeout(10)
            silent.bind(config.road_path(ip))
            if listens:
                silent.listen()
            else:
                silent.close()
            async with (
                ScriptedKernel(transport="ipc", ip=ip) as kernel,
                KernelConnection(kernel.connection_info) as link,
            ):
                assert (await link.identify(timeout=10))["session_id"] == "s1"
                await link.request("list_programs")
                if listens:
                    with contextlib.closing(UnixPeer(silent.accept()[0])) as asked:
                        assert asked.receive()
                        with pytest.raises(EOFError):  # it was asked once, and left
                            asked.receive()
                kernel.open_road()
                await link.identify(timeout=10)
                await link.request("list_programs")
                assert channels(kernel) == ["shell", "dspex"]

    run(work())


@pytest.mark.parametrize("why", ["another key", "another kernel"])
def test_a_road_at_which_another_answers_is_not_taken(why, monkeypatch):
    monkeypatch.setattr("dspex_kernels.sessions.kernel_connection.ROAD_TIMEOUT", 0.3)

    async def work() -> None:
        async with ScriptedKernel(road=True) as other, ScriptedKernel() as kernel:
            if why == "another key":
                other.session.key = b"another key"
                kernel.about = other.about
            else:
                kernel.about = {**other.about, "kernel_id": "mine"}
            async with KernelConnection(kernel.connection_info) as link:
                await link.identify(timeout=10)
                await link.request("list_programs")
                assert channels(kernel) == ["shell"]
                assert other.requests == []

    run(work())


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_a_road_that_is_gone_leaves_the_commands_to_shell_until_the_new_one_is_found(transport, tmp_path_factory):
    async def work() -> None:
        async with (
            ScriptedKernel(transport=transport, ip=address(transport, tmp_path_factory), road=True) as kernel,
            KernelConnection(kernel.connection_info, grace=0.05) as link,
        ):
            await link.identify(timeout=10)
            kernel.close_road()
            await wait_until(lambda: link._road is None, what="the road's end noticed")
            await link.request("list_programs", timeout=10)
            assert channels(kernel)[-1] == "shell"
            kernel.open_road("dspex of the restarted")
            await link.identify(timeout=10)
            await link.request("list_programs", timeout=10)
            assert channels(kernel)[-1] == "dspex of the restarted"

    run(work())


def test_what_a_unix_road_cannot_take_any_more_takes_shell_at_once(tmp_path_factory):
    async def work() -> None:
        ip = address("ipc", tmp_path_factory)
        async with (
            ScriptedKernel(transport="ipc", ip=ip, road=True) as kernel,
            KernelConnection(kernel.connection_info, may_restart=False) as link,
        ):
            await link.identify(timeout=10)
            kernel.close_road()
            await link.request("list_programs")
            await link.request("list_programs")
            assert channels(kernel) == ["shell", "shell"]

    run(work())


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_while_a_call_waits_on_shell_those_that_follow_stay_behind_it(transport, tmp_path_factory):
    async def work() -> None:
        release = asyncio.Event()

        async def answer(kernel: ScriptedKernel, message: dict[str, Any]) -> dict[str, Any]:
            if message["content"]["command"] == "execute_program":
                await release.wait()
            return ok()

        async with (
            ScriptedKernel(answer, transport=transport, ip=address(transport, tmp_path_factory)) as kernel,
            KernelConnection(kernel.connection_info) as link,
        ):
            first = asyncio.create_task(link.request("execute_program", {"program_id": "p"}))
            await wait_until(lambda: kernel.requests, what="the request")
            kernel.open_road()
            await link.identify(timeout=10)
            await link.request("list_programs")
            release.set()
            await first
            await link.request("list_programs")
            assert channels(kernel) == ["shell", "shell", "dspex"]

    run(work())


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_on_the_road_a_dead_kernel_answers_everyone_and_a_cancel_takes_control(transport, tmp_path_factory):
    async def work() -> None:
        ip = address(transport, tmp_path_factory)
        async with (
            ScriptedKernel(silent_but_for_control, transport=transport, ip=ip, road=True) as kernel,
            KernelConnection(kernel.connection_info) as link,
        ):
            await link.identify(timeout=10)
            calls = [asyncio.create_task(link.request("execute_program", {"program_id": "p"})) for _ in range(3)]
            await wait_until(lambda: channels(kernel) == ["dspex"] * 3, what="the requests")
            calls[0].cancel()
            await wait_until(lambda: channels(kernel)[3:] == ["control"], what="the cancel")
            link.fail_all(lambda row: errors.KernelDied("gone"))
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(o) for o in outcomes] == [asyncio.CancelledError, errors.KernelDied, errors.KernelDied]

    run(work())
