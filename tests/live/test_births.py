"""What a kernel that was forked knows of others that were forked before it: nothing."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from tests.live.kernels import LiveKernel
from tests.lm_server import LMServer
from tests.waiting import wait_for

CANARIES = ("sk-canary-of-the-key", "canary-of-the-prompt", "canary-of-the-cell", "canary-of-the-environment")
CHUNK = 1 << 20


def memory_of(pid: int) -> bytes:
    """What a process can write to, all of it: its heap, its stacks, its buffers."""
    parts = []
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            region, access = line.split()[:2]
            if "w" in access:
                start, end = (int(bound, 16) for bound in region.split("-"))
                for at in range(start, end, CHUNK):
                    with contextlib.suppress(OSError):  # it was given back meanwhile
                        parts.append(os.pread(memory.fileno(), min(CHUNK, end - at), at))
    return b"".join(parts)


def found_in(pid: int) -> set[str]:
    memory = memory_of(pid)
    return {canary for canary in CANARIES if canary.encode() in memory}


@pytest.mark.parametrize("birth", ["standby"], indirect=True)
def test_no_prompt_key_variable_or_cell_of_one_kernel_is_in_the_memory_of_another(birth, lm_server: LMServer):
    with LiveKernel(env={"CANARY": CANARIES[3]}) as first:
        lm = {"model": "openai/canary-model", "api_base": lm_server.api_base, "api_key": CANARIES[0]}
        first.result("configure", {"lm": lm})
        first.result("create_program", {"id": "qa", "signature": "question -> answer"})
        first.result("execute_program", {"program_id": "qa", "inputs": {"question": CANARIES[1]}})
        first.run(f"kept = {CANARIES[2]!r}")
        assert found_in(first.pid) == set(CANARIES), "what is looked for can be found"
        (server,) = [
            one for one in first.manager.provisioner._guardian.fork_servers.all() if first.pid not in one.standby
        ][-1:]
        with LiveKernel() as second:
            standing = wait_for(lambda: server.standby, what="a kernel that stands by")
            assert second.result("inspect_history", {"n": 10})["entries"] == []
            assert second.result("list_programs")["programs"] == []
            found = {pid: found_in(pid) for pid in (server.pid, second.pid, *standing)}
            assert not set().union(*found.values()), found


@pytest.mark.parametrize("birth", ["forked", "standby"], indirect=True)
def test_ids_random_numbers_and_the_history_begin_anew_in_each_kernel(birth):
    code = (
        "import random, uuid, dspy, os, json; from dspy.clients import base_lm; kernel = get_ipython().kernel; "
        "print(json.dumps([random.random(), str(uuid.uuid4()), kernel.session.session, kernel.ident, "
        "kernel.session.key.decode()]), base_lm.GLOBAL_HISTORY == [], 'cache' in vars(dspy) and 0)"
    )
    told = []
    for _ in range(2):
        with LiveKernel() as kernel:
            cell = kernel.execute(code)
            assert kernel.reply(cell)["status"] == "ok"
            told.append(wait_for(lambda kernel=kernel, cell=cell: kernel.output(cell), what="output"))
    first, second = (text.partition("] ") for text in told)
    assert first[2] == second[2]
    assert not set(eval(first[0] + "]")) & set(eval(second[0] + "]"))


@pytest.mark.parametrize("birth", ["forked"], indirect=True)
def test_a_forked_kernel_has_no_descriptor_of_the_fork_servers(birth):
    with LiveKernel() as kernel:
        (server,) = kernel.manager.provisioner._guardian.fork_servers.all()[-1:]

        def sockets(pid: int) -> set[str]:
            links = (os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir())  # noqa: PTH115  # a number
            return {link for link in links if link.startswith("socket:")}

        assert server.pid is not None
        assert not sockets(server.pid) & sockets(kernel.pid)
