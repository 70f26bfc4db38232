"""A pooled kernel by itself: sessions come and go, none delays another, changes travel in replies, no code runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zmq
from jupyter_client.manager import KernelManager
from pydantic import TypeAdapter

from dspex_kernels.protocol import limits
from dspex_kernels.protocol.records import Change, SessionContents
from tests.live.kernels import LiveKernel, plugin_path
from tests.waiting import wait_for

POOLED = {"DSPEX_BACKEND": "pooled"}
ECHO = {"settings": {"lm": {"model": "offline/echo", "cache": False}}}
CREATE = {"program_id": "qa", "signature": "question -> answer"}
RUN = {"program_id": "qa", "inputs": {"question": "?"}}


@pytest.fixture(scope="module")
def pooled() -> Iterator[LiveKernel]:
    """A pooled kernel, which knows the plugin's blocking programs."""
    with LiveKernel(env={**POOLED, "PYTHONPATH": plugin_path()}) as kernel:
        yield kernel


class Fifo:
    """What programs wait for, until ``open``."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path

    def open(self) -> None:
        """Let go whoever waits; who comes later does not wait."""
        self.path.rename(self.path.with_suffix(".gone"))
        self.path.touch()
        with suppress(OSError):  # nobody waits
            os.close(os.open(self.path.with_suffix(".gone"), os.O_WRONLY | os.O_NONBLOCK))


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Fifo]:
    fifo = Fifo(tmp_path / "fifo")
    yield fifo
    fifo.open()


def _blocking(kernel: LiveKernel, session_id: str, path: Path | str, module: str = "blocks") -> None:
    kernel.open_session(session_id, ECHO)
    args = {"program_id": "qa", "module": module, "module_args": {"fifo": str(path)}, "signature": None}
    kernel.result("create_program", args, session_id=session_id)


def _has_answered(kernel: LiveKernel, calls: int) -> bool:
    return bool(kernel.result("ping", control=True)["calls"] == calls)


def _stuck(kernel: LiveKernel) -> int:
    return int(kernel.result("ping", control=True)["stuck"])


def test_a_session_that_was_not_opened_is_refused_and_can_be_opened(pooled: LiveKernel) -> None:
    error = pooled.error("execute_program", RUN, session_id="opened-later")
    assert (error["code"], error["details"]["session_id"]) == ("session_status", "opened-later")
    pooled.open_session("opened-later", ECHO, generation=3)
    pooled.result("create_program", CREATE, session_id="opened-later")
    answer = pooled.ask("execute_program", RUN, session_id="opened-later")
    assert (answer["status"], answer["generation"]) == ("ok", 3)
    pooled.result("close_session", session_id="opened-later")
    assert pooled.error("close_session", session_id="opened-later")["code"] == "session_status"


def test_a_session_that_floods_with_blocking_programs_delays_no_other(pooled: LiveKernel, fifo: Fifo) -> None:
    _blocking(pooled, "flood", fifo.path)
    others = [f"other-{number}" for number in range(9)]
    for other in others:
        _blocking(pooled, other, "/dev/null")  # the same module, which returns at once
    flood = [pooled.send("execute_program", RUN, session_id="flood", timeout_s=60) for _ in range(100)]
    for _ in range(3):
        asked = [pooled.send("execute_program", RUN, session_id=other) for other in others]
        assert {pooled.reply(message)["status"] for message in asked} == {"ok"}
    assert not any(pooled.replies.get(message) for message in flood)
    fifo.open()
    assert [pooled.reply(message)["status"] for message in flood] == ["ok"] * 100


def test_a_program_that_blocks_for_ever_ends_at_its_deadline_and_counts_as_stuck_until_it_ends(
    pooled: LiveKernel, fifo: Fifo
) -> None:
    _blocking(pooled, "stuck", fifo.path)
    pooled.open_session("neighbour", ECHO)
    pooled.result("create_program", CREATE, session_id="neighbour")
    assert pooled.error("execute_program", RUN, session_id="stuck", timeout_s=0.2)["code"] == "timeout"
    wait_for(lambda: _stuck(pooled) == 1, what="the stuck call")
    assert pooled.result("execute_program", RUN, session_id="neighbour")["outputs"]
    pooled.result("close_session", session_id="stuck")
    assert _stuck(pooled) == 1, "its session went, its thread did not"
    fifo.open()
    wait_for(lambda: _stuck(pooled) == 0, what="the end of the stuck call")


def test_a_kernel_ends_when_it_is_told_to_though_a_program_blocks_for_ever(fifo: Fifo) -> None:
    with LiveKernel(env={**POOLED, "PYTHONPATH": plugin_path()}) as kernel:
        _blocking(kernel, "stuck", fifo.path)
        call = kernel.send("execute_program", RUN, session_id="stuck", timeout_s=60)
        wait_for(lambda: kernel.result("ping", control=True)["running"], what="the program")
        kernel.client.shutdown()
        assert kernel.reply(call)["error"]["code"] == "kernel_died"
        wait_for(lambda: not kernel.manager.is_alive(), deadline=20, what="the end of the process")


def test_a_command_loop_that_hangs_is_seen_by_pings(pooled: LiveKernel, fifo: Fifo) -> None:
    _blocking(pooled, "hangs", fifo.path, module="hangs")
    call = pooled.send("execute_program", RUN, session_id="hangs", timeout_s=60)
    wait_for(lambda: pooled.result("ping", control=True)["lag_s"] > 0.2, what="the lag")
    fifo.open()
    assert pooled.reply(call)["status"] == "ok"
    wait_for(lambda: pooled.result("ping", control=True)["lag_s"] < 0.2, what="the loop's return")


def test_every_command_of_a_client_that_reads_late_is_answered(pooled: LiveKernel) -> None:
    pooled.open_session("late-reader", ECHO)
    signature = {"inputs": [{"name": "q"}], "outputs": [{"name": "a"}], "instructions": "long " * 2000}
    pooled.result("create_program", {"program_id": "qa", "signature": signature}, session_id="late-reader")
    asked = pooled.result("ping", control=True)["calls"]
    content = {"command": "get_program", "args": {"program_id": "qa"}, "session_id": "late-reader"}
    with zmq.Context() as context, context.socket(zmq.DEALER) as reader:
        reader.linger = 0
        reader.connect(f"tcp://127.0.0.1:{pooled.manager.shell_port}")
        for sent in range(400, 3201, 400):  # in the end more than sockets hold by themselves
            for _ in range(400):
                pooled.client.session.send(reader, "dspex_request", content)
            wait_for(partial(_has_answered, pooled, asked + sent), what="the answers")
        answered = 0
        while answered < 3200 and reader.poll(5000):
            reader.recv_multipart()
            answered += 1
    assert answered == 3200
    pooled.result("close_session", session_id="late-reader")


def test_what_calls_change_travels_in_their_replies_once_and_in_order(pooled: LiveKernel) -> None:
    pooled.open_session("changing", ECHO)
    asked = []
    for number in range(20):
        program_id = f"p{number % 5}"
        args = {**CREATE, "program_id": program_id, "replace": True}
        asked.append(pooled.send("create_program", args, session_id="changing"))
        if number % 7 == 6:
            asked.append(pooled.send("delete_program", {"program_id": program_id}, session_id="changing"))
        if number == 10:
            asked.append(pooled.send("configure", {"budget": {"lm_calls": 5}}, session_id="changing"))
    for message in asked:
        pooled.reply(message)
    arrived = [replies[0]["content"] for message, replies in pooled.replies.items() if message in asked]
    change = TypeAdapter[Any](Change)
    carried = [change.validate_python(told) for content in arrived for told in content["changes"]]
    stored = SessionContents.model_validate(ECHO)
    for told in carried:
        stored.apply(told)
    assert sum(told.change != "spent" for told in carried) == len(asked)
    listed = pooled.result("list_programs", session_id="changing")["programs"]
    assert {p["program_id"]: p["versions"] for p in listed} == {
        program_id: [record.version for record in records] for program_id, records in stored.programs.items()
    }
    assert stored.settings.budget.lm_calls == 5
    assert stored.spent.ok == len(asked)
    again = pooled.ask("list_programs", session_id="changing")["changes"]
    assert [told["change"] for told in again] == ["spent"], "what was told is not told again"


def test_statistics_budget_and_programs_go_on_where_a_session_is_opened_again(pooled: LiveKernel) -> None:
    stored = SessionContents.model_validate(ECHO)
    change = TypeAdapter[Any](Change)

    def ask(command: str, args: dict[str, Any]) -> dict[str, Any]:
        answer = pooled.ask(command, args, session_id="comes-and-goes")
        for told in answer["changes"]:
            stored.apply(change.validate_python(told))
        return answer

    pooled.open_session("comes-and-goes", ECHO)
    ask("create_program", CREATE)
    ask("configure", {"budget": {"lm_calls": 3}})
    assert ask("execute_program", RUN)["status"] == "ok"
    assert ask("execute_program", {"program_id": "none", "inputs": {}})["status"] == "error"
    before = pooled.result("get_stats", session_id="comes-and-goes", control=True)
    closed = pooled.result("close_session", session_id="comes-and-goes")
    assert closed["spent"] == stored.spent.model_dump(mode="json")
    pooled.open_session("comes-and-goes", stored.model_dump(mode="json"), generation=2)
    after = pooled.result("get_stats", session_id="comes-and-goes", control=True)
    changing = {"last_activity", "kernel_memory_bytes", "created_at"}
    assert {k: v for k, v in after.items() if k not in changing} == {
        k: v for k, v in before.items() if k not in changing
    }
    assert ask("execute_program", RUN)["status"] == ask("execute_program", RUN)["status"] == "ok"
    assert ask("execute_program", RUN)["error"]["code"] == "budget_exceeded"


def test_a_session_larger_than_a_request_may_be_can_be_opened(pooled: LiveKernel) -> None:
    pooled.open_session("small", ECHO)
    pooled.result("create_program", CREATE, session_id="small")
    record = pooled.result("export_program", {"program_id": "qa"}, session_id="small")["record"]
    record["spec"]["signature"]["instructions"] = "Answer. " * 20_000
    programs = {f"p{number}": [{**record, "program_id": f"p{number}"}] for number in range(60)}
    assert len(str(programs)) > limits.MAX_REQUEST_BYTES
    pooled.open_session("large", {**ECHO, "programs": programs})
    assert pooled.result("list_programs", session_id="large")["count"] == 60
    assert pooled.result("execute_program", {**RUN, "program_id": "p59"}, session_id="large")["outputs"]
    pooled.result("close_session", session_id="large")


def test_ping_tells_of_activity_and_health_checks_are_none(pooled: LiveKernel) -> None:
    pooled.open_session("active", ECHO)
    first = pooled.result("ping", control=True)
    pooled.result("get_stats", session_id="active", control=True)
    pooled.result("collect_spent", control=True)
    assert pooled.result("ping", control=True)["last_activity"] == first["last_activity"]
    pooled.result("list_programs", session_id="active")
    after = pooled.result("ping", control=True)
    assert after["calls"] == first["calls"] + 1
    assert datetime.fromisoformat(after["last_activity"]).tzinfo is not None
    assert after["last_activity"] != first["last_activity"]
    assert after["clients"] == 1, "this test's own"
    assert not after["busy"]


def test_a_running_cell_and_its_listeners_are_seen_from_outside(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with LiveKernel() as kernel:
        assert kernel.result("ping", control=True)["last_activity"] is None
        cell = kernel.execute(f"open({str(tmp_path / 'fifo')!r}).read()")
        wait_for(lambda: kernel.result("ping", control=True)["busy"], what="the cell")
        other = kernel.manager.blocking_client()
        other.start_channels()
        wait_for(lambda: kernel.result("ping", control=True)["clients"] == 2, what="the other client")
        other.stop_channels()
        wait_for(lambda: kernel.result("ping", control=True)["clients"] == 1, what="its end")
        (tmp_path / "fifo").write_text("")
        assert kernel.reply(cell)["status"] == "ok"
        wait_for(lambda: not kernel.result("ping", control=True)["busy"], what="the cell's end")
        assert kernel.result("ping", control=True)["last_activity"] is not None
        assert kernel.error("close_session")["code"] == "session_mismatch"


@pytest.mark.parametrize("env", [POOLED, {"DSPEX_ALLOW_CODE": "0"}], ids=["pooled", "dedicated"])
def test_a_kernel_that_takes_data_only_refuses_code_the_jupyter_way(env: dict[str, str]) -> None:
    manager = KernelManager(kernel_name="dspex")
    manager.start_kernel(env={**os.environ, **env})
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        info = client.kernel_info(reply=True, timeout=20)["content"]
        assert info["supported_features"] == ["dspex"]
        assert info["dspex"]["allow_code"] is False
        refused = [
            client.execute("1 + 1", reply=True, timeout=20, user_expressions={"x": "1"}),
            client.complete("pri", reply=True, timeout=20),
            client.inspect("print", reply=True, timeout=20),
            client.history(reply=True, timeout=20),
        ]
        for msg_type in ("execute_request", "debug_request", "create_subshell_request"):
            message = client.session.msg(msg_type, {"code": "1", "type": "request", "command": "initialize"})
            client.control_channel.send(message)
            refused.append(client.control_channel.get_msg(timeout=20))
        for reply in refused:
            content = reply["content"]
            assert (content["status"], content["ename"]) == ("error", "PolicyDenied"), reply["msg_type"]
            assert "takes data only" in content["evalue"]
        client.shell_channel.send(client.session.msg("comm_open", {"comm_id": "1", "target_name": "x", "data": {}}))
        client.is_complete("if True:")
        assert client.get_shell_msg(timeout=20)["content"]["status"] == "incomplete"
        shown = wait_for(
            lambda: [m for m in [client.get_iopub_msg(timeout=5)] if m["msg_type"] == "error"], what="the error"
        )
        assert shown[0]["content"]["ename"] == "PolicyDenied"
        client.shell_channel.send(client.session.msg("dspex_request", {"command": "ping"}))
        assert client.shell_channel.get_msg(timeout=20)["content"]["status"] == "ok", "commands work"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.context.destroy(linger=0)
