"""LM calls remembered per session, where DSPy has one list for the whole process.

DSPy appends every prompt and answer of the process to ``GLOBAL_HISTORY``, and ``dspy.inspect_history`` shows its
end to whoever asks. Our list in its place sends each entry to the session it belongs to.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from itertools import count
from typing import Any, ClassVar, SupportsIndex

from dspy.clients import base_lm

from dspex_kernels.kernel.lms.gate import current_call
from dspex_kernels.kernel.programs.values import to_json
from dspex_kernels.protocol.commands import HistoryEntry
from dspex_kernels.protocol.records import is_offline

MAX_ENTRIES = 200
"""LM calls remembered of each session."""
MAX_BYTES = 64 * 1024
"""Their size where sessions share a process, about; the last one is remembered whatever its size."""
MAX_BYTES_ALONE = 16 * 1024 * 1024
"""Their size where the session has the process to itself."""
MAX_TOTAL_BYTES = 32 * 1024 * 1024
"""The size of all sessions' entries, about; the oldest go first."""
ENTRY_BYTES = 1024
"""What an entry takes beside its texts, about."""


class History:
    """What one session asked its language models, newest last. Thread-safe.

    Args:
        max_bytes: Size of its entries, about.
    """

    __slots__ = ("_bytes", "_entries", "_max_bytes")

    # Guards all histories: entries of one are dropped for another's.
    _lock: ClassVar = threading.Lock()
    _numbers: ClassVar = count()
    _all: ClassVar[OrderedDict[int, History]] = OrderedDict()
    _all_bytes: ClassVar = 0

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: dict[int, tuple[dict[str, Any], int]] | None = None  # most sessions wait for their first

    def append(self, entry: dict[str, Any]) -> None:
        """Remember a call, and forget what is too much."""
        size = ENTRY_BYTES + sum(len(repr(entry.get(part))) for part in ("prompt", "messages", "outputs"))
        # The provider's response says again, in objects, what the outputs say.
        kept = {name: value for name, value in entry.items() if name != "response"}
        with self._lock:
            number = next(self._numbers)
            self._entries = self._entries or {}
            self._entries[number] = kept, size
            self._all[number] = self
            self._count(size)
            while len(self._entries) > 1 and (len(self._entries) > MAX_ENTRIES or self._bytes > self._max_bytes):
                self._drop(next(iter(self._entries)))
            while History._all_bytes > MAX_TOTAL_BYTES and len(self._all) > 1:
                oldest, history = next(iter(self._all.items()))
                history._drop(oldest)

    def entries(self) -> list[dict[str, Any]]:
        """The entries, newest last."""
        with self._lock:
            return [entry for entry, _ in (self._entries or {}).values()]

    def __len__(self) -> int:
        return len(self._entries or ())

    def pop(self, index: SupportsIndex) -> dict[str, Any]:
        """Forget one."""
        with self._lock:
            return self._drop(list(self._entries or ())[index])

    def clear(self) -> None:
        """Forget all. Called too when the session goes: its entries count against the others'."""
        with self._lock:
            for number in list(self._entries or ()):
                self._drop(number)

    def _drop(self, number: int) -> dict[str, Any]:
        assert self._entries is not None
        entry, size = self._entries.pop(number)
        del self._all[number]
        self._count(-size)
        return entry

    def _count(self, size: int) -> None:
        self._bytes += size
        History._all_bytes += size


class SessionHistory:
    """Stands in for ``dspy.clients.base_lm.GLOBAL_HISTORY``: holds nothing itself."""

    def append(self, entry: dict[str, Any]) -> None:
        """Remember a call. Called by DSPy's ``record_history`` in the session's context."""
        call = current_call()
        if call is not None:
            call.namespace.history.append(entry)

    def pop(self, index: SupportsIndex = -1) -> dict[str, Any]:
        """Forget one. DSPy pops the oldest of a full list; ours are bounded by themselves."""
        return self._history().pop(index)

    def clear(self) -> None:
        self._history().clear()

    def __len__(self) -> int:
        return len(self._history())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._history().entries())

    def __getitem__(self, index: Any) -> Any:
        return self._history().entries()[index]

    @staticmethod
    def _history() -> History:
        call = current_call()
        return call.namespace.history if call is not None else History()


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
