"""The answer cache of a kernel: in memory, bounded, counted per session.

Which session's answer an entry is stands in its key (``gate.cache_salt``). There is no disk cache: DSPy's keeps
pickles, holds 48 descriptors open in each kernel, and is shared by every process of the user.
"""

from __future__ import annotations

from typing import Any

import dspy
from cachetools import LRUCache
from dspy.clients.cache import Cache

from dspex_kernels.kernel.lms.gate import current_call

MAX_ENTRIES = 10_000
"""Answers kept in one kernel, of all its sessions."""
MAX_BYTES = 32 * 1024 * 1024
"""Their size, about."""


class SessionCache(Cache):
    """DSPy's cache, bounded in bytes too, which also counts a session's hits."""

    def __init__(self) -> None:
        super().__init__(
            enable_disk_cache=False, enable_memory_cache=True, disk_cache_dir=None, memory_max_entries=MAX_ENTRIES
        )
        self.memory_cache: LRUCache[str, Any] = LRUCache(maxsize=MAX_BYTES, getsizeof=_size)

    def put(
        self,
        request: dict[str, Any],
        value: Any,
        ignored_args_for_cache_key: list[str] | None = None,
        enable_memory_cache: bool = True,
    ) -> None:
        """Keep an answer; one that is larger than the whole cache is not kept."""
        if _size(value) <= MAX_BYTES:
            super().put(request, value, ignored_args_for_cache_key, enable_memory_cache)

    def get(self, request: dict[str, Any], ignored_args_for_cache_key: list[str] | None = None) -> Any:
        answer = super().get(request, ignored_args_for_cache_key)
        call = current_call()
        if answer is not None and call is not None:
            call.namespace.ledger.record_cache_hit()
            call.ledger.record_cache_hit()
        return answer


def install() -> None:
    """Make it the process's cache. Called once, at the kernel's start."""
    dspy.cache = SessionCache()


def _size(answer: Any) -> int:
    # At least its share: that bounds the number of entries too.
    return max(MAX_BYTES // MAX_ENTRIES, len(repr(answer)))
