"""What the subcommands share: options, output, and how an outcome becomes an exit code.

Exit codes: 0 all is well; 1 it could not be done (one line ``code: message`` on stderr); 2 some of it failed;
3 stopped at the budget; 130 interrupted; 143 terminated.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, NoReturn

from jupyter_core.application import JupyterApp
from traitlets import TraitError
from traitlets.config import Config
from traitlets.config.loader import KVArgParseConfigLoader
from traitlets.utils.text import wrap_paragraphs

from dspex_kernels import __version__, errors

EXIT_FAILED = 1
EXIT_SOME_FAILED = 2
EXIT_BUDGET = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

CONFIG_FILE_NAME = "jupyter_dspex_config"

BASE_FLAGS: dict[str, Any] = {
    "debug": ({"Application": {"log_level": logging.DEBUG}}, "Log everything, on stderr."),
}
BASE_ALIASES: dict[str, Any] = {
    "log-level": "Application.log_level",
    "config": ("JupyterApp.config_file", "A configuration file to read instead of jupyter_dspex_config.py."),
}


class _StrictLoader(KVArgParseConfigLoader):
    def _handle_unrecognized_alias(self, arg: str) -> None:
        # The stock loader warns and goes on: a mistyped --max-cost would spend without a limit.
        _refuse(f"there is no option --{arg}")

    def _parse_args(self, args: Any) -> None:
        # argparse would end with 2, which here says "some of it failed".
        self.parser.error = _refuse  # type: ignore[method-assign]  # argparse takes its parser's class from inside
        super()._parse_args(args)


def _refuse(message: str) -> NoReturn:
    """End with exit code 1: the call itself makes no sense."""
    complain(errors.InvalidArguments(f"{message}: see --help"))
    sys.exit(EXIT_FAILED)


class CommandLineApp(JupyterApp):
    """A Jupyter application that speaks plainly: short help, unknown options refused, quiet logs."""

    version = __version__
    flags = BASE_FLAGS
    aliases = BASE_ALIASES
    usage = ""
    """The form of the call, after the program's name; "" is none to show."""
    shown_defaults: tuple[str, ...] = ()
    """Options whose default is worth a word in the help."""

    def initialize(self, argv: Any = None) -> None:
        """Parse ``argv`` and read the configuration."""
        super().initialize(argv)
        self.log.addFilter(self._is_news)

    def _is_news(self, record: logging.LogRecord) -> bool:
        """Whether a log record says what nobody else does.

        jupyter_client logs each failure, with tracebacks, before it raises it; we tell the raised one in one line.
        """
        is_jupyters = record.levelno >= logging.ERROR and "jupyter_client" in Path(record.pathname).parts
        return not is_jupyters or self.log_level <= logging.DEBUG

    def _log_level_default(self) -> int:
        return logging.WARNING

    def _config_file_name_default(self) -> str:
        return CONFIG_FILE_NAME

    def _create_loader(self, argv: Any, aliases: Any, flags: Any, classes: Any) -> _StrictLoader:
        return _StrictLoader(argv, aliases, flags, classes=classes, log=self.log, subcommands=self.subcommands)

    def fail_usage(self, message: str) -> NoReturn:
        """End with exit code 1: the call itself makes no sense."""
        complain(errors.InvalidArguments(message))
        sys.exit(EXIT_FAILED)

    def emit_description(self) -> Iterator[str]:
        """The help's first lines."""
        if self.usage:
            yield f"usage: dspex-kernels {self.usage}"
            yield ""
        yield from (f"{paragraph}\n" for paragraph in wrap_paragraphs(self.description))

    def emit_subcommands_help(self) -> Iterator[str]:
        """One line a subcommand."""
        if self.subcommands:
            yield "Subcommands:"
            yield from (f"  {name:10}{help_text}" for name, (_, help_text) in self.subcommands.items())
            yield ""

    def emit_options_help(self) -> Iterator[str]:
        """The options; `--help-all` has the traits behind them."""
        yield "Options:"
        for name, text in self._option_lines():
            lines = wrap_paragraphs(text, ncols=78) or [""]
            yield f"  {name}"
            yield from (f"      {line}" for paragraph in lines for line in paragraph.splitlines())
        yield ""

    def _option_lines(self) -> Iterator[tuple[str, str]]:
        """Each option with what it means; those that every subcommand has come last."""
        traits = self.traits(config=True)
        for name, (_, text) in self.flags.items():
            if name not in BASE_FLAGS:
                yield f"--{name}", text
        for name in sorted(self.aliases, key=lambda name: name in BASE_ALIASES):
            target = self.aliases[name]
            path, text = target if isinstance(target, tuple) else (target, "")
            trait = traits[path.split(".")[1]]
            default = f" Default: {trait.default()}." if name in self.shown_defaults else ""
            yield f"--{name}=…", (text or trait.help) + default
        yield from ((f"--{name}", text) for name, (_, text) in BASE_FLAGS.items())

    def emit_examples(self) -> Iterator[str]:
        """The examples, as they are typed."""
        if self.examples:
            yield "Examples:"
            yield from (f"  {line.strip()}" for line in self.examples.strip().splitlines())
            yield ""

    def emit_help_epilogue(self, classes: bool) -> Iterator[str]:
        """The help's last lines."""
        if not classes:
            yield "Every setting, also those of a configuration file: dspex-kernels --help-all"


