"""`dspex-kernels doctor`: look at this installation and name the remedy of whatever is wrong."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from traitlets import Bool, Float

from dspex_kernels import __version__, errors
from dspex_kernels.cli.base import BASE_ALIASES, BASE_FLAGS, EXIT_FAILED, Subcommand, say, say_json
from dspex_kernels.config import KERNEL_NAME

Status = Literal["ok", "warn", "fail"]

OPTIONAL_PACKAGES = {
    "jupyterlab": "notebooks in the browser",
    "notebook": "notebooks in the browser",
    "jupyter-console": "the kernel in a terminal",
    "nbclient": "running notebooks from Python",
    "papermill": "notebooks with parameters",
    "matplotlib": "pictures of dspex-kernels bench",
    "litellm": "providers that DSPy does not speak to by itself",
    "numpy": "DSPy's KNN and SIMBA",
    "optuna": "DSPy's MIPROv2",
}
"""What this package works without, and what each is good for."""

OPEN_FILES_WANTED = 4096
"""A kernel costs its service a handful of sockets and pipes; macOS gives a process 256, many systems 1024."""
OPEN_FILES_NEEDED = 256
IPC_PATH_LIMIT = 55
"""Bytes of runtime directory beyond which the paths of a kernel's ipc sockets pass the system's 107."""
CLOCK_SKEW_S = 5.0
IMPORT_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What.
        status: ``ok``; ``warn``: works, within limits; ``fail``: sessions will not work.
        detail: What was found, in one line.
        remedy: What to do about it, in one line; "" where nothing is to do.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def check_packages() -> Iterator[Finding]:
    """Python, this package, and each of its dependencies against the range that it asks for."""
    from packaging.requirements import Requirement

    yield Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield Finding("dspex-kernels", "ok", __version__)
    for line in importlib.metadata.requires("dspex-kernels") or []:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        remedy = f'{_pip()} install "{wanted.name}{wanted.specifier}"'
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(wanted.name, "fail", "not installed", remedy)
            continue
        if wanted.specifier.contains(found, prereleases=True):
            yield Finding(wanted.name, "ok", found)
        else:
            yield Finding(wanted.name, "fail", f"{found} does not fit {wanted.specifier}", remedy)


def check_optional_packages() -> Iterator[Finding]:
    """What is there of ``OPTIONAL_PACKAGES``; none of them is needed, so none is a warning."""
    for name, purpose in OPTIONAL_PACKAGES.items():
        try:
            yield Finding(name, "ok", f"{importlib.metadata.version(name)} (optional: {purpose})")
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "ok", f"not installed (optional: {purpose})", f"{_pip()} install {name}")


async def check_kernelspec(name: str = KERNEL_NAME) -> Finding:
    """Whether Jupyter finds the kernelspec, and its interpreter finds this very version of us."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    label = f"kernelspec {name}"
    remedy = "dspex-kernels install --sys-prefix" + ("" if name == KERNEL_NAME else f" --name={name}")
    try:
        spec = await asyncio.to_thread(KernelSpecManager().get_kernel_spec, name)
    except NoSuchKernel:
        return Finding(label, "fail", "Jupyter does not find it", remedy)
    python = str(spec.argv[0])
    if python.startswith("python"):
        python = sys.executable  # as jupyter_client does when it starts a kernel
    try:
        found = await _version_seen_by(python)
    except (OSError, TimeoutError) as failure:
        return Finding(label, "fail", f"{python} does not run: {failure or 'no answer'}", remedy)
    where = f"{spec.resource_dir}, interpreter {python}"
    if not found:
        return Finding(label, "fail", f"{python} does not import dspex_kernels ({where})", remedy)
    if found != __version__:
        return Finding(label, "warn", f"{python} has dspex_kernels {found}, this is {__version__}", remedy)
    return Finding(label, "ok", where)


async def _version_seen_by(python: str) -> str:
    """The version of dspex_kernels that an interpreter imports; "" if it does not."""
    code = "import dspex_kernels; print(dspex_kernels.__version__)"
    process = await asyncio.create_subprocess_exec(
        python, "-c", code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, cwd=os.sep
    )
    try:
        async with asyncio.timeout(IMPORT_TIMEOUT_S):
            stdout, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return stdout.decode().strip() if process.returncode == 0 else ""


def open_files_finding(soft: int, hard: int) -> Finding:
    """What the limits on open files mean; either is -1 where there is none.

    Args:
        soft: What a process has.
        hard: What it may raise the soft limit to.
    """
    unlimited = sys.maxsize
    soft_count = unlimited if soft < 0 else soft
    hard_count = unlimited if hard < 0 else hard
    detail = f"soft {'unlimited' if soft < 0 else soft}, hard {'unlimited' if hard < 0 else hard}"
    if soft_count >= OPEN_FILES_WANTED:
        return Finding("open files", "ok", detail)
    status: Status = "warn" if soft_count >= OPEN_FILES_NEEDED else "fail"
    if hard_count >= OPEN_FILES_WANTED:
        return Finding("open files", status, detail, f"ulimit -n {OPEN_FILES_WANTED}")
    remedy = f"raise the hard limit (limits.conf, LimitNOFILE=), then ulimit -n {OPEN_FILES_WANTED}"
    return Finding("open files", status, detail, remedy)


def check_open_files() -> Iterator[Finding]:
    """The limits of this process; nothing where the system has none (Windows)."""
    if os.name != "posix":
        return
    import resource

    yield open_files_finding(*resource.getrlimit(resource.RLIMIT_NOFILE))


