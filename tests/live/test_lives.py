"""A kernel's life takes the same turns however it was born: calls are cancelled, it is killed, it starts anew."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
from traitlets.config import Config

from tests.live.kernels import LiveKernel
from tests.waiting import wait_for

PROMPT = 0.1  # seconds until a cancel takes effect: the bound
GRACE = 0.4  # more, for two shared cores
LIMIT = 1 << 30  # bytes: threads' own heaps alone are 64 MiB of address space each


@pytest.fixture
def kernel(birth: str) -> Iterator[LiveKernel]:
    """A kernel of each birth, for one test: it is another one after a restart."""
    with LiveKernel() as kernel:
        yield kernel


@pytest.fixture
def calling(kernel: LiveKernel) -> str:
    """A call that waits for its LM, in a session with programs of a client and of a cell."""
    slow = {"model": "offline/echo", "cache": False, "offline": {"latency_s": 30}}
    kernel.result("configure", {"lm": slow, "budget": {"lm_calls": 5}})
    kernel.result("create_program", {"id": "by_client", "signature": "question -> answer"})
    kernel.run('%dspex create by_magic "question -> answer" --module ChainOfThought')
    call = kernel.send("execute_program", {"id": "by_client", "inputs": {"question": "?"}}, request_id="slow-one")
    kernel.wait_for_state(call, "busy")
    return call


def programs(kernel: LiveKernel) -> list[str]:
    return [program["program_id"] for program in kernel.result("list_programs")["programs"]]


def test_a_cancel_is_answered_and_ends_the_call_at_once(kernel: LiveKernel, calling: str) -> None:
    began = time.monotonic()
    assert kernel.result("cancel", {"request_id": "slow-one"}, control=True) == {"cancelled": True}
    answer = kernel.reply(calling)
    assert time.monotonic() - began < PROMPT + GRACE
    assert (answer["status"], answer["error"]["code"]) == ("aborted", "cancelled")
    again = {"request_id": "slow-one"}  # it ends a moment after its answer
    wait_for(lambda: kernel.result("cancel", again, control=True) == {"cancelled": False}, what="its end")
    assert len(kernel.replies[calling]) == 1


def test_a_restart_keeps_programs_settings_and_what_was_spent_whoever_made_them(kernel: LiveKernel) -> None:
    kernel.result("configure", {"lm": "offline/echo", "adapter": "json", "budget": {"lm_calls": 5}})
    kernel.result("create_program", {"id": "by_client", "signature": "question -> answer"})
    kernel.run('%dspex create by_magic "question -> answer" --module ChainOfThought')
    kernel.result("execute_program", {"id": "by_client", "inputs": {"question": "?"}})
    former = kernel.pid
    kernel.restart()
    assert kernel.pid != former
    assert programs(kernel) == ["by_client", "by_magic"]
    cell = kernel.execute("print(type(dspy.settings.adapter).__name__)")
    kernel.wait_for_state(cell, "idle")
    assert kernel.output(cell).strip() == "JSONAdapter"
    kernel.result("execute_program", {"id": "by_magic", "inputs": {"question": "?"}})
    for number in range(3):
        kernel.result("execute_program", {"id": "by_client", "inputs": {"question": str(number)}})
    error = kernel.error("execute_program", {"id": "by_client", "inputs": {"question": "one more"}})
    assert error["code"] == "budget_exceeded"


def test_a_killed_kernel_is_seen_to_have_died_and_starts_again_with_its_programs(
    kernel: LiveKernel, calling: str
) -> None:
    former = kernel.pid
    os.kill(former, signal.SIGKILL)
    wait_for(lambda: not kernel.manager.is_alive(), what="the death to be noticed")
    kernel.restart()
    assert kernel.pid != former
    assert programs(kernel) == ["by_client", "by_magic"]
    assert kernel.result("get_stats")["budget"]["lm_calls"] == 5


def test_a_shutdown_answers_what_runs(kernel: LiveKernel, calling: str) -> None:
    kernel.client.shutdown()
    assert kernel.reply(calling)["error"]["code"] == "kernel_died"


@pytest.mark.usefixtures("birth")
def test_a_command_that_needs_more_memory_than_the_kernel_may_have_says_so_and_the_kernel_lives_on() -> None:
    limited = Config({"ForkServerProvisioner": {"memory_limit": LIMIT}})
    with LiveKernel(config=limited) as kernel:
        kernel.result("configure", {"lm": "offline/echo"})
        kernel.run(
            "import dspy\n"
            "class Fills(dspy.Module):\n"
            "    def forward(self, mib):\n"
            "        return dspy.Prediction(length=len(bytearray(mib << 20)))\n"
            "fills = Fills()\n%dspex add fills"
        )
        done = kernel.result("execute_program", {"id": "fills", "inputs": {"mib": 1}})
        assert done["outputs"]["length"] == 1 << 20
        error = kernel.error("execute_program", {"id": "fills", "inputs": {"mib": LIMIT >> 20}})
        assert (error["code"], error["details"]["memory_limit"]) == ("kernel_out_of_memory", LIMIT)
        assert "1,024 MiB" in error["message"]
        assert "memory_limit" in error["message"]
        assert kernel.result("list_programs")["programs"]
