"""Nothing of one session reaches another: 50 namespaces in 4 kernels, one question, one model name, cache on.

Each session has a key of its own; the server's answers carry a canary made from the key. Whatever a session is
told - replies, events, history, statistics - may hold its own canary and no other.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live.kernels import LiveKernel, plugin_path
from tests.lm_answers import canary as canary_of
from tests.lm_server import LMServer
from tests.waiting import wait_for

KERNELS, SESSIONS, EXECUTIONS = 4, 50, 2000
CANARY = re.compile(r"canary-[0-9a-f]{12}")
KINDS: list[dict[str, Any]] = [
    {"id": "predict", "signature": "question -> answer"},
    {"id": "reason", "signature": "question -> answer", "module": "ChainOfThought"},
    {"id": "agent", "signature": "question -> answer", "module": "ReAct", "tools": ["look_up"]},
    {"id": "snoop", "module": "snoop"},
]


def _key(session: str) -> str:
    return f"sk-of-{session}-0123456789"


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[list[LiveKernel]]:
    kernels: list[LiveKernel] = []
    try:
        for number in range(KERNELS):
            log = (tmp_path / f"kernel-{number}.log").open("wb")
            kernel = LiveKernel(
                env={"DSPEX_BACKEND": "pooled", "PYTHONPATH": plugin_path()}, output=log, arguments=["--debug"]
            )
            kernels.append(kernel.__enter__())
        yield kernels
    finally:
        for kernel in kernels:
            kernel.__exit__()


@pytest.mark.timeout(300)
def test_no_session_ever_sees_anothers_canary(
    pool: list[LiveKernel], make_lm_server: Callable[[], LMServer], tmp_path: Path
) -> None:
    servers = [make_lm_server(), make_lm_server()]
    home = {f"session-{n}": pool[n % KERNELS] for n in range(SESSIONS)}
    for number, (session, kernel) in enumerate(home.items()):
        server = servers[number % len(servers)]
        lm = {"model": "openai/canary-model", "api_base": server.api_base, "api_key": _key(session)}
        kernel.open_session(session)
        kernel.result("configure", {"lm": lm}, session_id=session)
        for kind in KINDS:
            kernel.result("create_program", kind, session_id=session)

    told: dict[str, list[str]] = {session: [] for session in home}
    # One after another first: what a session finds in the cache is then what the one before it was answered.
    for session, kernel in home.items():
        for kind in KINDS:
            args = {"id": kind["id"], "inputs": {"question": "the same for all, 0?"}}
            told[session].append(str(kernel.result("execute_program", args, session_id=session)))

    began = time.monotonic()
    sent: list[tuple[str, str]] = []  # (session, message id)
    for number in range(EXECUTIONS):
        session = f"session-{number % SESSIONS}"
        kind = KINDS[(number // SESSIONS) % len(KINDS)]["id"]
        args = {"id": kind, "inputs": {"question": f"the same for all, {number // (SESSIONS * len(KINDS)) % 3}?"}}
        stream = number % 3 == 0
        message = home[session].send("execute_program", args, session_id=session, stream=stream, timeout_s=120.0)
        sent.append((session, message))
    for kernel in pool:
        wait_for(
            lambda kernel=kernel: kernel.pump() or all(m in kernel.replies for s, m in sent if home[s] is kernel),
            deadline=200,
            what="all replies",
        )
    seconds = time.monotonic() - began

    for session, message in sent:
        (reply,) = home[session].replies[message]
        assert reply["content"]["status"] == "ok", reply["content"]
        told[session].append(str(reply["content"]))
    owner = {message: session for session, message in sent}
    for kernel in pool:
        for message in kernel.iopub:
            session = owner.get(message["parent_header"].get("msg_id", ""))
            text = str(message["content"])
            if session is None:
                assert not CANARY.search(text), message
            else:
                told[session].append(text)
    hits = 0
    for session, kernel in home.items():
        history = kernel.result("inspect_history", {"n": 1000}, session_id=session)
        assert history["count"] > 0
        told[session].append(str(history))
        stats = kernel.result("get_stats", control=True, session_id=session)
        assert stats["executions"] == EXECUTIONS // SESSIONS + len(KINDS)
        told[session].append(str(stats))
        hits += stats["cache_hits"]

    foreign = {
        session: found - {canary_of(_key(session))}
        for session, texts in told.items()
        if (found := set(CANARY.findall(" ".join(texts)))) != {canary_of(_key(session))}
    }
    assert foreign == {}
    logs = b"".join(path.read_bytes() for path in tmp_path.glob("*.log"))
    assert not CANARY.search(logs.decode()), "a log holds what sessions were told"
    assert b"sk-of-" not in logs
    requests = sum(len(server.requests) for server in servers)
    print(f"{EXECUTIONS} executions in {seconds:.1f} s, {requests} requests, {hits} answers from the cache")
    assert hits > 0
    for server in servers:
        keys = {request.api_key for request in server.requests}
        assert keys == {_key(f"session-{n}") for n in range(SESSIONS) if servers[n % 2] is server}
