"""Sessions make programs from the library, and follow its aliases.

A program that was made from an alias follows it: when the alias has moved, the next call that needs the program's
latest version first takes the new one in. So moving an alias costs nothing for sessions that are not called. A
program made from a version stays as it is, and so does one that was changed in its session since.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from dspex_kernels import errors
from dspex_kernels.protocol.commands import CreateProgramArgs, get_command
from dspex_kernels.sessions.calls import Call
from dspex_kernels.sessions.keeper import Keeper
from dspex_kernels.sessions.library import Following, Library, Reference
from dspex_kernels.sessions.live import LiveSession
from dspex_kernels.sessions.tasks import Tasks

_FOLLOWING_COMMANDS: Final = frozenset({"execute_program", "get_program", "export_program"})
"""They read a program's latest version, unless they name one."""
_FROM_THE_RECORD: Final = ("signature", "module", "module_args", "config", "tools", "adapter")
"""Arguments of ``create_program`` that a published record answers itself."""

Carry = Callable[[LiveSession, Call], Awaitable[dict[str, Any]]]
"""Carries a command of the service's own to a session; what it changed is durable when it returns."""


class Followers:
    """Makes programs from the library, and takes new versions in where a call needs them.

    Args:
        library: Says where aliases point.
        keeper: Says what has changed in a session.
        tasks: Where new versions are taken in: all calls that wait for one share it.
        timeout: Seconds in which a session must have taken a version in.
    """

    def __init__(self, library: Library, keeper: Keeper, tasks: Tasks, *, timeout: float) -> None:
        self._library = library
        self._keeper = keeper
        self._tasks = tasks
        self._timeout = timeout
        self._switches: dict[tuple[str, str], asyncio.Task[None]] = {}
        """By session and program, while a new version is taken in."""

    async def translate(self, call: Call) -> Call:
        """What a session is asked for a caller: ``create_program`` with ``library`` imports what is published.

        Raises:
            InvalidArguments: Its arguments do not fit, or say what the published program says itself.
            ProgramNotFound: The library does not have it.
        """
        if call.command == "import_program":
            return _import_as_its_own(call)
        if call.command != "create_program" or call.args.get("library") is None:
            return call
        args: CreateProgramArgs = get_command(call.command).parse(call.args)
        assert args.library is not None
        fields = CreateProgramArgs.model_fields
        defaults = {name: fields[name].get_default(call_default_factory=True) for name in _FROM_THE_RECORD}
        twice = [name for name, default in defaults.items() if getattr(args, name) != default]
        if twice:
            raise errors.InvalidArguments(
                f"create_program: {args.library} brings its own {', '.join(twice)}: leave that out, or leave out "
                "`library`",
                details={"command": call.command},
            )
        meant, version = await self._library.resolve(args.library)
        record = dict(await self._library.get_record(meant.name, version))
        if meant.alias is not None:
            record |= {"follows": str(meant), "library_version": version}
        imported = {"record": record, "program_id": args.program_id, "replace": args.replace}
        return replace(call, command="import_program", args={**imported, "if_version": args.if_version})

    async def follow(self, live: LiveSession, call: Call, deadline: float, carry: Carry) -> bool:
        """Bring the program that a call needs to where its alias points.

        Args:
            live: Whose; it has a place.
            call: Not carried yet.
            deadline: The call's, on the loop's clock.
            carry: Asks the session on the service's own behalf.

        Returns:
            False when nothing was to be done, and nothing waited for. True: look again whether the session has its
            place, and ask again.

        Raises:
            CommandTimeout: The time was over before.
            CommandCancelled: ``Places.withdraw`` found the request while it waited.
            DSPexError: The session could not take the new version in; nothing of the call ran.
        """
        program_id = _followed_by(live, call)
        if program_id is None or self._is_current(live, program_id):
            return False
        withdrawn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        key = call.request_id if call.request_id is not None else f"{id(withdrawn)}"
        live.queued[key] = withdrawn  # where ``Places.withdraw`` finds it
        try:
            async with asyncio.timeout_at(deadline):
                await self._catch_up(live, program_id, carry, withdrawn)
        except TimeoutError:
            following = live.following.get(program_id)
            raise errors.CommandTimeout(
                f"{call.command}: the time was over while program {program_id!r} was brought to "
                f"{following.reference if following else 'its alias'}; call again, or give more time",
                details={"session_id": live.session_id, "command": call.command},
                retry_after=1.0,
            ) from None  # the TimeoutError tells nothing more
        finally:
            live.queued.pop(key, None)
        if withdrawn.done():
            raise errors.CommandCancelled(f"{call.command} was cancelled before it ran")
        return True

    def _is_current(self, live: LiveSession, program_id: str) -> bool:
        # While a version is taken in, what is in the session may be newer than what is known of it.
        if (live.session_id, program_id) in self._switches:
            return False
        following = live.following[program_id]
        if not self._library.knows(following.reference):
            return False
        return self._library.target(following.reference) in (None, following.library_version)

    async def _catch_up(
        self, live: LiveSession, program_id: str, carry: Carry, withdrawn: asyncio.Future[None]
    ) -> None:
        following = live.following[program_id]
        key = (live.session_id, program_id)
        if key not in self._switches and not self._library.knows(following.reference):
            await self._library.look(following.reference)
            return  # most often that was all
        if key not in self._switches:
            self._switches[key] = self._tasks.spawn(self._switch(live, program_id, carry))
        switch = self._switches[key]
        await asyncio.wait({switch, withdrawn}, return_when=asyncio.FIRST_COMPLETED)
        if withdrawn.done():
            return
        if switch.cancelled():
            raise errors.ServiceClosed("the session service is closing")
        failure = switch.exception()
        if isinstance(failure, errors.DSPexError):
            raise errors.from_dict(failure.to_dict()) from failure  # each waiter has an exception of its own
        if failure is not None:
            raise failure

    async def _switch(self, live: LiveSession, program_id: str, carry: Carry) -> None:
        """Take a program's new version in. Runs for all who wait, whatever becomes of them."""
        try:
            await self._keeper.settle(
                live, live.record.generation
            )  # it may have been changed from inside its kernel
            following = live.following.get(program_id)
            version = None if following is None else self._library.target(following.reference)
            if following is None or version is None or version == following.library_version:
                return
            record = await self._record(following, version)
            if record is not None:
                await self._take_in(live, program_id, following, version, record, carry)
        finally:
            del self._switches[live.session_id, program_id]

    async def _record(self, following: Following, version: int) -> dict[str, Any] | None:
        """What the alias points to; None when it was unpublished just now."""
        try:
            record = await self._library.get_record(Reference.parse(following.reference).name, version)
        except errors.ProgramNotFound:
            self._library.lose(following.reference)
            return None
        return {**record, "follows": following.reference, "library_version": version}

    async def _take_in(
        self,
        live: LiveSession,
        program_id: str,
        following: Following,
        version: int,
        record: dict[str, Any],
        carry: Carry,
    ) -> None:
        args = {"record": record, "program_id": program_id, "if_version": following.version}
        try:
            result = await carry(live, Call("follow_program", args, self._timeout))
        except errors.DSPexError as failure:
            if isinstance(failure, errors.VersionConflict) and live.following.get(program_id) != following:
                return  # it was changed meanwhile: who waits looks again
            told = failure.to_dict()
            told["message"] = (
                f"program {program_id!r} follows {following.reference}, and its version {version} could not be "
                f"taken in: {failure.message}"
            )
            # Nothing of the calls that wait has run: what was the kernel's, the store's or the time's fault may be
            # done again. What a session refuses it refuses again.
            passes = isinstance(failure, errors.KernelError | errors.CallError | errors.StoreError)
            passes = passes and not isinstance(failure, errors.KernelOutOfMemory)
            raise errors.from_dict({**told, "retryable": failure.retryable or passes}) from failure
        if live.following.get(program_id) == following:  # its journal could not be read; it will be
            live.following[program_id] = replace(following, library_version=version, version=result["version"])


def _followed_by(live: LiveSession, call: Call) -> str | None:
    """The program of a call that follows an alias; None where the call needs no such program's latest version."""
    if not live.following or call.command not in _FOLLOWING_COMMANDS or call.args.get("version") is not None:
        return None
    program_id = call.args.get("program_id", call.args.get("id"))
    return program_id if isinstance(program_id, str) and program_id in live.following else None


def _import_as_its_own(call: Call) -> Call:
    """A caller's import without what the record followed: that is asked for by ``library``, not by a file."""
    record = call.args.get("record")
    if not isinstance(record, Mapping) or not (record.get("follows") or record.get("library_version")):
        return call
    return replace(call, args={**call.args, "record": {**record, "follows": None, "library_version": None}})
