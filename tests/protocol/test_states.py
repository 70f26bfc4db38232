"""The table of session states: its moves happen, and no others."""

from __future__ import annotations

import pytest

from dspex_kernels import errors
from dspex_kernels.protocol.states import MOVES, SessionStatus, move

PAIRS = [(status, target) for status in SessionStatus for target in SessionStatus]


@pytest.mark.parametrize(("status", "target"), PAIRS, ids=lambda status: str(status))
def test_a_session_goes_where_the_table_lets_it_and_nowhere_else(
    status: SessionStatus, target: SessionStatus
) -> None:
    if target in MOVES[status]:
        assert move("s", status, target) is target
    else:
        with pytest.raises(errors.SessionNotReady, match=f"'s' is {status} and cannot become {target}") as caught:
            move("s", status, target)
        assert caught.value.details == {"status": str(status), "target": str(target)}


def test_every_state_is_in_the_table() -> None:
    assert set(MOVES) == set(SessionStatus)


def test_the_moves_are_these() -> None:
    drawn = """
    starting: destroyed failed hibernated ready
    ready: destroyed failed hibernated starting
    hibernated: destroyed starting
    failed: destroyed hibernated starting
    destroyed:
    """
    table = "\n".join(f"{status}: {' '.join(sorted(MOVES[status]))}".strip() for status in SessionStatus)

    assert table.split() == drawn.split()


def test_whoever_is_not_destroyed_can_be_and_whoever_is_stays_so() -> None:
    assert all(SessionStatus.DESTROYED in MOVES[s] for s in SessionStatus if s is not SessionStatus.DESTROYED)
    assert MOVES[SessionStatus.DESTROYED] == frozenset()


def test_every_state_can_be_reached_from_the_first() -> None:
    reached, ahead = set(), {SessionStatus.STARTING}
    while ahead:
        reached |= ahead
        ahead = {target for status in ahead for target in MOVES[status]} - reached

    assert reached == set(SessionStatus)


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        MOVES[SessionStatus.DESTROYED] = frozenset()  # type: ignore[index]  # the very thing asked about
