"""A kernel process without DSPy: it says what it is, answers pings, and ends. Starts in a third of the time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import zmq
from jupyter_client.session import Session

ABOUT = {"session_id": None, "protocol_version": "1.0", "backend": "pooled", "kernel_id": "light", "generation": 1}
PING = {"memory_bytes": 1, "lag_s": 0.0, "stuck": 0}


def main(connection_file: str) -> None:
    """Answer until a client asks to shut down; then exit with code 0, as kernels do."""
    info = json.loads(Path(connection_file).read_text())
    session = Session(key=info["key"].encode(), signature_scheme=info["signature_scheme"])
    context = zmq.Context()
    poller = zmq.Poller()
    for channel in ("shell", "control"):
        socket = context.socket(zmq.ROUTER)
        separator = "-" if info["transport"] == "ipc" else ":"
        socket.bind(f"{info['transport']}://{info['ip']}{separator}{info[f'{channel}_port']}")
        poller.register(socket, zmq.POLLIN)
    while True:
        for socket, _ in poller.poll():
            idents, parts = session.feed_identities(socket.recv_multipart())
            message = session.deserialize(parts)
            reply_type, content = answer(message)
            reply = session.msg(reply_type, content, parent=message)
            socket.send_multipart([*idents, *session.serialize(reply)])
            if message["msg_type"] == "shutdown_request":
                context.destroy(linger=100)
                return


def answer(message: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    match message["msg_type"]:
        case "kernel_info_request":
            return "kernel_info_reply", {"status": "ok", "supported_features": ["dspex"], "dspex": ABOUT}
        case "dspex_request":
            return "dspex_reply", {"status": "ok", "result": PING}
        case other:
            return other.replace("_request", "_reply"), {"status": "ok", "restart": False}


if __name__ == "__main__":
    main(sys.argv[1])
