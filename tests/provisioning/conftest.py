"""A guardian for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dspex_kernels.provisioning.guardian_client import Guardian
from dspex_kernels.provisioning.guardians import Guardians


@pytest.fixture
def guardian(tmp_path: Path) -> Iterator[Guardian]:
    """A guardian of this process, with its directory ``tmp_path/services/tested``."""
    guardian = Guardians().open("tested", tmp_path / "services")
    guardian.ready.result(30)
    yield guardian
    guardian.stop().result(30)
