"""The command line, as far as it goes without a kernel: calls, outcomes, files, findings."""

from __future__ import annotations

import asyncio
import importlib.metadata
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from traitlets.config import Application

from dspex_kernels import LMPolicy, SessionService, __version__, errors
from dspex_kernels.cli import batch, doctor, jsonl, main
from dspex_kernels.cli.app import DSPexApp
from dspex_kernels.cli.bench import plots
from dspex_kernels.cli.call import parse_arguments
from dspex_kernels.cli.install import kernel_spec
from dspex_kernels.config import ProviderLimits
from dspex_kernels.protocol import limits
from dspex_kernels.provisioning.fork_provisioner import ForkServerProvisioner
from dspex_kernels.sessions.model import SessionRecord
from dspex_kernels.sessions.pool import KernelPool
from dspex_kernels.sessions.secrets import Vault
from dspex_kernels.sessions.store.sql import SQLStore

ROOT = Path(__file__).parents[1]
SUBCOMMANDS = ("demo", "call", "batch", "library", "store", "install", "doctor", "bench")


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs the command line in this process; gives its exit code, stdout and stderr."""

    def run(*argv: str) -> tuple[int, str, str]:
        _forget_applications()
        try:
            main(argv)
        except SystemExit as ended:
            code = int(ended.code or 0)
        else:
            code = 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    _forget_applications()


def _forget_applications() -> None:
    running = Application._instance
    if running is not None:
        type(running).clear_instance()


class TestTheParser:
    def test_the_version_costs_neither_dspy_nor_sqlalchemy(self):
        code = (
            "import contextlib, sys\nfrom dspex_kernels.cli import main\n"
            "with contextlib.suppress(SystemExit):\n    main(['--version'])\n"
            "print(sorted({'dspy', 'sqlalchemy', 'zmq', 'pydantic', 'IPython'} & sys.modules.keys()))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == [__version__, "[]"]

    def test_it_runs_as_a_module(self):
        done = subprocess.run(
            [sys.executable, "-m", "dspex_kernels.cli", "--version"], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, f"{__version__}\n")

    def test_both_scripts_lead_to_it(self):
        scripts = importlib.metadata.distribution("dspex-kernels").entry_points.select(group="console_scripts")
        assert {script.name: script.value for script in scripts} == {
            "dspex-kernels": "dspex_kernels.cli:main",
            "jupyter-dspex": "dspex_kernels.cli:main",
        }

    def test_the_subcommands_are_these_in_this_order(self):
        assert tuple(DSPexApp.subcommands) == SUBCOMMANDS

    @pytest.mark.parametrize("name", SUBCOMMANDS)
    def test_a_subcommands_help_shows_its_use_and_examples(self, run_cli, name):
        code, out, _ = run_cli(name, "--help")
        assert code == 0
        assert out.startswith(f"usage: dspex-kernels {name}")
        assert f"  dspex-kernels {name} " in out.partition("Examples:")[2]

    @pytest.mark.parametrize("argv", [(), ("demonstrate",)])
    def test_without_a_subcommand_that_exists_it_fails_and_names_them(self, run_cli, argv):
        code, out, err = run_cli(*argv)
        assert code == 1
        assert all(name in out + err for name in SUBCOMMANDS)

    @pytest.mark.parametrize("option", ["--max-cots=1", "--max-cots", "--maxcost"])
    def test_a_mistyped_option_is_refused_and_not_ignored(self, run_cli, option):
        code, out, err = run_cli("batch", "in.jsonl", option, "1")
        assert (code, out) == (1, "")
        assert err.startswith("invalid_arguments: ")
        assert option.partition("=")[0] in err
        assert len(err.splitlines()) == 1

    def test_an_option_with_a_bad_value_is_refused(self, run_cli):
        code, _, err = run_cli("batch", "in.jsonl", "--concurrency=many")
        assert code == 1
        assert "concurrency" in err

    def test_a_setting_of_the_service_with_a_bad_value_is_refused_in_one_line(self, run_cli):
        code, _, err = run_cli("demo", "--SessionService.max_sessions=many")
        assert code == 1
        [line] = err.splitlines()
        assert line.startswith("invalid_arguments: ")
        assert "'max_sessions'" in line

    def test_a_configuration_file_of_every_setting_is_written_and_read_back(self, run_cli, tmp_path, monkeypatch):
        monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path))
        code, _, _ = run_cli("--generate-config")
        text = (tmp_path / "jupyter_dspex_config.py").read_text()
        assert code == 0
        assert re.findall(r"^# (\w+)\(\w+\) configuration", text, re.M)[:3] == [
            "SessionService",
            "KernelPool",
            "LMPolicy",
        ]
        for setting in ("SessionService.max_sessions", "LMPolicy.allowed_models", "BatchApp.concurrency"):
            assert f"c.{setting} = " in text
        (tmp_path / "jupyter_dspex_config.py").write_text(
            "c.InstallApp.user = True\nc.InstallApp.sys_prefix = True"
        )
        code, _, err = run_cli("install")
        assert (code, "exclude each other" in err) == (1, True)

    @pytest.mark.parametrize("answer", ["", "n\n"])
    def test_a_configuration_file_that_is_there_is_not_written_over(self, run_cli, tmp_path, monkeypatch, answer):
        monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path))
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        (tmp_path / "jupyter_dspex_config.py").write_text("c.BatchApp.concurrency = 2")
        code, _, err = run_cli("--generate-config")
        assert (tmp_path / "jupyter_dspex_config.py").read_text() == "c.BatchApp.concurrency = 2"
        assert code == (0 if answer else 1)
        assert err.startswith("invalid_arguments: ") == (not answer)
        assert "Traceback" not in err


class TestArgumentsOfCall:
    @pytest.mark.parametrize(
        ("words", "args"),
        [
            ([], {}),
            (["program_id=qa_bot"], {"program_id": "qa_bot"}),
            (["signature=question -> answer"], {"signature": "question -> answer"}),
            (["n=3", "replace=true", "version=null"], {"n": 3, "replace": True, "version": None}),
            (['tools=["search"]'], {"tools": ["search"]}),
            (["inputs.question=a=b?", "inputs.k=5"], {"inputs": {"question": "a=b?", "k": 5}}),
            (['{"inputs": {"question": "why?"}}'], {"inputs": {"question": "why?"}}),
            (["inputs.question="], {"inputs": {"question": ""}}),
        ],
    )
    def test_words_become_args(self, words, args):
        assert parse_arguments(words) == args

    @pytest.mark.parametrize(
        "words", [["qa_bot"], ["=1"], ["a..b=1"], ["a=1", "a=2"], ["a=1", "a.b=2"], ["{oops"], ["{}", "a=1"]]
    )
    def test_words_that_mean_nothing_are_refused(self, words):
        with pytest.raises(errors.InvalidArguments):
            parse_arguments(words)

    def test_an_error_does_not_quote_an_object_that_may_hold_a_key(self):
        with pytest.raises(errors.InvalidArguments) as refused:
            parse_arguments(['{"api_key": "sk-secret"'])
        assert "sk-secret" not in str(refused.value)
        assert refused.value.__cause__ is None

    @pytest.mark.parametrize(
        ("argv", "code"),
        [
            ((), "invalid_arguments"),
            (("kernel-x.json",), "invalid_arguments"),
            (("kernel-x.json", "make_coffee"), "unknown_command"),
            (("kernel-that-is-not.json", "ping"), "not_a_dspex_kernel"),
            (("--existing=kernel-that-is-not", "ping"), "not_a_dspex_kernel"),
        ],
    )
    def test_a_call_that_cannot_be_made_fails_in_one_line(self, run_cli, argv, code):
        exit_code, out, err = run_cli("call", *argv)
        assert (exit_code, out) == (1, "")
        assert err.startswith(f"{code}: ")
        assert len(err.splitlines()) == 1


class TestInstall:
    def test_the_kernelspec_of_the_wheel_is_the_one_that_is_installed(self):
        packaged = json.loads((ROOT / "kernelspec" / "kernel.json").read_text())
        assert packaged == kernel_spec(python="python")

    def test_it_names_this_interpreter(self, run_cli, tmp_path):
        code, out, _ = run_cli("install", f"--prefix={tmp_path}", "--name=dspex-test")
        directory = tmp_path / "share" / "jupyter" / "kernels" / "dspex-test"
        spec = json.loads((directory / "kernel.json").read_text())
        assert code == 0
        assert str(directory) in out
        assert spec == kernel_spec(python=sys.executable, display_name="DSPy (dspex-test)")

    def test_for_the_user_it_goes_into_the_users_data_directory(self, run_cli, tmp_path, monkeypatch):
        monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
        assert run_cli("install", "--user")[0] == 0
        spec = json.loads((tmp_path / "kernels" / "dspex" / "kernel.json").read_text())
        assert Path(spec["argv"][0]).is_absolute()
        assert spec["display_name"] == "DSPy (dspex)"

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            (["--user", "--sys-prefix"], "exclude each other"),
            (["--name=no/slash"], "no/slash"),
            (["--name="], "--name=NAME"),
            (["surplus"], "surplus"),
            (["--prefix=/dev/null"], "--prefix=DIR"),
        ],
    )
    def test_what_cannot_be_installed_is_refused(self, run_cli, tmp_path, argv, says):
        prefix = [] if "--user" in argv or "--prefix=/dev/null" in argv else [f"--prefix={tmp_path}"]
        code, _, err = run_cli("install", *prefix, *argv)
        assert code == 1
        assert err.splitlines()[-1].startswith("invalid_arguments: ")
        assert says in err


class TestDoctor:
    @pytest.mark.parametrize(
        ("soft", "hard", "status", "remedy"),
        [
            (65536, 65536, "ok", ""),
            (-1, -1, "ok", ""),
            (1024, -1, "warn", "ulimit -n 4096"),
            (1024, 524288, "warn", "ulimit -n 4096"),
            (1024, 1024, "warn", "raise the hard limit"),
            (128, 524288, "fail", "ulimit -n 4096"),
        ],
    )
    def test_open_file_limits_come_with_their_remedy(self, soft, hard, status, remedy):
        finding = doctor.open_files_finding(soft, hard)
        assert finding.status == status
        assert finding.remedy.startswith(remedy)
        assert bool(finding.remedy) == bool(remedy)

    def test_a_directory_that_cannot_be_written_fails_and_names_the_variable(self, tmp_path):
        (tmp_path / "file").touch()
        finding = doctor.directory_finding("data directory", tmp_path / "file" / "sub", "JUPYTER_DATA_DIR")
        assert finding.status == "fail"
        assert "JUPYTER_DATA_DIR" in finding.remedy

    def test_a_writable_directory_is_left_as_it_was(self, tmp_path):
        assert doctor.directory_finding("data directory", tmp_path, "JUPYTER_DATA_DIR").status == "ok"
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("length", "status"), [(54, "ok"), (55, "warn"), (100, "warn")])
    def test_a_runtime_directory_too_deep_for_ipc_is_warned_of(self, length, status):
        assert doctor.path_length_finding("/" + "x" * (length - 1)).status == status

    @pytest.mark.parametrize(
        ("now", "file_clock", "installed", "status"),
        [(1000.0, 1000.0, 900.0, "ok"), (1000.0, 1060.0, 900.0, "warn"), (1000.0, 1000.0, 2000.0, "fail")],
    )
    def test_a_clock_that_cannot_be_right_is_told(self, now, file_clock, installed, status):
        assert doctor.clock_finding(now=now, file_clock=file_clock, installed=installed).status == status

    def test_a_missing_kernelspec_fails_with_the_command_that_installs_it(self):
        finding = asyncio.run(doctor.check_kernelspec("dspex-no-such-kernel"))
        assert finding.status == "fail"
        assert finding.remedy == "dspex-kernels install --sys-prefix --name=dspex-no-such-kernel"

    def test_the_kernelspec_that_the_configuration_names_is_the_one_that_is_checked(self, run_cli):
        code, out, _ = run_cli("doctor", "--json", "--SessionService.kernel_name=dspex-no-such-kernel")
        by_name = {finding["name"]: finding for finding in map(json.loads, out.splitlines())}
        assert code == 1
        assert by_name["kernelspec dspex-no-such-kernel"]["status"] == "fail"
        assert "kernel" not in by_name  # none is started of a kernelspec that is not there

    def test_a_kernelspec_whose_interpreter_lacks_us_fails(self, tmp_path, monkeypatch):
        python = tmp_path / "bin" / "bare-python"
        python.parent.mkdir()
        python.write_text("#!/bin/sh\nexit 1\n")
        python.chmod(0o755)
        monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
        spec_dir = tmp_path / "kernels" / "dspex-bare"
        spec_dir.mkdir(parents=True)
        (spec_dir / "kernel.json").write_text(json.dumps(kernel_spec(python=str(python))))
        finding = asyncio.run(doctor.check_kernelspec("dspex-bare"))
        assert finding.status == "fail"
        assert "does not import dspex_kernels" in finding.detail

    def test_a_dependency_outside_its_range_fails_with_the_range(self, monkeypatch):
        monkeypatch.setattr(
            importlib.metadata, "requires", lambda _: ["pyzmq>=999", "no-such-thing>=1", 'x; extra == "y"']
        )
        by_name = {finding.name: finding for finding in doctor.check_packages()}
        assert (by_name["pyzmq"].status, by_name["no-such-thing"].status) == ("fail", "fail")
        assert by_name["pyzmq"].remedy.endswith('"pyzmq>=999"')
        assert "x" not in by_name

    def test_it_tells_findings_as_json_lines_and_fails_only_if_one_fails(self, run_cli):
        code, out, _ = run_cli("doctor", "--json", "--no-start")
        findings = [json.loads(line) for line in out.splitlines()]
        assert {"python", "dspy", "pyzmq", "jupyterlab", "clock", "kernelspec dspex"} <= {
            f["name"] for f in findings
        }
        assert all(finding.keys() == {"name", "status", "detail", "remedy"} for finding in findings)
        assert code == (1 if any(finding["status"] == "fail" for finding in findings) else 0)


class TestTheStore:
    def test_a_backup_is_a_store_of_its_own(self, run_cli, tmp_path):
        store, copy = tmp_path / "store.sqlite", tmp_path / "copy.sqlite"
        now = datetime.now(UTC)
        record = SessionRecord(session_id="s", owner="alice", backend="pooled", created_at=now, last_activity=now)

        async def fill() -> None:
            async with SQLStore(f"sqlite:///{store}") as opened:
                await opened.create(record)

        asyncio.run(fill())
        code, out, _ = run_cli("store", "backup", str(copy), f"--store={store}")
        assert (code, out.startswith(f"{copy}: 1 sessions")) == (0, True)
        assert out.endswith(f" SessionService.store_url to sqlite:///{copy}\n")

        async def read() -> SessionRecord:
            async with SQLStore(f"sqlite:///{copy}") as opened:
                return await opened.get("s")

        assert asyncio.run(read()) == record

    def test_keys_are_sealed_anew_with_the_first_key(self, run_cli, tmp_path, monkeypatch):
        store, (old, new) = tmp_path / "store.sqlite", (Fernet.generate_key().decode() for _ in range(2))
        now = datetime.now(UTC)
        record = SessionRecord(session_id="s", owner="", backend="pooled", created_at=now, last_activity=now)

        async def fill() -> None:
            async with SQLStore(f"sqlite:///{store}") as opened:
                await opened.create(record)
                await opened.set_secret("s", Vault([old]).seal("s", "sk-test"))

        asyncio.run(fill())
        monkeypatch.setenv("DSPEX_CRYPT_KEY", f"{new};{old}")
        code, out, _ = run_cli("store", "rotate-keys", f"--store={store}")
        assert (code, out) == (0, "1 keys are sealed with the first key of DSPEX_CRYPT_KEY\n")

        async def read() -> str:
            async with SQLStore(f"sqlite:///{store}") as opened:
                return Vault([new]).open("s", await opened.get_secret("s") or b"")

        assert asyncio.run(read()) == "sk-test"

    @pytest.mark.parametrize("given", [(), ("--store={}/none.sqlite",), ("--store=sqlite:///{}/none.sqlite",)])
    def test_a_store_that_is_not_there_is_not_made_to_be_copied(self, run_cli, tmp_path, monkeypatch, given):
        monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
        options = [option.format(tmp_path) for option in given]
        code, out, err = run_cli("store", "backup", str(tmp_path / "copy.sqlite"), *options)
        assert (code, out) == (1, "")
        assert err.startswith("store_error: there is no store /")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("argv", [(), ("backup",), ("copy", "x"), ("rotate-keys", "x")])
    def test_an_action_that_is_not_one_is_refused_with_those_there_are(self, run_cli, argv):
        code, out, err = run_cli("store", *argv)
        assert (code, out, err.startswith("invalid_arguments: ")) == (1, "", True)

    def test_without_a_key_nothing_is_sealed_anew(self, run_cli, tmp_path, monkeypatch):
        monkeypatch.delenv("DSPEX_CRYPT_KEY", raising=False)
        (tmp_path / "store.sqlite").touch()
        code, _, err = run_cli("store", "rotate-keys", f"--store={tmp_path / 'store.sqlite'}")
        assert (code, err.startswith("lm_credentials_required: ")) == (1, True)


class TestBench:
    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            (("surplus",), "surplus"),
            (("--only=starts,nothing",), "there is no measurement nothing: there are starts, memory"),
            (("--sessions=-1",), "sessions"),
        ],
    )
    def test_a_call_that_makes_no_sense_is_refused_before_anything_starts(self, run_cli, argv, says):
        code, out, err = run_cli("bench", *argv)
        assert (code, out) == (1, "")
        assert says in err

    def test_pictures_without_matplotlib_are_refused_in_one_line_before_anything_is_measured(
        self, run_cli, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(plots.importlib.util, "find_spec", lambda _: None)
        code, out, err = run_cli("bench", f"--plots={tmp_path}")
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        assert err.startswith("dependency_missing: ")

    def test_what_it_imports_loads_neither_dspy_nor_ipython_nor_matplotlib(self):
        code = (
            "import sys, dspex_kernels.cli.bench.app\n"
            "print(sorted({'dspy', 'IPython', 'matplotlib'} & sys.modules.keys()))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "[]\n"


class TestTheReadme:
    def test_its_table_of_settings_is_the_traits_that_there_are(self):
        table = re.findall(r"^\| `(\w+\.\w+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
        traits = [
            f"{cls.__name__}.{name}"
            for cls in (SessionService, KernelPool, LMPolicy, ProviderLimits)
            for name in cls.class_own_traits(config=True)
        ]
        traits += [f"ForkServerProvisioner.{name}" for name in ForkServerProvisioner.class_trait_names(config=True)]
        assert sorted(table) == sorted(traits)

    def test_it_names_every_subcommand(self):
        table = re.findall(r"^\| `dspex-kernels (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
        assert sorted(table) == sorted(SUBCOMMANDS)


def lines_of(text: str) -> list[jsonl.InputLine]:
    return list(jsonl.read_lines(io.BytesIO(text.encode())))


class TestInputLines:
    def test_blank_lines_count_but_are_not_run(self):
        assert [(line.number, line.item) for line in lines_of('{"q": 1}\n\n  \n{"q": 2}')] == [
            (1, {"q": 1}),
            (4, {"q": 2}),
        ]

    @pytest.mark.parametrize("text", ["oops", "[1]", '"text"', "{"])
    def test_a_line_that_is_no_object_is_a_problem_of_that_line_alone(self, text):
        first, second = lines_of(f'{text}\n{{"q": 2}}\n')
        assert isinstance(first.problem, errors.InvalidInput)
        assert "line 1" in first.problem.message
        assert second.item == {"q": 2}

    def test_a_line_over_the_limit_is_skipped_to_its_end(self, monkeypatch):
        monkeypatch.setattr(limits, "MAX_REQUEST_BYTES", 20)
        first, second = lines_of('{"q": "' + "x" * 100 + '"}\n{"q": 2}\n')
        assert isinstance(first.problem, errors.TooLarge)
        assert (second.number, second.item) == (2, {"q": 2})


class TestResuming:
    @pytest.mark.parametrize(
        ("torn", "repaired"),
        [
            ('{"line": 1}\n{"line": 2, "outp', '{"line": 1}\n'),
            ('{"line": 1}\n{"line": 2}', '{"line": 1}\n{"line": 2}\n'),
            ('{"line": 1}\n', '{"line": 1}\n'),
            ('{"li', ""),
            ("", ""),
        ],
    )
    def test_a_torn_last_line_is_repaired(self, tmp_path, torn, repaired):
        path = tmp_path / "out.jsonl"
        path.write_text(torn)
        jsonl.repair(path)
        assert path.read_text() == repaired

    def test_another_programs_file_is_not_written_over(self, tmp_path):
        path = tmp_path / "out.jsonl"
        path.write_text('{"line": 1, "input_hash": "ab"}\n{"name": "else"}\n')
        with pytest.raises(errors.InvalidArguments, match="is not a result of batch"):
            jsonl.finished_lines(path)

    def test_an_unchanged_input_tells_how_long_it_is(self, tmp_path):
        path = tmp_path / "in.jsonl"
        path.write_text('{"q": 1}\n\n{"q": 2}\n')
        done = {line.number: line.input_hash for line in lines_of(path.read_text())}
        assert jsonl.check_unchanged(path, done, tmp_path / "out.jsonl") == 2

    @pytest.mark.parametrize("now", ['{"q": 1}\n{"q": 9}\n', '{"q": 1}\n', '{"q": 0}\n{"q": 1}\n{"q": 2}\n'])
    def test_a_changed_input_is_noticed(self, tmp_path, now):
        done = {line.number: line.input_hash for line in lines_of('{"q": 1}\n{"q": 2}\n')}
        path = tmp_path / "in.jsonl"
        path.write_text(now)
        with pytest.raises(errors.InvalidArguments, match="has changed since"):
            jsonl.check_unchanged(path, done, tmp_path / "out.jsonl")


class Program:
    """Stands for a session's program: counts how many calls run at once, and fails as it is told."""

    def __init__(self, failures: dict[int, errors.DSPexError] | None = None, cost: float | None = 0.25) -> None:
        self.failures = failures or {}
        self.cost = cost
        self.seen: list[dict[str, Any]] = []
        self.running = self.most = 0

    async def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(inputs)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for _ in range(30):
                await asyncio.sleep(0)  # lets the others in
        finally:
            self.running -= 1
        if inputs["q"] in self.failures:
            raise self.failures[inputs["q"]]
        return {"outputs": {"a": inputs["q"] * 2}, "usage": {}, "cost": self.cost}


