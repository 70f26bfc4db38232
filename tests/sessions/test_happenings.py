"""What happens is told to every listener, whatever one of them does, under names of bounded number."""

from __future__ import annotations

import asyncio
import logging

import pytest

from dspex_kernels import errors
from dspex_kernels.protocol.commands import COMMANDS
from dspex_kernels.sessions import happenings
from dspex_kernels.sessions.happenings import (
    Happening,
    Listeners,
    SessionCreated,
    known_command,
    known_outcome,
    outcome_of,
)

log = logging.getLogger("tests.happenings")
CREATED = SessionCreated(backend="pooled", session_id="s")


class TestListeners:
    def test_each_is_told_once_in_order_until_it_is_removed(self):
        listeners, told = Listeners(log), []
        first, second = (lambda happening: told.append(("first", happening))), (lambda _: told.append("second"))
        for listener in (first, second, first):
            listeners.add(listener)
        listeners.tell(CREATED)
        assert told == [("first", CREATED), "second"]
        listeners.remove(first)
        listeners.remove(first)
        listeners.tell(CREATED)
        assert told[2:] == ["second"]

    def test_one_that_raises_is_logged_and_the_others_are_told(self, caplog):
        listeners, told = Listeners(log), []

        def broken(happening: Happening) -> None:
            raise RuntimeError("no disk left for the audit")

        listeners.add(broken)
        listeners.add(told.append)
        listeners.tell(CREATED)
        assert told == [CREATED]
        (record,) = caplog.records
        assert "a listener failed at SessionCreated" in record.getMessage()
        assert record.exc_info is not None
        assert "no disk left" in str(record.exc_info[1])

    def test_one_may_leave_while_it_is_told(self):
        listeners, told = Listeners(log), []

        def once(happening: Happening) -> None:
            told.append(happening)
            listeners.remove(once)

        listeners.add(once)
        listeners.add(told.append)
        listeners.tell(CREATED)
        listeners.tell(CREATED)
        assert told == [CREATED] * 3


class TestNames:
    @pytest.mark.parametrize(
        ("failure", "outcome"),
        [
            (None, "ok"),
            (errors.PoolSaturated("full"), "pool_saturated"),
            (errors.ProviderFailure("slow down", code="rate_limit"), "rate_limit"),
            (asyncio.CancelledError(), "cancelled"),
            (ZeroDivisionError(), "internal_error"),
        ],
    )
    def test_an_outcome_is_ok_or_a_code(self, failure, outcome):
        assert outcome_of(failure) == outcome
        assert known_outcome(outcome) == outcome

    def test_every_code_of_ours_and_every_command_is_known_and_nothing_else(self):
        assert all(known_outcome(code) == code for code in errors.by_code())
        assert all(known_command(name) == name for name in COMMANDS)
        assert known_outcome("a provider's own") == known_command("'; drop table") == "other"

    def test_every_code_of_dspys_is_known(self):
        from dspy.utils import exceptions

        def codes(cls: type) -> set[str]:
            below = set().union(*(codes(child) for child in cls.__subclasses__()))
            return below | ({cls.default_code} if cls.default_code else set())

        assert codes(exceptions.DSPyError) - happenings.OUTCOMES == set()
        assert happenings.DSPY_CODES - codes(exceptions.DSPyError) == set()

    def test_a_happening_cannot_be_changed(self):
        with pytest.raises(AttributeError):
            CREATED.session_id = "another"
