"""The gate's own parts; its work on the wire is tested in ``tests/live/test_gate.py``."""

from __future__ import annotations

import asyncio
from typing import Any

import dspy
import pytest
from dspy.clients import execution

from dspex_kernels import errors
from dspex_kernels.config import LMPolicy
from dspex_kernels.kernel.lms import gate


@pytest.mark.parametrize(
    ("owner", "seam"), [(execution, "_engine"), (execution.PreparedCall, "key"), (dspy.LM, "_reap_closed_loops")]
)
def test_a_dspy_without_the_seams_is_refused_by_its_version(
    monkeypatch: pytest.MonkeyPatch, owner: Any, seam: str
) -> None:
    monkeypatch.delattr(owner, seam)
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(errors.DependencyMissing, match=dspy.__version__):
            gate.install(loop, LMPolicy())
    finally:
        loop.close()


def test_connections_in_use_close_with_their_last_request() -> None:
    closings: list[str] = []
    connections = gate.Connections(lambda: closings.append("closed"))
    with connections.in_use() as before:
        with connections.in_use():
            connections.retire()
        assert closings == []
    assert (before, closings) == (0, ["closed"])


def test_a_request_after_the_closing_learns_of_it_and_closes_again() -> None:
    closings: list[str] = []
    connections = gate.Connections(lambda: closings.append("closed"))
    connections.retire()
    with connections.in_use() as closed:
        assert closed == 1
    assert closings == ["closed", "closed"]
