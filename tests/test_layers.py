"""The layers hold: who may import whom, and what importing the package costs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("dspy", "IPython", "ipykernel", "zmq", "sqlalchemy", "tornado", "pydantic", "jupyter_client")


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after ``code``."""
    show = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_every_contract_of_the_layers_is_kept():
    code = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", done.stdout)


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import dspex_kernels").isdisjoint(HEAVY)


@pytest.mark.parametrize("module", ["errors", "protocol", "protocol.commands", "config", "sessions"])
def test_the_service_side_never_loads_what_runs_in_a_kernel(module):
    assert loaded_by(f"import dspex_kernels.{module}").isdisjoint({"dspy", "IPython", "ipykernel"})
