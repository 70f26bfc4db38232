"""The command line with real kernels, and the README's example: what a new user types first."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.lm_server import Hang, LMServer, Status
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
LONGEST = 60.0  # seconds: two kernels start on a machine that does other things too
OFFLINE = "offline"
KEY = "sk-test-of-the-command-line"


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "dspex_kernels.cli", *argv]


def run_cli(*argv: str, stdin: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*argv),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=LONGEST,
        check=False,
        env={**os.environ, **(env or {})},
    )


@contextlib.contextmanager
def started(*argv: str) -> Iterator[subprocess.Popen[str]]:
    """A command that goes on in the background; it must have ended by itself when the block ends."""
    with subprocess.Popen(
        command(*argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        try:
            yield process
            process.wait(LONGEST)
        except BaseException:
            process.terminate()  # so that a failure clears its kernels away
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=20)
            raise
        finally:
            process.kill()


def events_until(process: subprocess.Popen[str], last: str) -> list[dict[str, Any]]:
    """The JSON lines that a process has written, up to the event ``last``."""
    assert process.stdout is not None
    events: list[dict[str, Any]] = []
    text = b""
    deadline = time.monotonic() + LONGEST
    while not events or events[-1]["event"] != last:
        # Past the stream's own buffer, in which select would not see the lines that came together.
        readable, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        assert readable, f"no event {last!r} within {LONGEST:g} s; there were {events}"
        read = os.read(process.stdout.fileno(), 65536)
        assert read, f"it ended before {last!r}: {process.stderr.read() if process.stderr else ''}"
        *whole, text = (text + read).split(b"\n")
        events += map(json.loads, whole)
    return events


def named(events: list[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    """The events of a name, by owner."""
    return {event["owner"]: event for event in events if event["event"] == name}


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    """A demo that waits with both kernels alive: its process, its events, what was left when it had ended."""
    with started("demo", "--json", "--pause") as process:
        events = events_until(process, "paused")
        sessions = named(events, "session")
        alive = {owner: psutil.Process(session["kernel_pid"]) for owner, session in sessions.items()}
        facts = {
            "events": events,
            "commands": {owner: kernel.cmdline() for owner, kernel in alive.items()},
            "files": {owner: Path(session["connection_file"]).is_file() for owner, session in sessions.items()},
            "pings": {o: run_cli("call", s["connection_file"], "ping").stdout for o, s in sessions.items()},
        }
        rest, errors = process.communicate("\n", timeout=LONGEST)
    facts["events"] += [json.loads(line) for line in rest.splitlines()]
    facts["ended"] = {"code": process.returncode, "errors": errors}
    facts["left"] = [kernel for kernel in alive.values() if kernel.is_running()]
    return facts


class TestTheDemo:
    def test_the_two_pids_are_live_kernels_of_ours(self, demo):
        assert demo["commands"].keys() == {"alice", "bob"}
        for owner, words in demo["commands"].items():
            assert "dspex_kernels.kernel" in words
            assert named(demo["events"], "session")[owner]["connection_file"] in words
        pids = {session["kernel_pid"] for session in named(demo["events"], "session").values()}
        assert len(pids) == 2

    def test_their_connection_files_differ_and_lead_to_them(self, demo):
        sessions = named(demo["events"], "session")
        assert demo["files"] == {"alice": True, "bob": True}
        assert len({session["connection_file"] for session in sessions.values()}) == 2
        for owner, session in sessions.items():
            assert json.loads(demo["pings"][owner])["pid"] == session["kernel_pid"]

    def test_each_has_an_answer_of_its_own_under_the_same_program_id_and_it_says_that_it_is_offline(self, demo):
        answers = named(demo["events"], "answer")
        assert {answer["program_id"] for answer in answers.values()} == {"qa_bot"}
        assert answers["alice"]["outputs"]["answer"] != answers["bob"]["outputs"]["answer"]
        for answer in answers.values():
            assert OFFLINE in answer["outputs"]["answer"].lower()

    def test_what_alice_deletes_bob_keeps(self, demo):
        left = named(demo["events"], "after_delete")
        assert {owner: event["has_program"] for owner, event in left.items()} == {"alice": False, "bob": True}

    def test_each_session_counts_its_own_calls(self, demo):
        stats = {owner: event["stats"] for owner, event in named(demo["events"], "statistics").items()}
        assert {owner: s["programs"] for owner, s in stats.items()} == {"alice": 0, "bob": 1}
        assert stats["alice"]["session_id"] != stats["bob"]["session_id"]

    def test_it_ends_well_and_leaves_nothing(self, demo):
        assert demo["ended"] == {"code": 0, "errors": ""}
        assert demo["events"][-1]["event"] == "done"
        assert demo["left"] == []
        for session in named(demo["events"], "session").values():
            assert not Path(session["connection_file"]).exists()


def test_the_demo_tells_a_person_the_same():
    done = run_cli("demo")
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("alice", "bob", "qa_bot", "kernel pid", "kernel-", "gone (program_not_found)", "It works."):
        assert words in done.stdout
    assert OFFLINE in done.stdout.lower()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_demo_that_is_stopped_clears_its_kernels_away(number, code):
    with started("demo", "--json", "--pause") as process:
        sessions = named(events_until(process, "paused"), "session")
        process.send_signal(number)
        process.communicate(timeout=LONGEST)
    assert process.returncode == code
    for session in sessions.values():
        assert not psutil.pid_exists(session["kernel_pid"])
        assert not Path(session["connection_file"]).exists()


def test_the_demo_asks_a_real_model_with_the_key_from_the_environment(lm_server: LMServer):
    done = run_cli(
        *("demo", "--json", "--lm=openai/canary-model", f"--api-base={lm_server.api_base}"),
        "--api-key-env=KEY_OF_THE_DEMO",
        env={"KEY_OF_THE_DEMO": KEY},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert {request.api_key for request in lm_server.requests} == {KEY}
    assert KEY not in done.stdout


def test_a_demo_without_its_key_fails_in_one_line():
    done = run_cli("demo", "--lm=openai/canary-model", "--api-key-env=KEY_THAT_NOBODY_SET")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert re.match(r"[a-z_]+: ", done.stderr)


@pytest.mark.parametrize("argv", [("demo",), ("batch", "in.jsonl", "--output=o.jsonl", "--signature=q -> a")])
def test_what_cannot_start_a_kernel_fails_in_one_line(tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"q": "?"}\n')
    done = run_cli(*argv, "--SessionService.kernel_name=dspex-no-such-kernel")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("kernel_start_failed: ")
    assert "dspex-no-such-kernel" in line


def test_a_directory_that_cannot_be_made_fails_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    done = run_cli("demo", env={"JUPYTER_RUNTIME_DIR": str(tmp_path / "file" / "runtime")})
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert str(tmp_path / "file") in line


def test_the_readmes_example_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```python\n(.*?)^```", readme, re.S | re.M)
    assert len([line for line in block.splitlines() if line.strip()]) <= 16
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block], capture_output=True, text=True, timeout=LONGEST, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    answer, programs = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
    assert OFFLINE in answer.lower()
    assert programs == "['qa_bot']"


class TestCall:
    @pytest.fixture
    def kernel(self) -> Iterator[str]:
        """The connection file of a running kernel."""
        with started("demo", "--json", "--pause") as process:
            yield named(events_until(process, "paused"), "session")["bob"]["connection_file"]
            process.communicate("\n", timeout=LONGEST)

    def test_commands_reach_a_running_kernel_and_their_results_are_json(self, kernel):
        made = run_cli("call", kernel, "create_program", "program_id=more", "signature=question, n: int -> answer")
        assert json.loads(made.stdout)["status"] == "created", made.stderr
        name = Path(kernel).stem.removeprefix("kernel-")
        ran = run_cli(
            *("call", f"--existing={name}", "--compact", "execute_program"),
            *("program_id=more", "inputs.question=Why?", "inputs.n=3"),
        )
        assert OFFLINE in json.loads(ran.stdout)["outputs"]["answer"].lower(), ran.stderr
        settings = run_cli("call", kernel, "configure", "-", stdin='{"budget": {"lm_calls": 5}}')
        assert json.loads(settings.stdout)["settings"]["budget"]["lm_calls"] == 5, settings.stderr
        failed = run_cli("call", kernel, "get_program", "program_id=none")
        assert (failed.returncode, failed.stdout) == (1, "")
        assert re.fullmatch(r"program_not_found: .*none.*\n", failed.stderr)


class TestBatch:
    def test_a_program_runs_over_a_file_and_bad_lines_fail_alone(self, tmp_path):
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        lines = [{"id": f"q{n}", "question": f"question {n}"} for n in range(40)]
        source.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + 'oops\n{"id": 42}\n')
        done = run_cli("batch", str(source), f"--output={output}", "--signature=question -> answer")
        assert done.returncode == 2, done.stderr
        results = read_jsonl(output)
        assert [result["id"] for result in results] == [line["id"] for line in lines]
        assert all(OFFLINE in result["outputs"]["answer"].lower() for result in results)
        failed = read_jsonl(tmp_path / "out.errors.jsonl")
        assert [(f["line"], f["error"]["code"]) for f in failed] == [(41, "invalid_input"), (42, "missing_input")]
        assert "40 of 42 lines done, 2 failed" in done.stderr

    def test_interrupted_and_resumed_it_asks_for_no_line_twice(self, tmp_path, monkeypatch, make_lm_server):
        monkeypatch.setenv("KEY_OF_THE_BATCH", KEY)
        first, second = make_lm_server(), make_lm_server()
        first.behave(Hang(), when=lambda request: re.search(r"number 2\d\.", json.dumps(request.body)) is not None)
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("".join(f'{{"question": "question number {n}."}}\n' for n in range(30)))
        argv = (
            *("batch", str(source), f"--output={output}", "--signature=question -> answer", "--concurrency=3"),
            *("--lm=openai/canary-model", "--api-key-env=KEY_OF_THE_BATCH"),
        )
        with started(*argv, f"--api-base={first.api_base}") as process:
            wait_for(
                lambda: (output.exists() and len(read_jsonl(output)) == 20) or process.poll() is not None,
                deadline=LONGEST,
                what="twenty results",
            )
            assert process.poll() is None, process.communicate()[1]
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=LONGEST)
        assert process.returncode == 130
        assert "20 of 30 lines done, 10 left (--resume goes on)" in errors
        with output.open("a") as torn:
            torn.write('{"line": 30, "outp')
        resumed = run_cli(*argv, f"--api-base={second.api_base}", "--resume")
        assert resumed.returncode == 0, resumed.stderr
        assert [result["line"] for result in read_jsonl(output)] == list(range(1, 31))
        assert len(second.requests) == 10

    def test_at_its_budget_it_stops_with_a_code_of_its_own(self, tmp_path, lm_server: LMServer):
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("".join(f'{{"question": "question number {n}."}}\n' for n in range(30)))
        done = run_cli(
            *("batch", str(source), f"--output={output}", "--signature=question -> answer", "--concurrency=1"),
            *("--lm=openai/gpt-4o-mini", f"--api-base={lm_server.api_base}", "--max-cost=0.001"),
            env={"OPENAI_API_KEY": KEY},
        )
        assert done.returncode == 3, done.stderr
        assert re.search(r"^budget_exceeded: ", done.stderr, re.M)
        assert f"{len(read_jsonl(output))} of 30 lines done" in done.stderr
        assert not (tmp_path / "out.errors.jsonl").exists()

    def test_a_wrong_key_ends_it_at_once(self, tmp_path, lm_server: LMServer):
        lm_server.behaviour = Status(401)
        source = tmp_path / "in.jsonl"
        source.write_text('{"question": "why?"}\n' * 100)
        done = run_cli(
            *("batch", str(source), f"--output={tmp_path / 'out.jsonl'}", "--signature=question -> answer"),
            *("--lm=openai/canary-model", f"--api-base={lm_server.api_base}", "--concurrency=2", "--quiet"),
            env={"OPENAI_API_KEY": KEY},
        )
        assert done.returncode == 1
        assert re.fullmatch(r"auth: .*\n", done.stderr)
        assert KEY not in done.stderr
        assert len(lm_server.requests) <= 2


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file, in the order of the input."""
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return sorted((json.loads(line) for line in lines), key=lambda line: line["line"])


def test_the_doctor_starts_a_kernel_and_finds_it_well():
    done = run_cli("doctor", "--json")
    findings = {finding["name"]: finding for finding in map(json.loads, done.stdout.splitlines())}
    assert findings["kernel"]["status"] == "ok", findings["kernel"]
    assert findings["kernelspec dspex"]["status"] == "ok"
    assert done.returncode == (1 if any(f["status"] == "fail" for f in findings.values()) else 0)
