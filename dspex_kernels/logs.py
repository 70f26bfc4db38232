"""Log lines that say whose call they are of: its session, its request and its kernel.

``of_call`` names a call for the code that runs in it; a filter then ends each line that is logged meanwhile with
``[session=… request=… kernel=…]``, and sets the fields ``dspex_session_id``, ``dspex_request_id`` and
``dspex_kernel_id`` (and all of them as ``dspex``) for formatters that tell fields apart. A line outside any call
stays as it is.

Python asks the filters of the logger that is called and of the handlers, not of the loggers in between. So each
logger of ours has the filter (``get_logger``), and so a service within another application names its calls there,
with the application's own handlers and formats. In processes that are ours, ``install`` gives it to the handlers as
well: then the lines of DSPy and of tools have it too. A record factory would reach every line, but a process has
only one, and it may be the application's.

The ids follow the context: into tasks, and into threads that get a copy of it. DSPy's own threads get its settings
instead, so a kernel says by ``install`` how to find the call there. A task that outlives its call names it no more.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Named:
    """A call as its log lines name it. What becomes known later (the kernel) is set when it is known.

    Attributes:
        session_id: None where no session is known.
        request_id: None where the caller gave none, or it is not known yet.
        kernel_id: None where no kernel is known yet.
        ended: The call is over: what still runs for it is not of the call any more.
    """

    session_id: str | None = None
    request_id: str | None = None
    kernel_id: str | None = None
    ended: bool = False

    def __str__(self) -> str:
        told = {"session": self.session_id, "request": self.request_id, "kernel": self.kernel_id}
        parts = " ".join(f"{name}={_one_word(value)}" for name, value in told.items() if value)
        return f"[{parts}]" if parts else ""


Finder = Callable[[], Named | None]
"""Finds the call of the running code where the context does not name it; it must neither raise nor log."""

_named: ContextVar[Named | None] = ContextVar("dspex_named_call", default=None)


@contextmanager
def of_call(
    *, session_id: str | None = None, request_id: str | None = None, kernel_id: str | None = None
) -> Iterator[Named]:
    """While this lasts, log lines name the call. Yields what they name, for what becomes known on the way."""
    named = Named(session_id, request_id, kernel_id)
    token = _named.set(named)
    try:
        yield named
    finally:
        named.ended = True
        _named.reset(token)


def current() -> Named | None:
    """The call that the running code belongs to; None outside any."""
    named = _named.get()
    if named is not None and not named.ended:
        return named
    return _FILTER.find() if _FILTER.find is not None else None


class _Filter(logging.Filter):
    """Ends each record with the ids of its call, once, whoever shows it. It lets every record pass."""

    find: Finder | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if hasattr(record, "dspex"):  # by the logger's filter, before the handler's
            return True
        named = current() or Named()
        text = str(named)
        record.dspex = text
        record.dspex_session_id = named.session_id or ""
        record.dspex_request_id = named.request_id or ""
        record.dspex_kernel_id = named.kernel_id or ""
        if text:
            _append(record, text)
        return True


_FILTER = _Filter()


def get_logger(name: str) -> logging.Logger:
    """The logger of one of our modules, whose lines name their call. Called with ``__name__``."""
    logger = logging.getLogger(name)
    cover(logger)
    return logger


def cover(log: logging.Logger | logging.LoggerAdapter[Any]) -> None:
    """Have the lines of a logger that we were given name their call. Called with the service's ``log``."""
    logger = log.logger if isinstance(log, logging.LoggerAdapter) else log
    logger.addFilter(_FILTER)


def install(find: Finder | None = None, *names: str) -> None:
    """Have every handler that is there name calls, whoever logs. Called when a process of ours starts.

    Args:
        find: How to find the call in threads that know it otherwise; None is no way.
        names: Of loggers; none is all: that looks at each of hundreds.
    """
    _FILTER.find = find
    loggers: list[object] = [logging.getLogger(name) for name in names]
    loggers = loggers or [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers]
    for handler in (*handlers, logging.lastResort):
        if handler is not None:
            handler.addFilter(_FILTER)


def _append(record: logging.LogRecord, text: str) -> None:
    """End a record's message with ``text``, as one argument more: what groups lines by their template still can."""
    if isinstance(record.args, Mapping):
        record.msg, record.args = f"{record.msg} %(dspex)s", {**record.args, "dspex": text}
    elif record.args:
        record.msg, record.args = f"{record.msg} %s", (*record.args, text)
    elif isinstance(record.msg, str):  # without arguments, a % in it stands for itself
        record.msg, record.args = f"{record.msg.replace('%', '%%')} %s", (text,)
    else:  # any object, whose text is made when it is shown
        record.msg, record.args = "%s %s", (record.msg, text)


def _one_word(value: str) -> str:
    # A caller's request id is named before it is checked: it must not begin a line of its own.
    return re.sub(r"[^\x21-\x7e]", "?", value[:128])
