"""`dspex-kernels library`: what is published, and where aliases point. It works on the store itself."""

from __future__ import annotations

import asyncio
import getpass
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traitlets import Unicode

from dspex_kernels import errors
from dspex_kernels.cli.base import BASE_ALIASES, Subcommand, say_json, store_url
from dspex_kernels.protocol import limits

if TYPE_CHECKING:
    from pydantic import BaseModel

    from dspex_kernels.sessions.library import Library

_ARGUMENTS = {
    "list": (),
    "publish": ("RECORD", "NAME"),
    "point": ("NAME@ALIAS", "VERSION"),
    "rollback": ("NAME@ALIAS",),
}
"""What each action is given."""


class LibraryApp(Subcommand):
    name = "jupyter-dspex-library"
    usage = f"library ({' | '.join(' '.join([action, *words]) for action, words in _ARGUMENTS.items())})"
    description = (
        "Publish programs and move the aliases that sessions follow. RECORD is a file with what export_program "
        "tells, or - for stdin. Works on the store itself; services that use it see a move within a second. Each "
        "outcome is one line of JSON."
    )
    examples = """
    dspex-kernels library list
    dspex-kernels call --existing=1234 export_program program_id=qa_bot > qa.json
    dspex-kernels library publish qa.json qa --alias=beta
    dspex-kernels library point qa@prod 3 --store=postgresql+psycopg://localhost/dspex
    dspex-kernels library rollback qa@prod
    """
    aliases = BASE_ALIASES | {
        "store": "LibraryApp.store",
        "alias": "LibraryApp.alias",
        "by": "LibraryApp.by",
    }

    store = Unicode(
        "", help="The store: a SQLite file, or an SQLAlchemy URL; SessionService.store_url by default."
    ).tag(config=True)
    alias = Unicode("", help="With publish: an alias that points to the new version from then on.").tag(config=True)
    by = Unicode("", help="Who does it, for the record; the login name by default.").tag(config=True)

    async def run(self) -> int:
        """Do one action, and print what came of it."""
        action, *words = self.extra_args or [""]
        if action not in _ARGUMENTS:
            self.fail_usage(f"which action? There are {', '.join(_ARGUMENTS)}")
        wanted = _ARGUMENTS[action]
        if len(words) != len(wanted):
            self.fail_usage(f"{action} takes {' and '.join(wanted) or 'nothing more'}, and was given {len(words)}")
        if self.alias and action != "publish":
            self.fail_usage(f"--alias is for publish: {action} takes {' and '.join(wanted) or 'none'}")
        actions: dict[str, Callable[..., Awaitable[list[Any]]]] = {
            "list": _list,
            "publish": self._publish,
            "point": self._point,
            "rollback": self._roll_back,
        }
        for outcome in await self._with_library(actions[action], words, may_create=action == "publish"):
            say_json(outcome.model_dump(mode="json"))
        return 0

    async def _with_library(
        self, act: Callable[..., Awaitable[list[BaseModel]]], words: list[str], *, may_create: bool
    ) -> list[BaseModel]:
        from dspex_kernels.sessions.library import Library
        from dspex_kernels.sessions.store.sql import SQLStore

        async with SQLStore(store_url(self.store, self.config, may_create=may_create)) as store:
            return await act(Library(store, self.log), *words)

    async def _publish(self, library: Library, path: str, name: str) -> list[BaseModel]:
        record = await asyncio.to_thread(_read_record, path)
        return [await library.publish_record(record, name, alias=self.alias or None, by=self._who())]

    async def _point(self, library: Library, reference: str, version: str) -> list[BaseModel]:
        if not (version.isascii() and version.isdecimal()):
            raise errors.InvalidArguments(f"{version[:64]!r} is no version: give a whole number, as list tells it")
        return [await library.move_alias(reference, int(version), by=self._who())]

    async def _roll_back(self, library: Library, reference: str) -> list[BaseModel]:
        return [await library.roll_back_alias(reference, by=self._who())]

    def _who(self) -> str:
        if self.by:
            return self.by
        try:
            return getpass.getuser()
        except (KeyError, OSError):  # a container's user need not have a name
            return ""


async def _list(library: Library) -> list[Any]:
    return [*await library.list_library()]


def _read_record(path: str) -> dict[str, Any]:
    """A program record, or the result of ``export_program`` around it."""
    what = "stdin" if path == "-" else path
    try:
        if path == "-":
            data = sys.stdin.buffer.read(limits.MAX_REQUEST_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(limits.MAX_REQUEST_BYTES + 1)
        if len(data) > limits.MAX_REQUEST_BYTES:
            raise errors.TooLarge(f"{what} holds more than {limits.MAX_REQUEST_BYTES:,} bytes: no record does")
        value = json.loads(data)
    except OSError as failure:
        raise errors.InvalidArguments(f"cannot read {what}: {failure.strerror}") from failure
    except (ValueError, RecursionError) as failure:
        raise errors.InvalidRecord(f"{what} is not JSON: {str(failure)[:200]}") from None  # the cause quotes it all
    if isinstance(value, dict) and isinstance(value.get("record"), dict):
        value = value["record"]
    if not isinstance(value, dict):
        raise errors.InvalidRecord(f"{what} is not a JSON object but {type(value).__name__}")
    return value
