"""The command line: ``dspex-kernels``, and the same as ``jupyter dspex``.

One module a subcommand; what they share stands in ``base`` (exit codes, options) and ``ephemeral`` (a service for
one run). The parser loads a subcommand's module only when it is called, so that ``--version`` and ``--help`` cost
neither DSPy nor SQLAlchemy.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; ends with SystemExit where the exit code is not 0.

    Args:
        argv: Arguments without the program's name; None takes them from the process.
    """
    from dspex_kernels.cli.app import DSPexApp

    DSPexApp.launch(argv)
