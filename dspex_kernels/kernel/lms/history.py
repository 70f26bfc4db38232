"""LM calls remembered per session, where DSPy has one list for the whole process.

DSPy appends every prompt and answer of the process to ``GLOBAL_HISTORY``, and ``dspy.inspect_history`` shows its
end to whoever asks. Our list in its place sends each entry to the session it belongs to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, SupportsIndex

from dspy.clients import base_lm

from dspex_kernels.kernel.lms.gate import current_call
from dspex_kernels.kernel.programs.values import to_json
from dspex_kernels.protocol.commands import HistoryEntry
from dspex_kernels.protocol.records import is_offline

MAX_ENTRIES = 200
"""LM calls remembered of each session."""


class SessionHistory:
    """Stands in for ``dspy.clients.base_lm.GLOBAL_HISTORY``: holds nothing itself."""

    def append(self, entry: dict[str, Any]) -> None:
        """Remember a call. Called by DSPy's ``record_history`` in the session's context."""
        call = current_call()
        if call is not None:
            call.namespace.history.append(entry)

    def pop(self, index: SupportsIndex = -1) -> dict[str, Any]:
        """Forget one. DSPy pops the oldest of a full list; ours are bounded by themselves."""
        entries = self._entries()
        entry = entries[index]
        del entries[index]
        return entry

    def clear(self) -> None:
        self._entries().clear()

    def __len__(self) -> int:
        return len(self._entries())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(list(self._entries()))

    def __getitem__(self, index: Any) -> Any:
        return list(self._entries())[index]

    @staticmethod
    def _entries() -> deque[dict[str, Any]]:
        call = current_call()
        return call.namespace.history if call is not None else deque()


def install() -> None:
    """Put the per-session history into DSPy. Called once, at the kernel's start."""
    base_lm.GLOBAL_HISTORY = SessionHistory()


def entry_to_data(entry: dict[str, Any]) -> HistoryEntry:
    """One remembered call as data."""
    messages = entry.get("messages") or [{"role": "user", "content": entry.get("prompt")}]
    usage = dict(entry.get("usage") or {})
    return HistoryEntry(
        timestamp=str(entry.get("timestamp", "")),
        model=str(entry.get("model", "")),
        messages=[dict(to_json(message)) for message in messages],
        outputs=[to_json(output) for output in entry.get("outputs") or []],
        usage=dict(to_json(usage)),
        cost=0.0 if is_offline(str(entry.get("model", ""))) else entry.get("cost"),
        cache_hit=not usage,  # DSPy empties the usage of an answer from its cache
    )
