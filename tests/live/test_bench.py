"""`dspex-kernels bench --quick` really measures: what its JSON looks like, not what the figures are."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

LONGEST = 500.0  # seconds: dozens of kernels start on a machine that does other things too

EXPECTED = {
    "starts": {"to first reply", "to first prediction", "service's first session"},
    "memory": {"USS, idle", "PSS, after a program", "descriptors", "threads", "processor of 100 idle kernels"},
    "round_trip": {"round trip", "over execute in process", "over dspy in process"},
    "throughput": {"1 at once", "10 at once", "10 at once, LM of 100 ms"},
    "backends": {"creation", "memory of a session", "to first prediction", "call", "crash: sessions hit"},
    "refill": {"whole again", "a session of it answers"},
    "crowd": {"made, each with a prediction", "live at once", "destroyed", "processes left", "files left"},
}
"""By measurement, something of what it has to tell."""

WAYS = {
    "starts": {"stock", "plain", "forked", "standby", "notebook"},
    "memory": {"stock", "plain", "forked lean", "forked full"},
    "round_trip": {
        *("dspy in process", "execute in process", "command", "command, no service"),
        "execute_request",
    },
    "backends": {"dedicated", "pooled"},
}


def measured(tmp_path: Any, *names: str) -> dict[str, dict[str, Any]]:
    """Runs measurements; each as the JSON file has it, by name."""
    path = tmp_path / "bench.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "dspex_kernels.cli", "bench", "--quick", f"--only={','.join(names)}"),
            f"--json={path}",
        ],
        capture_output=True,
        text=True,
        timeout=LONGEST,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(path.read_text())
    assert data["command"].startswith("dspex-kernels bench --quick")
    assert {"cores", "memory", "python", "dspy"} <= data["machine"].keys()
    assert [one["name"] for one in data["measurements"]] == list(names)
    assert all(one["title"] in done.stdout for one in data["measurements"])
    return {one["name"]: one for one in data["measurements"]}


@pytest.mark.stress  # half a minute each
@pytest.mark.timeout(LONGEST)
@pytest.mark.parametrize(
    "names", [("starts",), ("memory",), ("round_trip", "throughput"), ("backends", "refill"), ("crowd",)]
)
def test_a_quick_run_tells_what_it_measured(tmp_path, names):
    for name, measurement in measured(tmp_path, *names).items():
        rows = measurement["rows"]
        assert EXPECTED[name] <= {row["what"] for row in rows}
        assert WAYS.get(name, set()) <= {row["way"] for row in rows}
        for row in rows:
            samples = [sample for samples in row["rounds"] for sample in samples]
            assert row["spread"]["count"] == len(samples) > 0
            assert row["spread"]["low"] <= row["spread"]["median"] <= row["spread"]["high"]
            assert (row["bar"] is None) <= (row["is_met"] is None)
        if name == "crowd":
            left = {row["what"]: row["spread"]["high"] for row in rows if row["what"].endswith(" left")}
            assert left == {"processes left": 0, "files left": 0}