def run_batch(
    directory: Path, program: Any, lines: Iterator[jsonl.InputLine], *, concurrency: int = 4, **more: Any
) -> tuple[batch.Tally, list[dict[str, Any]], list[dict[str, Any]]]:
    """Runs a batch into ``directory``; gives its tally, its results and its errors in the order of their lines."""

    async def run() -> batch.Tally:
        with (
            jsonl.LinesOut(directory / "out.jsonl", append=True) as results,
            jsonl.LinesOut(directory / "err.jsonl", append=False) as failures,
        ):
            more.setdefault("finished", {})
            work = batch.BatchRun(execute=program, lines=lines, results=results, failures=failures, **more)
            return await work.run(concurrency)

    tally = asyncio.run(run())
    return tally, read_jsonl(directory / "out.jsonl"), read_jsonl(directory / "err.jsonl")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda line: line["line"])


def questions(count: int) -> Iterator[jsonl.InputLine]:
    return jsonl.read_lines(io.BytesIO("".join(f'{{"q": {n}}}\n' for n in range(1, count + 1)).encode()))


class TestBatchRuns:
    def test_every_line_is_answered_once_and_costs_add_up(self, tmp_path):
        program = Program()
        tally, results, failed = run_batch(tmp_path, program, questions(100))
        assert [(result["line"], result["outputs"]["a"]) for result in results] == [
            (n, 2 * n) for n in range(1, 101)
        ]
        assert sorted(inputs["q"] for inputs in program.seen) == list(range(1, 101))
        assert (tally.done, tally.failed, tally.cost, tally.exit_code, failed) == (100, 0, 25.0, 0, [])

    def test_no_more_lines_run_at_once_than_allowed(self, tmp_path):
        program = Program()
        run_batch(tmp_path, program, questions(50), concurrency=5)
        assert program.most == 5

    def test_the_input_is_never_read_far_ahead(self, tmp_path):
        read = answered = furthest = 0

        def counted() -> Iterator[jsonl.InputLine]:
            nonlocal read
            for line in questions(1000):
                read += 1
                yield line

        async def program(inputs: dict[str, Any]) -> dict[str, Any]:
            nonlocal answered, furthest
            furthest = max(furthest, read - answered)
            answered += 1
            return {"outputs": {}, "usage": {}, "cost": None}

        run_batch(tmp_path, program, counted(), concurrency=4)
        assert answered == 1000
        assert furthest <= batch.LINES_READ_AT_ONCE + 4

    def test_a_lines_id_names_it_and_is_no_input(self, tmp_path):
        program = Program()
        lines = jsonl.read_lines(io.BytesIO(b'{"id": "first", "q": 1}\n'))
        _, results, _ = run_batch(tmp_path, program, lines)
        assert results[0]["id"] == "first"
        assert program.seen == [{"q": 1}]

    def test_a_program_that_has_an_input_called_id_gets_it(self, tmp_path):
        program = Program()
        run_batch(tmp_path, program, jsonl.read_lines(io.BytesIO(b'{"id": 7, "q": 1}\n')), keeps_id=True)
        assert program.seen == [{"id": 7, "q": 1}]

    def test_a_line_that_fails_is_told_and_the_rest_goes_on(self, tmp_path):
        program = Program({2: errors.MissingInput("field 'k' is missing: give it")})
        tally, results, failed = run_batch(tmp_path, program, questions(3))
        assert [result["line"] for result in results] == [1, 3]
        told = {"code": "missing_input", "message": "field 'k' is missing: give it"}
        assert failed == [{"line": 2, "id": None, "error": told}]
        assert tally.exit_code == 2

    def test_a_line_that_is_not_json_fails_alone(self, tmp_path):
        lines = jsonl.read_lines(io.BytesIO(b'{"q": 1}\noops\n{"q": 3}\n'))
        tally, results, failed = run_batch(tmp_path, Program(), lines)
        assert [result["line"] for result in results] == [1, 3]
        assert (failed[0]["line"], failed[0]["error"]["code"], tally.exit_code) == (2, "invalid_input", 2)

    def test_at_the_budget_it_stops_and_says_so(self, tmp_path):
        spent = {n: errors.BudgetExceeded("1 USD is spent: raise the budget") for n in range(11, 1000)}
        program = Program(spent)
        tally, results, failed = run_batch(tmp_path, program, questions(500), concurrency=2)
        assert [result["line"] for result in results] == list(range(1, 11))
        assert len(program.seen) <= 12
        assert (tally.exit_code, failed) == (3, [])

    def test_an_error_that_every_line_would_meet_ends_the_run(self, tmp_path):
        program = Program({n: errors.ProviderFailure("no such key", code="auth") for n in range(1000)})
        tally, _, failed = run_batch(tmp_path, program, questions(500), concurrency=2)
        assert len(program.seen) <= 2
        assert (tally.exit_code, tally.stopped_by.code, failed) == (1, "auth", [])

    def test_one_unknown_price_makes_the_cost_unknown(self, tmp_path):
        assert run_batch(tmp_path, Program(cost=None), questions(3))[0].cost is None

    def test_a_result_that_cannot_be_written_ends_the_run_with_the_remedy(self, tmp_path):
        (tmp_path / "out.jsonl").mkdir()
        with pytest.raises(errors.StoreError, match="--resume"):
            run_batch(tmp_path, Program(), questions(3))

    def test_interrupted_and_resumed_it_answers_every_line_exactly_once(self, tmp_path):
        program = Program()

        with pytest.raises(asyncio.CancelledError):
            run_batch_until_the_tenth(tmp_path, program)
        before = jsonl.finished_lines(tmp_path / "out.jsonl")
        assert 0 < len(before) < 30
        program.seen.clear()
        _, results, _ = run_batch(tmp_path, program, questions(30), finished=before)
        assert [result["line"] for result in results] == list(range(1, 31))
        assert {inputs["q"] for inputs in program.seen}.isdisjoint(before)


