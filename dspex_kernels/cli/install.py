"""`dspex-kernels install`: put the kernelspec where Jupyter looks for it."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from traitlets import Bool, Unicode

from dspex_kernels import errors
from dspex_kernels.cli.base import BASE_ALIASES, BASE_FLAGS, Subcommand, say
from dspex_kernels.config import KERNEL_NAME

DISPLAY_NAME = "DSPy (dspex)"


def kernel_spec(*, python: str, display_name: str = DISPLAY_NAME) -> dict[str, Any]:
    """The kernelspec as the object that ``kernel.json`` holds.

    The wheel's ``kernelspec/kernel.json`` is this with ``python="python"`` (the interpreter of whoever starts the
    kernel); a test holds the two together.

    Args:
        python: The interpreter: absolute where another environment may read the spec.
        display_name: What a front end shows.
    """
    return {
        "argv": [python, "-Xfrozen_modules=off", "-m", "dspex_kernels.kernel", "-f", "{connection_file}"],
        "display_name": display_name,
        "language": "python",
        "interrupt_mode": "signal",
        "kernel_protocol_version": "5.5",
        "env": {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        "metadata": {
            "debugger": True,
            "supported_encryption": ["curve"],
            "kernel_provisioner": {"provisioner_name": "dspex-forkserver"},
        },
    }


def install_kernelspec(
    *, name: str = KERNEL_NAME, user: bool = False, prefix: str | None = None, display_name: str = ""
) -> Path:
    """Install the kernelspec for this interpreter; one of the same name is replaced.

    Args:
        name: The kernelspec's name; Jupyter writes it in lower case.
        user: Into the user's Jupyter data directory.
        prefix: Into ``PREFIX/share/jupyter/kernels``; None with ``user`` false is the system's directory.
        display_name: What a front end shows; "" is "DSPy (NAME)".

    Returns:
        The kernelspec's directory.

    Raises:
        InvalidArguments: The name is none, or the directory cannot be written.
    """
    from jupyter_client.kernelspec import KernelSpecManager

    if not name:  # jupyter_client would take the temporary directory's
        raise errors.InvalidArguments("the kernelspec's name is empty: give --name=NAME, or leave it out")
    specs = KernelSpecManager()
    spec = kernel_spec(python=sys.executable, display_name=display_name or f"DSPy ({name})")
    with tempfile.TemporaryDirectory(prefix="dspex-install-") as source:
        Path(source, "kernel.json").write_text(json.dumps(spec, indent=2) + "\n", encoding="utf-8")
        for logo in Path(sys.prefix, "share", "jupyter", "kernels", KERNEL_NAME).glob("logo-*"):
            Path(source, logo.name).write_bytes(logo.read_bytes())
        Path(source).chmod(0o755)  # a temporary directory is 0700, and copytree would keep that
        try:
            return Path(specs.install_kernel_spec(source, name, user=user, prefix=prefix))
        except ValueError as failure:
            raise errors.InvalidArguments(str(failure)) from failure
        except OSError as failure:
            raise errors.InvalidArguments(
                f"cannot write the kernelspec {name!r}: {failure}; use --user or --prefix=DIR"
            ) from failure


class InstallApp(Subcommand):
    name = "jupyter-dspex-install"
    usage = "install [--user | --sys-prefix | --prefix=DIR] [--name=NAME]"
    description = (
        "Install the kernelspec, so that Jupyter offers the kernel with this interpreter. Installing the package "
        "already does so for its own environment; this is for a Jupyter that lives in another one."
    )
    examples = """
    dspex-kernels install --user                    # for every Jupyter of this user
    dspex-kernels install --sys-prefix              # for this environment (the default)
    dspex-kernels install --user --name dspex-dev   # beside another one
    """
    flags = BASE_FLAGS | {
        "user": ({"InstallApp": {"user": True}}, "Into your own Jupyter data directory."),
        "sys-prefix": ({"InstallApp": {"sys_prefix": True}}, "Into this Python environment (the default)."),
    }
    aliases = BASE_ALIASES | {
        "prefix": "InstallApp.prefix",
        "name": "InstallApp.kernel_name",
        "display-name": "InstallApp.display_name",
    }
    shown_defaults = ("name",)

    user = Bool(False, help="Install for the user.").tag(config=True)
    sys_prefix = Bool(False, help="Install into this Python environment.").tag(config=True)
    prefix = Unicode("", help="Install into DIR/share/jupyter/kernels.").tag(config=True)
    kernel_name = Unicode(KERNEL_NAME, help="The kernelspec's name.").tag(config=True)
    display_name = Unicode("", help='What a front end shows; "DSPy (NAME)" if not given.').tag(config=True)

    async def run(self) -> int:
        """Install, and say where."""
        if self.extra_args:
            self.fail_usage(f"install takes no argument {self.extra_args[0]!r}: see --help")
        if self.user + self.sys_prefix + bool(self.prefix) > 1:
            self.fail_usage("--user, --sys-prefix and --prefix exclude each other: give one")
        directory = await asyncio.to_thread(
            install_kernelspec,
            name=self.kernel_name,
            user=self.user,
            prefix=None if self.user else self.prefix or sys.prefix,
            display_name=self.display_name,
        )
        say(f"installed the kernelspec {directory.name!r} in {directory}, for {sys.executable}")
        return 0
