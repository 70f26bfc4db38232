"""The application behind ``dspex-kernels``: it knows the subcommands by name and loads the one that is called."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jupyter_core.application import NoStart
from traitlets.config import Configurable
from traitlets.utils.importstring import import_item

from dspex_kernels.cli.base import BASE_FLAGS, CommandLineApp

_CONFIGURABLES = (
    "dspex_kernels.sessions.service.SessionService",
    "dspex_kernels.sessions.pool.KernelPool",
    "dspex_kernels.config.LMPolicy",
    "dspex_kernels.config.ProviderLimits",
    "dspex_kernels.cli.demo.DemoApp",
    "dspex_kernels.cli.call.CallApp",
    "dspex_kernels.cli.batch.BatchApp",
    "dspex_kernels.cli.library.LibraryApp",
    "dspex_kernels.cli.store.StoreApp",
    "dspex_kernels.cli.install.InstallApp",
    "dspex_kernels.cli.doctor.DoctorApp",
    "dspex_kernels.cli.bench.app.BenchApp",
)
"""What a configuration file may set; loaded only when such a file, or all options, are written out."""


class DSPexApp(CommandLineApp):
    name = "jupyter-dspex"
    description = "DSPy programs in isolated sessions, the Jupyter way."
    examples = """
    dspex-kernels demo                      # two sessions, two kernels, one program id; no network, no key
    dspex-kernels doctor                    # is everything in place?
    dspex-kernels demo --help               # one subcommand's options and examples
    dspex-kernels --generate-config         # write jupyter_dspex_config.py with every setting
    """
    subcommands = {  # noqa: RUF012  # a trait of traitlets, not a shared default
        "demo": ("dspex_kernels.cli.demo.DemoApp", "Watch two sessions keep a program under the same id."),
        "call": ("dspex_kernels.cli.call.CallApp", "Send one command straight to a running kernel."),
        "batch": ("dspex_kernels.cli.batch.BatchApp", "Run a program over a JSONL file."),
        "library": ("dspex_kernels.cli.library.LibraryApp", "Publish programs, and move what sessions follow."),
        "store": ("dspex_kernels.cli.store.StoreApp", "Copy the store, seal its keys anew."),
        "install": ("dspex_kernels.cli.install.InstallApp", "Install the kernelspec."),
        "doctor": ("dspex_kernels.cli.doctor.DoctorApp", "Check this installation, with remedies."),
        "bench": ("dspex_kernels.cli.bench.app.BenchApp", "Measure this installation, beside a stock kernel."),
    }
    flags = BASE_FLAGS | {
        "generate-config": (
            {"JupyterApp": {"generate_config": True}},
            "Write jupyter_dspex_config.py with every setting and its default.",
        ),
        "y": ({"JupyterApp": {"answer_yes": True}}, "Answer yes to questions."),
    }

    @classmethod
    def launch(cls, argv: Sequence[str] | None = None) -> None:
        """Parse ``argv`` and run what it names; SystemExit carries an exit code other than 0."""
        # Not launch_instance: it leaves an event loop behind that nobody closes when a subcommand exits.
        app = cls.instance()
        try:
            app.initialize(list(sys.argv[1:] if argv is None else argv))
            app.start()
        except NoStart:  # Jupyter's word for: the subcommand has run
            return

    def start(self) -> None:
        """Run the subcommand; without one, say what there is and fail."""
        super().start()
        if self.extra_args:
            self.fail_usage(
                f"no subcommand {self.extra_args[0]!r}: there are {', '.join(self.subcommands)}; see --help"
            )
        self.print_help()
        self.exit(1)

    def generate_config_file(self, classes: list[type[Configurable]] | None = None) -> str:
        """The text of ``jupyter_dspex_config.py``, the subcommands' settings included."""
        # The service first: it is what an administrator looks for, among the settings of every application.
        return str(super().generate_config_file(_configurables()))

    def write_default_config(self) -> None:
        """Write the configuration file; one that is there only after asking."""
        try:
            super().write_default_config()
        except EOFError:  # nobody is there to be asked
            self.fail_usage(f"{self.config_file_name}.py is there already: -y writes over it")

    def emit_help(self, classes: bool = False) -> Iterator[Any]:
        """The help's lines; ``classes`` adds every setting."""
        if classes:
            self._load_classes()
        yield from super().emit_help(classes)

    def _load_classes(self) -> None:
        self.classes = [type(self), *_configurables()]


def _configurables() -> list[type[Configurable]]:
    return [import_item(name) for name in _CONFIGURABLES]