def run_batch_until_the_tenth(directory: Path, program: Program) -> None:
    """Runs a batch of thirty lines whose task is cancelled, as by Ctrl-C, while the tenth is being answered."""

    async def run() -> None:
        task = asyncio.current_task()
        assert task is not None

        async def call(inputs: dict[str, Any]) -> Any:
            if inputs["q"] == 10:
                task.cancel()
                await asyncio.Event().wait()
            return await program(inputs)

        with (
            jsonl.LinesOut(directory / "out.jsonl", append=True) as results,
            jsonl.LinesOut(directory / "err.jsonl", append=False) as failures,
        ):
            work = batch.BatchRun(
                execute=call, lines=questions(30), finished={}, results=results, failures=failures
            )
            await work.run(4)

    asyncio.run(run())


class TestTheBatchCommand:
    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            ([], "one input file"),
            (["in.jsonl", "--signature=q -> a"], "--output is missing"),
            (["in.jsonl", "--output=out.jsonl"], "--signature or --program"),
            (
                ["in.jsonl", "--output=out.jsonl", "--signature=q -> a", "--program=p.json"],
                "--signature or --program",
            ),
            (["none.jsonl", "--output=out.jsonl", "--signature=q -> a"], "none.jsonl is not a file"),
            (["in.jsonl", "--output=in.jsonl", "--signature=q -> a"], "three different files"),
            (["in.jsonl", "--output=used.jsonl", "--signature=q -> a"], "--resume"),
            (["in.jsonl", "--output=used.jsonl", "--signature=q -> a", "--resume"], "not a result of batch"),
            (["in.jsonl", "--output=out.jsonl", "--program=in.jsonl"], "no program record"),
            (["in.jsonl", "--output=out.jsonl", "--program=none.json"], "none.json"),
        ],
    )
    def test_a_call_that_makes_no_sense_is_refused_before_anything_starts(
        self, run_cli, tmp_path, monkeypatch, argv, says
    ):
        monkeypatch.chdir(tmp_path)
        Path("in.jsonl").write_text("1\n")
        Path("used.jsonl").write_text("something\n")
        code, out, err = run_cli("batch", *argv)
        assert (code, out) == (1, "")
        assert says in err
        assert len(err.splitlines()) == 1
        assert Path("used.jsonl").read_text() == "something\n"
        assert not Path("out.jsonl").exists()

    def test_a_finished_run_has_nothing_to_resume(self, run_cli, tmp_path):
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text('{"q": 1}\n')
        [line] = lines_of(source.read_text())
        output.write_text(json.dumps({"line": 1, "input_hash": line.input_hash}) + "\n")
        code, _, err = run_cli("batch", str(source), f"--output={output}", "--signature=q -> a", "--resume")
        assert (code, err) == (0, "1 lines: all were done before\n")
