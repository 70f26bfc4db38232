"""Ctrl-C ends what a person means, quickly, and never the kernel."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.live.births import BIRTHS, born
from tests.live.kernels import LiveKernel
from tests.waiting import wait_for

PROMPT = 0.3  # seconds until an interrupt takes effect: the bound
# A bound holds on a quiet machine; two shared cores are given this much more before a test fails.
GRACE = 0.7


@pytest.fixture(scope="module", params=BIRTHS)
def kernel(request: pytest.FixtureRequest) -> Iterator[LiveKernel]:
    """The module's kernel, of each birth."""
    with born(request.param), LiveKernel() as kernel:
        yield kernel


def _slow_lm(kernel: LiveKernel, seconds: float) -> None:
    offline = {"latency_s": seconds}
    kernel.result("configure", {"lm": {"model": "offline/slow", "cache": False, "offline": offline}})


@pytest.mark.parametrize(
    "code",
    [
        "import time; time.sleep(30)",
        "import asyncio; await asyncio.sleep(30)",
        "import asyncio, time; await asyncio.sleep(0); time.sleep(30)",
    ],
)
def test_an_interrupt_ends_a_cell_that_sleeps_or_awaits(kernel: LiveKernel, code: str) -> None:
    cell = kernel.execute(f"print('on'); {code}")
    wait_for(lambda: kernel.output(cell), what="the cell's first output")
    sent = kernel.interrupt()
    answer = kernel.reply(cell)
    assert time.monotonic() - sent < PROMPT + GRACE
    assert answer["status"] == "error"
    assert answer["ename"] in {"KeyboardInterrupt", "CancelledError"}
    # Jupyter aborts what comes at once after a cell that failed.
    wait_for(lambda: kernel.reply(kernel.execute("1 + 1"))["status"] == "ok", what="the next cell")


def test_an_interrupt_ends_a_command_that_waits_for_its_lm(offline: LiveKernel) -> None:
    _slow_lm(offline, 30)
    offline.result("create_program", {"id": "qa", "signature": "question -> answer"})
    call = offline.send("execute_program", {"id": "qa", "inputs": {"question": "?"}})
    offline.wait_for_state(call, "busy")
    sent = offline.interrupt()
    answer = offline.reply(call)
    assert time.monotonic() - sent < PROMPT + GRACE
    assert (answer["status"], answer["error"]["code"]) == ("aborted", "interrupted")
    assert offline.manager.is_alive()
    offline.result("ping", control=True)


def test_a_cells_interrupt_leaves_commands_running(offline: LiveKernel) -> None:
    _slow_lm(offline, 1.0)
    offline.result("create_program", {"id": "qa", "signature": "question -> answer"})
    call = offline.send("execute_program", {"id": "qa", "inputs": {"question": "?"}})
    offline.wait_for_state(call, "busy")
    cell = offline.execute("print('on'); import time; time.sleep(30)")
    wait_for(lambda: offline.output(cell), what="the cell's first output")
    offline.interrupt()
    assert offline.reply(cell)["ename"] == "KeyboardInterrupt"
    assert offline.reply(call)["status"] == "ok"


def test_an_interrupt_ends_a_magic_that_waits_and_its_command(offline: LiveKernel) -> None:
    _slow_lm(offline, 30)
    offline.result("create_program", {"id": "qa", "signature": "question -> answer"})
    cell = offline.execute("print('on')\n%dspex run qa question=hello")
    wait_for(lambda: offline.output(cell), what="the cell's first output")
    wait_for(lambda: offline.result("ping", control=True)["running"], what="the magic's command")
    offline.interrupt()
    assert offline.reply(cell)["ename"] == "KeyboardInterrupt"
    wait_for(lambda: not offline.result("ping", control=True)["running"], what="the end of the command")


def test_interrupts_between_messages_never_end_the_kernel(kernel: LiveKernel) -> None:
    pid = kernel.pid
    for number in range(20):
        cell = kernel.execute(f"{number}")
        kernel.interrupt()
        kernel.reply(cell)
    kernel.run("'alive'")
    assert kernel.pid == pid


def test_a_sigint_handler_of_a_cell_does_not_outlive_it(kernel: LiveKernel) -> None:
    kernel.run("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)")
    cell = kernel.execute("print('on'); import time; time.sleep(30)")
    wait_for(lambda: kernel.output(cell), what="the cell's first output")
    kernel.interrupt()
    assert kernel.reply(cell)["ename"] == "KeyboardInterrupt"


def test_an_interrupt_ends_a_completion_that_runs_the_notebooks_code_and_no_command(offline: LiveKernel) -> None:
    _slow_lm(offline, 2.0)
    offline.result("create_program", {"id": "qa", "signature": "question -> answer"})
    offline.run(
        "import time\nclass Slow:\n"
        "    def __dir__(self):\n        print('on'); time.sleep(30); return []\nslow = Slow()"
    )
    call = offline.send("execute_program", {"id": "qa", "inputs": {"question": "?"}})
    offline.wait_for_state(call, "busy")
    completion = offline.client.complete("slow.")
    wait_for(lambda: offline.output(completion), what="the completion's output")
    sent = offline.interrupt()
    offline.wait_for_state(completion, "idle")
    assert time.monotonic() - sent < PROMPT + GRACE
    assert offline.reply(call)["status"] == "ok"
