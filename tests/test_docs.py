"""What the documents say is what is there."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = ROOT / ".ci" / "run"
DEMO = "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/dspex-kernels demo"
TESTS = 'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/python -m pytest'


def code_lines(markdown: str) -> list[str]:
    """The lines of all fenced blocks."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", markdown, re.S | re.M)
    return [line for block in blocks for line in block.splitlines()]


def test_the_readme_gives_its_two_commands_each_complete_on_one_line():
    commands = [line for line in code_lines(README) if line.startswith("python3 -m venv")]
    assert commands == [DEMO, TESTS]


def test_the_checks_run_the_readmes_test_command_as_it_is_printed():
    assert TESTS in CI.read_text(encoding="utf-8").splitlines()


def test_the_checks_can_be_run():
    assert os.access(CI, os.X_OK)


def test_links_to_files_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []
