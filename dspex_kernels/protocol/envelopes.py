"""How a message travels: frames, signed with the kernel's key, as Jupyter's wire protocol has them.

``jupyter_client``'s ``Session`` does the same for any message. It takes 60 µs to write one and read one, most of it
for dates that nobody here looks at; this takes 15, and a command's round trip is four of each.
"""

from __future__ import annotations

import hmac
import itertools
import json
import os
import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

DELIMITER = b"<IDS|MSG>"
"""Ends the identities, which stand before what is signed."""

WIRE_VERSION = "5.3"
"""Of Jupyter's messages, in their headers."""

REMEMBERED = 4096
"""Signatures by which a message that was recorded and sent again is known."""


@dataclass(slots=True)
class Opened:
    """A message whose signature is right.

    Attributes:
        identities: Where it came from; they lead its reply back.
        header: Its header.
        parent_header: The header of what it answers; empty where it answers nothing.
        body: Its content, not read yet.
    """

    identities: list[bytes]
    header: dict[str, Any]
    parent_header: dict[str, Any]
    body: bytes

    @property
    def msg_id(self) -> str:
        return str(self.header["msg_id"])

    @property
    def msg_type(self) -> str:
        return str(self.header["msg_type"])

    def content(self) -> Any:
        """What it says.

        Raises:
            ValueError: It is no JSON.
        """
        return _read(self.body)


class Envelopes:
    """Writes and reads the frames of messages. Made in the process that uses it: ids tell processes apart.

    Args:
        key: The kernel's; empty signs nothing.
        scheme: As connection files have it: ``hmac-sha256``.
        replayed: Says whether a signature was there before, and remembers it; None remembers those read here.

    Raises:
        ValueError: There is no such scheme.
    """

    def __init__(
        self,
        key: str | bytes,
        scheme: str = "hmac-sha256",
        *,
        replayed: Callable[[bytes], bool] | None = None,
    ) -> None:
        secret = key.encode() if isinstance(key, str) else key
        if not scheme.startswith("hmac-"):
            raise ValueError(f"no signature scheme {scheme!r}: messages are signed with hmac-…")
        self._signer = hmac.new(secret, digestmod=scheme.removeprefix("hmac-")) if secret else None
        self._replayed = replayed or _Memory().replayed
        self._writer = f"{secrets.token_hex(8)}_{os.getpid()}"
        self._numbers = itertools.count()  # from any thread

    def seal(
        self, msg_type: str, content: Mapping[str, Any], parent_header: Mapping[str, Any] | None = None
    ) -> tuple[str, list[bytes]]:
        """A message's id and its frames.

        Args:
            msg_type: ``dspex_request`` …
            content: JSON values.
            parent_header: The header of what it answers; None is nothing.
        """
        msg_id = f"{self._writer}_{next(self._numbers)}"
        header = {
            "msg_id": msg_id,
            "msg_type": msg_type,
            "username": "",
            "session": self._writer,
            "date": datetime.now(UTC).isoformat(),
            "version": WIRE_VERSION,
        }
        parts = [orjson.dumps(header), _write(parent_header or {}), b"{}", _write(content)]
        return msg_id, [DELIMITER, self._sign(parts), *parts]

    def open(self, frames: Sequence[bytes]) -> Opened:
        """The message in frames as they were received.

        Raises:
            ValueError: They are no message, it is not signed with our key, or it was there before.
        """
        start = frames.index(DELIMITER) + 1
        if len(frames) < start + 5:
            raise ValueError("frames are missing")
        signature, parts = bytes(frames[start]), frames[start + 1 : start + 5]
        if not hmac.compare_digest(signature, self._sign(parts)):
            raise ValueError("it is not signed with the kernel's key")
        header, parent_header = _read(parts[0]), _read(parts[1])
        if not isinstance(header, dict) or not isinstance(parent_header, dict) or _KNOWN - header.keys():
            raise ValueError("its header is none")
        if signature and self._replayed(signature):
            raise ValueError("it was received before")
        return Opened(list(frames[: start - 1]), header, parent_header, parts[3])

    def _sign(self, parts: Sequence[bytes]) -> bytes:
        if self._signer is None:
            return b""
        signer = self._signer.copy()
        for part in parts:
            signer.update(part)
        return signer.hexdigest().encode()


class _Memory:
    """The last signatures."""

    def __init__(self) -> None:
        self._known: set[bytes] = set()
        self._order: deque[bytes] = deque()

    def replayed(self, signature: bytes) -> bool:
        if signature in self._known:
            return True
        self._known.add(signature)
        self._order.append(signature)
        if len(self._order) > REMEMBERED:
            self._known.discard(self._order.popleft())
        return False


_KNOWN = {"msg_id", "msg_type"}


def _write(value: Any) -> bytes:
    try:
        return orjson.dumps(value, default=str)
    except TypeError:  # lone surrogates and integers of any size, of user code
        return json.dumps(value, default=str, ensure_ascii=False, skipkeys=True).encode(errors="replace")


def _read(part: bytes) -> Any:
    try:
        return orjson.loads(part)
    except ValueError:  # Python writes NaN, and integers of any size
        return json.loads(part.decode(errors="replace"))
