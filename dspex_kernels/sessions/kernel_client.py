"""A ``jupyter_client`` client that also speaks to dspex sessions, for those who set ``client_class``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from jupyter_client.asynchronous import AsyncKernelClient

from dspex_kernels.protocol.commands import DEFAULT_TIMEOUT_S
from dspex_kernels.sessions.calls import CallOptions
from dspex_kernels.sessions.kernel_connection import KernelConnection


class DSPexKernelClient(AsyncKernelClient):
    """An ``AsyncKernelClient`` with ``dspex()``.

    ``c.KernelManager.client_class = "dspex_kernels.DSPexKernelClient"`` gives it to whoever asks a manager for a
    client. dspex messages travel on a connection of their own, beside the client's channels, which discard
    replies that are not the one waited for.
    """

    _dspex_connection: KernelConnection | None = None

    async def dspex(
        self,
        command: str,
        args: Mapping[str, Any] | None = None,
        *,
        session_id: str | None = None,
        **options: Unpack[CallOptions],
    ) -> dict[str, Any]:
        """Ask one command of a session in this kernel; any number at once.

        Args:
            command: A name of the command table.
            args: Its arguments.
            session_id: Whose command; None is a dedicated kernel's own session.
            **options: As ``Session.call`` takes them.

        Raises:
            NotADSPexKernel: The kernel is another kind.
            DSPexError: What the kernel answered.
        """
        connection = self._dspex_connection
        if connection is None:
            connection = self._dspex_connection = KernelConnection(self.get_connection_info(), context=self.context)
            self._dspex_identified = False
            await connection.open()
        if not self._dspex_identified:
            await connection.identify(timeout=options.get("timeout") or DEFAULT_TIMEOUT_S)
            self._dspex_identified = True
        return await connection.request(command, args, session_id=session_id, **options)

    def stop_channels(self) -> None:
        """As Jupyter's, and closes the connection for dspex messages; ``dspex()`` opens another."""
        super().stop_channels()
        connection, self._dspex_connection = self._dspex_connection, None
        if connection is not None:
            connection.drop()
