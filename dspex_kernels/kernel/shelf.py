"""What is kept built of all sessions of this process; what was not used for longest is given up first.

A record is small and a program is not: ten thousand sessions hold records, and the few that are at work hold
programs and language models.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Protocol

MAX_BUILT = 512
"""Programs and language models kept built in one process; others are built again when they are used."""


class Holder(Protocol):
    """Who holds what the shelf counts."""

    def give_up(self, key: Hashable) -> None:
        """Hold it no longer. Called by the shelf, which has forgotten it."""


class Shelf:
    """The order in which holders used what they hold. For one thread: the command loop's.

    Args:
        limit: How much is held at most.
    """

    def __init__(self, limit: int = MAX_BUILT) -> None:
        self._limit = limit
        self._used: OrderedDict[tuple[Holder, Hashable], None] = OrderedDict()

    def use(self, holder: Holder, key: Hashable) -> None:
        """``holder`` uses what it holds under ``key``, perhaps for the first time."""
        self._used[holder, key] = None
        self._used.move_to_end((holder, key))
        while len(self._used) > self._limit:
            (oldest, given_up), _ = self._used.popitem(last=False)
            oldest.give_up(given_up)

    def forget(self, holder: Holder, key: Hashable) -> None:
        """``holder`` holds it no longer."""
        self._used.pop((holder, key), None)

    def __len__(self) -> int:
        return len(self._used)
