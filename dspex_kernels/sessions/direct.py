"""A session straight over its kernel's connection file: no service, any running dspex kernel."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Unpack

import orjson
import zmq
from jupyter_client.connect import find_connection_file
from traitlets import TraitError

from dspex_kernels import errors
from dspex_kernels.protocol.commands import DEFAULT_TIMEOUT_S
from dspex_kernels.sessions.calls import CallOptions
from dspex_kernels.sessions.kernel_connection import KernelConnection
from dspex_kernels.sessions.session import Session


class KernelSession(Session):
    """A session in a kernel that somebody else started and will end.

    Args:
        connection: Open, to a dspex kernel.
        session_id: Whose commands.
        about: What the kernel told about itself.
    """

    def __init__(self, connection: KernelConnection, session_id: str | None, about: Mapping[str, Any]) -> None:
        super().__init__(session_id)
        self._connection = connection
        self._about = dict(about)

    async def call(
        self,
        command: str,
        args: Mapping[str, Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> dict[str, Any]:
        """As ``Session.call``."""
        return await self._connection.request(command, args, session_id=self.session_id, **options)

    async def info(self) -> dict[str, Any]:
        """``session_id``, ``backend``, ``kernel_id``, ``generation``, ``protocol_version``."""
        return {**self._about, "session_id": self.session_id}

    async def destroy(self) -> None:
        """Drop the session's programs and settings: the kernel itself is its starter's to end."""
        await self.reset()

    async def close(self) -> None:
        """Close the connection; the kernel and the session's programs stay."""
        await self._connection.close()


class _Connecting:
    """What ``connect_kernel`` returns: await it, or enter it."""

    def __init__(self, connection_file: str | os.PathLike[str], session_id: str | None, timeout: float) -> None:
        self._connection_file = connection_file
        self._session_id = session_id
        self._timeout = timeout
        self._session: KernelSession | None = None

    def __await__(self) -> Generator[Any, None, KernelSession]:
        return self._connect().__await__()

    async def __aenter__(self) -> KernelSession:
        self._session = await self._connect()
        return self._session

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def _connect(self) -> KernelSession:
        info = await asyncio.to_thread(_read_connection_file, self._connection_file)
        connection = await self._open(info)
        try:
            about = await connection.identify(timeout=self._timeout)
            return KernelSession(connection, self._choose(about), about)
        except BaseException:
            await connection.close()
            raise

    async def _open(self, info: Mapping[str, Any]) -> KernelConnection:
        path = os.fspath(self._connection_file)
        connection: KernelConnection | None = None
        try:
            connection = KernelConnection(info, name=path)
            return await connection.open()
        except (TraitError, TypeError, ValueError, zmq.ZMQError) as failure:
            if connection is not None:
                await connection.close()
            raise errors.NotADSPexKernel(f"{path} is no connection file of a kernel: {failure}") from failure

    def _choose(self, about: Mapping[str, Any]) -> str:
        theirs = about.get("session_id")
        if self._session_id is None and theirs is None:
            raise errors.InvalidSession(
                f"kernel {os.fspath(self._connection_file)} is shared by many sessions: say which with session_id="
            )
        if theirs is not None and self._session_id not in (None, theirs):
            raise errors.SessionMismatch(
                f"kernel {os.fspath(self._connection_file)} is session {theirs!r}, not {self._session_id!r}",
                details={"session_id": theirs},
            )
        return str(theirs if theirs is not None else self._session_id)


def connect_kernel(
    connection_file: str | os.PathLike[str], *, session_id: str | None = None, timeout: float = DEFAULT_TIMEOUT_S
) -> _Connecting:
    """Connect to a running dspex kernel; its session has the same methods as the service's.

    ``async with connect_kernel(path) as session: …`` closes the connection at the end; ``session = await
    connect_kernel(path)`` leaves that to you (``await session.close()``).

    Args:
        connection_file: A path, or as ``jupyter --existing`` takes it: a file's name or a part of it, looked up
            in Jupyter's runtime directory.
        session_id: Whose commands; None is the kernel's own session. A pooled kernel needs it.
        timeout: Seconds for the kernel to answer.

    Raises:
        NotADSPexKernel: It is another kind of kernel, or there is no such connection file.
        SessionMismatch: The kernel is another session's.
        InvalidSession: A pooled kernel, and no ``session_id``.
        CommandTimeout: No kernel answers there.
    """
    return _Connecting(connection_file, session_id, timeout)


def _read_connection_file(connection_file: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(connection_file)
    try:
        if not path.is_file():
            path = Path(find_connection_file(os.fspath(connection_file)))
        info = orjson.loads(path.read_bytes())
    except (OSError, ValueError) as failure:
        raise errors.NotADSPexKernel(
            f"no connection file {os.fspath(connection_file)!r} that can be read: {failure}; "
            "%connect_info in the kernel's notebook tells its name"
        ) from failure
    if not isinstance(info, dict) or not {"ip", "shell_port", "control_port", "iopub_port"} <= info.keys():
        raise errors.NotADSPexKernel(f"{path} is not a connection file: it lacks ip or ports")
    return info