def directory_finding(name: str, path: Path, variable: str) -> Finding:
    """Whether a directory, made if need be, can be written; ``variable`` names another one."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".dspex-doctor-"):
            pass
    except OSError as failure:
        remedy = f"make it writable, or set {variable} to a directory of yours"
        return Finding(name, "fail", f"{path} cannot be written: {failure.strerror or failure}", remedy)
    return Finding(name, "ok", str(path))


def check_directories() -> Iterator[Finding]:
    """Jupyter's data and runtime directories, and whether ipc sockets fit below the latter."""
    from jupyter_core.paths import jupyter_data_dir, jupyter_runtime_dir

    yield directory_finding("data directory", Path(jupyter_data_dir()), "JUPYTER_DATA_DIR")
    yield directory_finding("runtime directory", Path(jupyter_runtime_dir()), "JUPYTER_RUNTIME_DIR")
    yield path_length_finding(jupyter_runtime_dir())


def path_length_finding(runtime_dir: str) -> Finding:
    """Whether kernels could listen on ipc sockets below ``runtime_dir``; by default they use tcp."""
    length = len(os.fsencode(runtime_dir))
    detail = f"the runtime directory's path has {length} bytes"
    if length < IPC_PATH_LIMIT:
        return Finding("ipc paths", "ok", detail)
    remedy = f"set JUPYTER_RUNTIME_DIR to a path of fewer than {IPC_PATH_LIMIT} bytes"
    return Finding("ipc paths", "warn", f"{detail}: too long for the ipc transport, tcp works", remedy)


def clock_finding(*, now: float, file_clock: float, installed: float) -> Finding:
    """Whether the clock can be right; all in seconds since 1970.

    Args:
        now: The system's clock.
        file_clock: What the file system calls now.
        installed: When this package was put here.
    """
    stamp = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    remedy = "set the clock (timedatectl set-ntp true)"
    if now + CLOCK_SKEW_S < installed:
        return Finding("clock", "fail", f"{stamp} lies before this package was installed", remedy)
    skew = abs(file_clock - now)
    if skew > CLOCK_SKEW_S:
        detail = f"{stamp}; the file system's clock is {skew:.0f} s off"
        return Finding("clock", "warn", detail, "synchronise both machines' clocks")
    return Finding("clock", "ok", stamp)


def check_clock() -> Iterator[Finding]:
    """This machine's clock against its files."""
    with tempfile.NamedTemporaryFile(prefix="dspex-doctor-") as probe:
        file_clock = Path(probe.name).stat().st_mtime
    yield clock_finding(now=time.time(), file_clock=file_clock, installed=Path(__file__).stat().st_mtime)


def _listed(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    return list(check())


def _pip() -> str:
    return f"{sys.executable} -m pip"


class DoctorApp(Subcommand):
    name = "jupyter-dspex-doctor"
    usage = "doctor [--json] [--no-start]"
    description = "Check this installation: each finding is ok, warn or fail, with its remedy. Fails if any does."
    examples = """
    dspex-kernels doctor
    dspex-kernels doctor --no-start     # without starting a kernel
    dspex-kernels doctor --json         # one object a line, for programs
    """
    flags = BASE_FLAGS | {
        "json": ({"DoctorApp": {"json": True}}, "One JSON object a line."),
        "no-start": ({"DoctorApp": {"start_kernel": False}}, "Do not start a kernel."),
    }
    aliases = BASE_ALIASES | {"timeout": "DoctorApp.timeout"}
    shown_defaults = ("timeout",)

    json = Bool(False, help="One JSON object a line.").tag(config=True)
    start_kernel = Bool(True, help="Start a kernel and ping it.").tag(config=True)
    timeout = Float(60.0, min=1.0, help="Longest wait for that kernel, in seconds.").tag(config=True)

    async def run(self) -> int:
        """Look, tell, and fail if anything does."""
        if self.extra_args:
            self.fail_usage(f"doctor takes no argument {self.extra_args[0]!r}: see --help")
        statuses = []
        async for finding in self.findings():
            statuses.append(finding.status)
            if self.json:
                say_json(asdict(finding))
            else:
                say(f"{finding.status:4}  {finding.name}: {finding.detail}")
                if finding.remedy:
                    say(f"      → {finding.remedy}")
        if not self.json:
            say(f"{len(statuses)} findings: {statuses.count('fail')} fail, {statuses.count('warn')} warn")
        return EXIT_FAILED if "fail" in statuses else 0

    async def findings(self) -> AsyncIterator[Finding]:
        """Every finding, each as soon as it is known."""
        for check in (
            check_packages,
            check_optional_packages,
            check_open_files,
            check_directories,
            check_clock,
        ):
            for finding in await asyncio.to_thread(_listed, check):
                yield finding
        kernelspec = await check_kernelspec(self.config.SessionService.get("kernel_name", KERNEL_NAME))
        yield kernelspec
        if self.start_kernel and kernelspec.status != "fail":
            yield await self.ping_a_kernel()

    async def ping_a_kernel(self) -> Finding:
        """Whether a session's kernel starts and answers."""
        from dspex_kernels.cli.ephemeral import ephemeral_service

        began = time.monotonic()
        try:
            async with (
                asyncio.timeout(self.timeout),
                ephemeral_service(self) as service,
                service.session(owner="doctor") as session,
            ):
                health = await session.ping()
        except TimeoutError:
            detail = f"no answer after {self.timeout:g} s"
            return Finding("kernel", "fail", detail, "dspex-kernels doctor --debug --timeout=300")
        except errors.DSPexError as failure:
            return Finding("kernel", "fail", f"{failure.code}: {failure.message}", "dspex-kernels doctor --debug")
        seconds = time.monotonic() - began
        return Finding("kernel", "ok", f"started, answered and stopped in {seconds:.1f} s (pid {health['pid']})")
