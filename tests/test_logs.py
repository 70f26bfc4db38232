"""Log lines name the call they are of: in tasks, threads and other people's handlers, and never after its end."""

from __future__ import annotations

import asyncio
import contextvars
import io
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from dspex_kernels import logs

log = logs.get_logger("dspex_kernels.tests_of_logs.deep.inside")
IDS = "[session=s request=r kernel=k]"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What an application's own handler on the root logger shows, in its own format."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logging.root.addHandler(handler)
    yield stream
    logging.root.removeHandler(handler)


@pytest.fixture
def stranger(request: pytest.FixtureRequest) -> logging.Logger:
    """A logger that is not ours."""
    logger = logging.getLogger(f"somebody.{request.node.name}")
    logger.setLevel(logging.INFO)
    return logger


@pytest.fixture
def uninstalled() -> Iterator[None]:
    """Takes the filter from every handler again: this process is not ours alone."""
    yield
    handlers = [logging.lastResort, *logging.root.handlers]
    handlers += [
        handler
        for logger in logging.root.manager.loggerDict.values()
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
    ]
    for handler in handlers:
        if handler is not None:
            handler.removeFilter(logs._FILTER)
    logs._FILTER.find = None


def test_a_line_within_a_call_ends_with_its_ids_and_one_outside_is_as_it_was(stream):
    log.warning("before")
    with logs.of_call(session_id="s", request_id="r", kernel_id="k"):
        log.warning("within")
        with logs.of_call(session_id="other"):
            log.warning("deeper")
        log.warning("within again")
    log.warning("after")
    assert stream.getvalue().splitlines() == [
        "WARNING before",
        f"WARNING within {IDS}",
        "WARNING deeper [session=other]",
        f"WARNING within again {IDS}",
        "WARNING after",
    ]


def test_what_becomes_known_on_the_way_is_told_from_then_on(stream):
    with logs.of_call(session_id="s") as named:
        log.warning("waits")
        named.kernel_id = "k"
        log.warning("runs")
    assert stream.getvalue().splitlines() == ["WARNING waits [session=s]", "WARNING runs [session=s kernel=k]"]


@pytest.mark.parametrize(
    ("message", "args", "shown"),
    [
        ("plain", (), "plain"),
        ("100 % of %s", (), "100 % of %s"),
        ("%d of %s", (3, "four %s"), "3 of four %s"),
        ("%(done)d of %(all)d", ({"done": 3, "all": 4},), "3 of 4"),
        (ValueError("50 %"), (), "50 %"),
    ],
)
def test_whatever_form_a_message_has_its_text_stays(stream, message, args, shown):
    with logs.of_call(session_id="s", request_id="r", kernel_id="k"):
        log.warning(message, *args)
    assert stream.getvalue() == f"WARNING {shown} {IDS}\n"


def test_what_groups_lines_by_their_template_still_can(caplog):
    for number in range(2):
        with logs.of_call(session_id=f"s{number}"):
            log.warning("attempt %d failed", number)
            log.warning("100 % gone")
    assert len({record.msg for record in caplog.records}) == 2


def test_fields_tell_the_ids_apart_and_are_always_there(caplog):
    log.warning("outside")
    with logs.of_call(session_id="s", request_id="r"):
        log.warning("within")
    fields = [
        (record.dspex, record.dspex_session_id, record.dspex_request_id, record.dspex_kernel_id)
        for record in caplog.records
    ]
    assert fields == [("", "", "", ""), ("[session=s request=r]", "s", "r", "")]


def test_a_traceback_follows_the_line_that_names_the_call(stream):
    with logs.of_call(session_id="s", request_id="r", kernel_id="k"):
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            log.exception("it failed")
    first, second, *_ = stream.getvalue().splitlines()
    assert first == f"ERROR it failed {IDS}"
    assert second.startswith("Traceback")


