"""What survives the garbage collector is set aside, and comes back when nobody wants that any more."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from dspex_kernels.sessions import garbage
from dspex_kernels.sessions.garbage import SurvivorsAside


class Ring:
    """Garbage in a cycle, once nobody holds it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def survivors() -> Iterator[SurvivorsAside]:
    survivors = SurvivorsAside()
    survivors.begin()
    yield survivors
    survivors.end()
    gc.collect()


def test_what_is_there_and_what_survives_is_gone_through_no_more(survivors):
    there = gc.get_freeze_count()
    assert there > 1000
    ring = Ring()
    gone = weakref.ref(ring)
    gc.collect()
    assert gc.get_freeze_count() > there
    del ring
    gc.collect()
    assert gone() is not None, "it was set aside"
    young = Ring()
    gone = weakref.ref(young)
    del young
    gc.collect()
    assert gone() is None, "it had survived nothing"


def test_a_young_pass_sets_nothing_aside(survivors):
    there = gc.get_freeze_count()
    rings = [Ring() for _ in range(50)]
    gc.collect(1)
    assert gc.get_freeze_count() <= there
    assert len(rings) == 50


def test_everything_is_gone_through_again_after_a_while(survivors, monkeypatch):
    ring = Ring()
    gc.collect()
    gone = weakref.ref(ring)
    del ring
    monkeypatch.setattr(garbage, "REVIEW_INTERVAL", 0.0)
    gc.collect()
    assert gone() is not None
    assert gc.get_freeze_count() == 0, "the next pass has it all"
    monkeypatch.undo()
    gc.collect()
    assert gone() is None
    assert gc.get_freeze_count() > 1000


def test_it_lasts_as_long_as_anybody_wants_it():
    survivors = SurvivorsAside()
    hooks = len(gc.callbacks)
    for _ in range(2):
        survivors.begin()
    assert len(gc.callbacks) == hooks + 1
    survivors.end()
    assert gc.get_freeze_count() > 0
    survivors.end()
    assert (len(gc.callbacks), gc.get_freeze_count()) == (hooks, 0)
