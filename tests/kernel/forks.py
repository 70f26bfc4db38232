"""A process that has built the template and forks kernels from it, as a fork server does in the plainest way.

Run as a script it is that process: it takes one JSON object a line and answers each with one.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self


class Forks:
    """The process, as its tests use it."""

    def __init__(self, env: dict[str, str] | None = None, *, rehearse: bool = False) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-Xfrozen_modules=off", __file__, *(["--rehearse"] if rehearse else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **(env or {})},
            text=True,
        )
        self.built = self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return dict(json.loads(self._process.stdout.readline()))

    def ask(self, what: str, **more: Any) -> dict[str, Any]:
        """Have it do something; its answer."""
        assert self._process.stdin is not None
        print(json.dumps({"what": what, **more}), file=self._process.stdin, flush=True)
        return self._answer()


def main() -> None:
    """Build, then answer."""
    from dspex_kernels.kernel import template

    began = time.monotonic()
    built = template.build()
    children: dict[int, socket.socket] = {}
    if "--rehearse" in sys.argv:
        with tempfile.TemporaryDirectory(prefix="dx-") as directory:
            _import_all(_rehearse(built, directory, {**os.environ, "HOME": directory}))
    answer = {"build_s": time.monotonic() - began, **_state()}
    gc.disable()
    gc.collect()
    gc.freeze()
    while True:
        print(json.dumps(answer), flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        asked = json.loads(line)
        match asked["what"]:
            case "fork":
                answer = _fork(built, children, lean=asked["lean"])
            case "assign":
                answer = _assign(children[asked["pid"]], asked)
            case "exited":  # and is kept for "wait"
                ended = os.waitid(os.P_PID, asked["pid"], os.WEXITED | os.WNOWAIT)
                answer = {"exit": ended.si_status if ended and ended.si_code == os.CLD_EXITED else None}
            case "wait":
                _, status = os.waitpid(asked["pid"], 0)
                children.pop(asked["pid"]).close()
                answer = {"exit": os.waitstatus_to_exitcode(status)}
            case "rehearse":
                answer = {"learned": _rehearse(built, asked["cwd"], asked["env"])}


def _rehearse(built: Any, directory: str, env: dict[str, str]) -> list[str]:
    """The modules that a rehearsing child imports."""
    children: dict[int, socket.socket] = {}
    pid = _fork(built, children)["pid"]
    asked = {"env": env, "cwd": directory, "rehearse": True, "connection_file": "", "output": "output"}
    said = _assign(children[pid], asked)["said"]
    os.waitpid(pid, 0)
    children[pid].close()
    return list(json.loads(said))


def _import_all(names: list[str]) -> None:
    for name in names:
        with contextlib.suppress(Exception):  # what only a kernel can import
            importlib.import_module(name)


def _state() -> dict[str, Any]:
    import dspy
    import zmq

    files = [file.name for file in Path("/proc/self/fd").iterdir() if file.exists() and int(file.name) > 2]
    return {
        "threads": [thread.name for thread in threading.enumerate()],
        "os_threads": len(list(Path("/proc/self/task").iterdir())),
        "files": files,
        "cache": "cache" in vars(dspy),
        "zmq_context": zmq.Context._instance is not None,
    }


def _fork(built: Any, children: dict[int, socket.socket], *, lean: bool = False) -> dict[str, Any]:
    ours, theirs = socket.socketpair()
    began = time.monotonic()
    pid = os.fork()
    if not pid:
        for other in (ours, *children.values()):
            other.close()
        os.setsid()
        gc.enable()
        os.environ["DSPEX_LEAN"] = str(int(lean))  # as in a fork server of such kernels
        _live(built, theirs)
    theirs.close()
    children[pid] = ours
    forked = time.monotonic() - began
    said = ours.recv(100)
    return {
        "pid": pid,
        "said": said.decode(),
        "fork_ms": 1e3 * forked,
        "parked_ms": 1e3 * (time.monotonic() - began),
    }


def _live(built: Any, theirs: socket.socket) -> None:
    """What the child does, to its end."""
    status = 70
    try:
        random.seed()
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115  # the process's own
        with tempfile.TemporaryDirectory(prefix="dx-") as own:
            os.chdir(own)
            built.park(lambda: False)
            os.chdir("/")
        theirs.sendall(b"parked")
        asked = json.loads(theirs.makefile().readline() or "null")
        if asked is not None:
            _take_up(asked)
            if asked.get("rehearse"):
                before = set(sys.modules)
                built.rehearse()
                theirs.sendall(json.dumps(sorted(set(sys.modules) - before)).encode() + b"\n")
            else:
                built.serve(asked["connection_file"], lambda: theirs.sendall(b"ready\n"))
        status = 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else 1
    finally:
        if status == 70:
            sys.excepthook(*sys.exc_info())
        atexit._run_exitfuncs()
        os._exit(status)


def _take_up(asked: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.argv = ["-m", "-f", asked["connection_file"]]
    tempfile.tempdir = None
    output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)


def _assign(ours: socket.socket, asked: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    ours.sendall(json.dumps(asked).encode() + b"\n")
    said = ours.makefile().readline().strip()
    return {"said": said, "ready_ms": 1e3 * (time.monotonic() - began)}


if __name__ == "__main__":
    main()