def test_calls_side_by_side_in_tasks_name_themselves_each(stream):
    async def call(number: int, turn: asyncio.Barrier) -> None:
        with logs.of_call(session_id=f"s{number}"):
            await turn.wait()
            log.warning("%d", number)
            await asyncio.create_task(deeper(number))
            await asyncio.to_thread(log.warning, "%d", number)

    async def deeper(number: int) -> None:
        log.warning("%d", number)

    async def work() -> None:
        turn = asyncio.Barrier(5)
        await asyncio.gather(*(call(number, turn) for number in range(5)))

    asyncio.run(work())
    lines = sorted(stream.getvalue().splitlines())
    assert lines == sorted(f"WARNING {number} [session=s{number}]" for number in range(5) for _ in range(3))


def test_a_task_that_outlives_its_call_names_it_no_more(stream):
    async def work() -> None:
        began, over = asyncio.Event(), asyncio.Event()

        async def lives_on() -> None:
            log.warning("during")
            began.set()
            await over.wait()
            log.warning("long after")

        with logs.of_call(session_id="s"):
            task = asyncio.create_task(lives_on())
            await began.wait()
        over.set()
        await task

    asyncio.run(work())
    assert stream.getvalue().splitlines() == ["WARNING during [session=s]", "WARNING long after"]


def test_a_logger_that_was_given_names_calls_with_an_adapter_too(stream, stranger):
    adapter = logging.LoggerAdapter(stranger, {})
    logs.cover(adapter)
    with logs.of_call(session_id="s", request_id="r", kernel_id="k"):
        adapter.warning("theirs")
    assert stream.getvalue() == f"WARNING theirs {IDS}\n"


def test_loggers_of_an_application_are_left_alone_until_they_are_given(stream, stranger):
    with logs.of_call(session_id="s"):
        stranger.warning("theirs")
    assert stream.getvalue() == "WARNING theirs\n"


def test_in_a_process_of_ours_every_line_has_the_ids_once(stream, stranger, uninstalled):
    logs.install()
    logs.install()
    with logs.of_call(session_id="s", request_id="r", kernel_id="k"):
        stranger.warning("theirs")
        log.warning("ours")
    assert stream.getvalue().splitlines() == [f"WARNING theirs {IDS}", f"WARNING ours {IDS}"]


def test_threads_without_the_context_are_asked_for_their_call_otherwise(stream, stranger, uninstalled):
    setting: contextvars.ContextVar[logs.Named | None] = contextvars.ContextVar("as_dspy_keeps_it", default=None)
    logs.install(find=setting.get)

    def as_dspys_threads_do(named: logs.Named | None, logger: logging.Logger) -> None:
        setting.set(named)
        logger.warning("from a thread")

    with logs.of_call(session_id="not this thread's"):
        for named, logger in ((logs.Named("s", "r", "k"), log), (logs.Named("s", "r", "k"), stranger), (None, log)):
            thread = threading.Thread(target=as_dspys_threads_do, args=(named, logger))
            thread.start()
            thread.join()
    shown = [f"WARNING from a thread {IDS}"] * 2 + ["WARNING from a thread"]
    assert stream.getvalue().splitlines() == shown


def test_an_id_that_was_not_checked_yet_begins_no_line_of_its_own(stream):
    with logs.of_call(session_id="s", request_id="r]\nERROR all is lost \x1b[31m" + "x" * 500):
        log.warning("within")
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("WARNING within [session=s request=r]?ERROR?all?is?lost??[31mxxx")
    assert len(line) < 200


def test_where_nobody_set_up_logging_warnings_are_shown_as_python_shows_them():
    code = (
        "from dspex_kernels import logs\n"
        "log = logs.get_logger('dspex_kernels.some.module')\n"
        "with logs.of_call(session_id='s', request_id='r', kernel_id='k'):\n"
        "    log.warning('within')\n"
        "    log.info('not this')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == f"within {IDS}\n"
