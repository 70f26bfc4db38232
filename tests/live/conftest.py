"""Kernels for the tests that need real ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dspex_kernels.sessions import spares
from tests.live.births import birth
from tests.live.kernels import LiveKernel

__all__ = ["birth"]  # a fixture for every test here


@pytest.fixture(autouse=True)
def no_spare_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services start none ahead: in hundreds of tests that takes a minute. They have tests of their own."""
    monkeypatch.setattr(spares, "QUIET", 3600.0)


@pytest.fixture(scope="module")
def kernel() -> Iterator[LiveKernel]:
    """A dedicated kernel as a notebook starts it, one for the tests of a module."""
    with LiveKernel() as kernel:
        yield kernel


@pytest.fixture
def offline(kernel: LiveKernel) -> LiveKernel:
    """The module's kernel, reset, with the offline LM."""
    kernel.result("reset")
    kernel.result("configure", {"lm": {"model": "offline/echo", "cache": False}})
    return kernel
