"""Remembered LM calls are bounded in number and bytes, per session and for the process; so are cached answers."""

from __future__ import annotations

from typing import Any

import pytest

from dspex_kernels.kernel.lms import cache, history
from dspex_kernels.kernel.lms.history import History


def _entry(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "outputs": [text], "response": object()}


def _texts(remembered: History) -> list[str]:
    return [entry["outputs"][0] for entry in remembered.entries()]


def test_a_session_remembers_so_many_calls_and_no_more() -> None:
    remembered = History(10**9)
    for number in range(history.MAX_ENTRIES + 3):
        remembered.append(_entry(str(number)))
    assert _texts(remembered) == [str(number) for number in range(3, history.MAX_ENTRIES + 3)]
    assert "response" not in remembered.entries()[-1]
    remembered.clear()
    assert _texts(remembered) == []


def test_a_session_remembers_so_many_bytes_and_its_last_call_always() -> None:
    remembered = History(50_000)
    for letter in "abcd":
        remembered.append(_entry(letter * 10_000))
    assert [text[0] for text in _texts(remembered)] == ["c", "d"]
    remembered.append(_entry("e" * 100_000))
    assert [text[0] for text in _texts(remembered)] == ["e"]
    remembered.clear()


def test_all_sessions_together_remember_so_many_bytes_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_TOTAL_BYTES", 100_000)
    sessions = [History() for _ in range(10)]
    for number, session in enumerate(sessions):
        session.append(_entry(f"{number}" * 10_000))
    assert [len(_texts(session)) for session in sessions] == [0] * 6 + [1] * 4
    for session in sessions:
        session.clear()
    assert History._all_bytes == 0
    assert not History._all


def test_cached_answers_are_bounded_in_bytes_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_BYTES", 10_000)
    monkeypatch.setattr(cache, "MAX_ENTRIES", 10)
    kept = cache.SessionCache()
    for number in range(30):
        kept.put({"prompt": number}, "small")
    assert len(kept.memory_cache) == 10
    kept.put({"prompt": "large"}, "x" * 8_000)
    assert len(kept.memory_cache) <= 3
    assert kept.get({"prompt": "large"}) == "x" * 8_000
    kept.put({"prompt": "too large"}, "x" * 20_000)
    assert kept.get({"prompt": "too large"}) is None