class Subcommand(CommandLineApp):
    """A subcommand: ``run`` does it and returns the exit code."""

    def start(self) -> None:
        """Run, and turn every outcome into an exit code."""
        super().start()
        code = self._outcome()
        if code:
            self.exit(code)

    async def run(self) -> int:
        """Do it.

        Returns:
            The exit code.

        Raises:
            DSPexError: It could not be done: told in one line, exit code 1.
        """
        raise NotImplementedError

    def _outcome(self) -> int:
        try:
            return asyncio.run(_until_terminated(self.run()))
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except _Terminated:
            return EXIT_TERMINATED
        except errors.DSPexError as failure:
            complain(failure)
            return EXIT_FAILED
        except TraitError as failure:  # a setting of the service: read when it is made
            complain(errors.InvalidArguments(str(failure)))
            return EXIT_FAILED
        except BrokenPipeError:
            # The reader (`| head`) has gone; what Python still flushes at exit must have somewhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_FAILED
        except OSError as failure:
            # A full disk, a directory of somebody else: the machine's failure, not a defect of ours.
            self.log.debug("the operating system refused", exc_info=True)
            complain(errors.StoreError(f"{failure}: dspex-kernels doctor looks for the cause"))
            return EXIT_FAILED


class _Terminated(Exception):
    """SIGTERM came."""


async def _until_terminated(work: Coroutine[Any, Any, int]) -> int:
    """Do ``work``; SIGTERM cancels it as Ctrl-C does, so that its kernels and files are cleared away."""
    task = asyncio.current_task()
    assert task is not None
    terminated = False

    def terminate() -> None:
        nonlocal terminated
        terminated = True
        task.cancel()

    loop = asyncio.get_running_loop()
    can_handle = hasattr(signal, "SIGTERM") and os.name == "posix"
    if can_handle:
        loop.add_signal_handler(signal.SIGTERM, terminate)
    try:
        return await work
    except asyncio.CancelledError:
        if terminated:
            raise _Terminated from None  # the cancellation was ours
        raise
    finally:
        if can_handle:
            loop.remove_signal_handler(signal.SIGTERM)


def store_url(given: str, settings: Config, *, may_create: bool = False) -> str:
    """Which store a subcommand works on, as an SQLAlchemy URL.

    Args:
        given: A SQLite file or a URL; "" is the service's own.
        settings: The configuration, which may name that.
        may_create: Whether a file that is not there is made.

    Raises:
        StoreError: There is no such file.
    """
    from dspex_kernels.sessions.store import default_store_url

    if not given:
        url = str(settings.get("SessionService", {}).get("store_url") or default_store_url())
    else:
        url = given if "://" in given else f"sqlite:///{Path(given).absolute()}"
    # An empty new store would be listed, and backed up, as if all were well.
    scheme, _, file = url.partition(":///")
    if scheme == "sqlite" and not may_create and not file.startswith(("file:", ":memory:")):
        path = Path(file.partition("?")[0])
        if not path.exists():
            raise errors.StoreError(f"there is no store {path}: give --store=FILE or --store=URL")
    return url


def say(text: str = "") -> None:
    """A line on stdout, at once: another program may be reading it."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def say_json(value: Any) -> None:
    """A value as one line of JSON on stdout, at once."""
    say(json.dumps(value, ensure_ascii=False, default=str))


def tell(text: str) -> None:
    """A line on stderr: what concerns the person and not the next program in the pipe."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def complain(failure: errors.DSPexError) -> None:
    """An error on stderr: one line, ``code: message``."""
    tell(f"{failure.code}: {' '.join(failure.message.split())}")
