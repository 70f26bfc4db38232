"""What the documents say is what is there."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from dspex_kernels import LMPolicy, SessionService, config
from dspex_kernels.kernel.notebook.magics import VERBS
from dspex_kernels.protocol.commands import PUBLIC
from dspex_kernels.provisioning.fork_provisioner import ForkServerProvisioner
from dspex_kernels.sessions.pool import KernelPool
from dspex_kernels.sessions.secrets import CRYPT_KEY_VARIABLE

CONFIGURABLES = (SessionService, KernelPool, LMPolicy, config.ProviderLimits, ForkServerProvisioner)
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


def words(pattern: str) -> list[str]:
    """What the README has in backticks that is all of ``pattern``, each once."""
    return sorted(set(re.findall(rf"`({pattern})`", README)))


def test_the_readme_names_every_command_of_the_table_and_no_other():
    [sentence] = re.findall(r"^The commands are (.*?)\. In other", README, re.S | re.M)
    assert sorted(re.findall(r"`(\w+)`", sentence)) == sorted(PUBLIC)


def test_the_readme_names_every_variable_that_a_kernel_reads_and_no_other():
    variables = [value for name, value in vars(config).items() if name.startswith("ENV_")]
    of_the_service = {CRYPT_KEY_VARIABLE, "DSPEX_TRACE_CONTENT"}
    assert set(re.findall(r"`(DSPEX_[A-Z_]+)(?:=[01])?`", README)) == {*variables} | of_the_service


def test_the_readmes_settings_have_the_defaults_that_there_are():
    rows = re.findall(r"^\| `(\w+\.\w+)` \| (`(?:\"\w+\"|\[\])`|\d+|true|false) \|", README, re.M)
    simple = {name: json.loads(text.strip("`")) for name, text in rows}  # the others are told in words
    traits = {f"{cls.__name__}.{name}": t for cls in CONFIGURABLES for name, t in cls.class_traits().items()}
    assert simple
    assert {name: traits[name].default() for name in simple} == simple


def test_the_readme_names_the_magics_verbs():
    [verbs] = words("create(?: [a-z]+)+")
    assert {*verbs.split(), "help"} == set(VERBS)


def test_what_is_imported_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "test" for line in lines]
    declared = {Requirement(line).name.lower().replace("-", "_") for line in (*project["dependencies"], *extras)}
    told = {
        "yaml": "pyyaml",
        "zmq": "pyzmq",
        "ipython": "ipykernel",
        "opentelemetry": "opentelemetry_api",
    }  # by the name that is imported
    part_of = {"pydantic_core": "pydantic", "annotated_types": "pydantic"}
    imported = {module.lower() for path in (ROOT / "dspex_kernels").rglob("*.py") for module in modules_of(path)}
    others = imported - {name.lower() for name in sys.stdlib_module_names} - {"dspex_kernels"}
    assert {{**told, **part_of}.get(name, name) for name in others} <= declared


def modules_of(path: Path) -> Iterator[str]:
    """The top names of what a module imports, at its top or later."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module.partition(".")[0]


def test_links_to_files_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []
