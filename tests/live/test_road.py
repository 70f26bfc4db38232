"""The kernel's own channel: commands are answered where they run, and stock clients are none the worse for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from jupyter_client.session import Session

from dspex_kernels import SessionService, config, connect_kernel, errors
from dspex_kernels.protocol.envelopes import Envelopes
from dspex_kernels.sessions.kernel_connection import KernelConnection
from tests.live.kernels import LiveKernel
from tests.peers import DealerPeer, UnixPeer
from tests.waiting import wait_for, wait_until

RUN = {"program_id": "qa", "inputs": {"question": "?"}}


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(100):
            await work

    asyncio.run(bounded())


class Peer:
    """The plainest client of the channel, with Jupyter's own session."""

    def __init__(self, kernel: LiveKernel, key: bytes | None = None) -> None:
        info = kernel.manager.get_connection_info()
        self.endpoint = kernel.reply(kernel.send_raw({}, msg_type="kernel_info_request"))["dspex"]["endpoint"]
        self.session = Session(key=key or info["key"])
        self.wire: UnixPeer | DealerPeer
        if self.endpoint.startswith("unix://"):
            self.wire = UnixPeer.connect(self.endpoint.removeprefix("unix://"))
        else:
            self.wire = DealerPeer(self.endpoint, **_curve(info))

    def frames(self, command: str, args: dict[str, Any] | None = None, **content: Any) -> list[bytes]:
        message = self.session.msg("dspex_request", {"command": command, "args": args or {}, **content})
        return list(self.session.serialize(message))

    def send(self, *frames: bytes) -> None:
        self.wire.send(*frames)

    def answer(self, deadline: float = 20.0) -> dict[str, Any]:
        _, parts = self.session.feed_identities(self.wire.receive(deadline))
        return dict(self.session.deserialize(parts)["content"])

    def ask(self, command: str, args: dict[str, Any] | None = None, **content: Any) -> dict[str, Any]:
        self.send(*self.frames(command, args, **content))
        return self.answer()


def _curve(info: dict[str, Any]) -> dict[str, bytes]:
    """A socket's options for a kernel that encrypts."""
    if "curve_publickey" not in info:
        return {}
    public, secret = (info[f"curve_{half}key"] for half in ("public", "secret"))
    public, secret = (key.encode() if isinstance(key, str) else key for key in (public, secret))
    return {"curve_serverkey": public, "curve_publickey": public, "curve_secretkey": secret}


@pytest.fixture(scope="module", params=["tcp", "ipc"])
def kernel(request: pytest.FixtureRequest) -> Iterator[LiveKernel]:
    """The module's kernel: its own channel is ZMQ's over tcp, a plain unix socket over ipc."""
    with LiveKernel(transport=request.param) as kernel:
        yield kernel


@pytest.fixture
def make_peer(offline: LiveKernel) -> Iterator[Callable[..., Peer]]:
    with contextlib.ExitStack() as made:

        def make(**options: Any) -> Peer:
            peer = Peer(offline, **options)
            made.callback(peer.wire.close)
            return peer

        yield make


@pytest.fixture
def peer(make_peer: Callable[..., Peer]) -> Peer:
    return make_peer()


def test_it_is_where_the_kernels_transport_has_it(offline: LiveKernel, peer: Peer) -> None:
    info = offline.manager.get_connection_info()
    named = offline.execute("import os; print(os.environ.get('DSPEX_ROAD'))")
    offline.reply(named)
    if info["transport"] == "tcp":
        place = "None"
        assert peer.endpoint.startswith("tcp://")
    else:
        place = config.road_path(info["ip"])
        assert peer.endpoint == f"unix://{place}"
        assert Path(place).is_socket()
    assert wait_for(lambda: offline.output(named), what="what the starter named") == f"{place}\n"


def test_a_stock_client_is_answered_on_shell_and_control_as_ever(offline: LiveKernel, peer: Peer) -> None:
    assert peer.ask("create_program", {"program_id": "qa", "signature": "question -> answer"})["status"] == "ok"
    there = peer.ask("execute_program", RUN)["result"]["outputs"]
    assert offline.result("execute_program", RUN)["outputs"] == there
    assert offline.result("ping", control=True)["status"] == "ok"
    assert peer.ask("ping")["result"]["pid"] == offline.pid
    assert peer.ask("no_such_command")["error"]["code"] == "unknown_command"
    assert offline.run("6 * 7")["status"] == "ok"


def test_commands_are_answered_while_a_cell_computes(offline: LiveKernel, peer: Peer) -> None:
    cell = offline.execute("print('on'); import time; time.sleep(30)")
    wait_for(lambda: offline.output(cell), what="the cell's first output")
    assert peer.ask("list_programs")["status"] == "ok"
    offline.interrupt()
    offline.reply(cell)


def test_whoever_watches_the_kernel_sees_its_commands_and_their_output(offline: LiveKernel, peer: Peer) -> None:
    frames = peer.frames("list_programs")
    message_id = json.loads(frames[2])["msg_id"]
    peer.send(*frames)
    assert peer.answer()["status"] == "ok"
    offline.wait_for_state(message_id, "busy")
    offline.wait_for_state(message_id, "idle")


@pytest.mark.parametrize("how", ["another key", "no signature", "no frames", "no request", "no content"])
def test_what_is_not_a_request_of_the_kernels_own_is_dropped(
    make_peer: Callable[..., Peer], peer: Peer, how: str
) -> None:
    match how:
        case "another key":
            stranger = make_peer(key=b"another key")
            stranger.send(*stranger.frames("reset"))
        case "no signature":
            frames = peer.frames("reset")
            peer.send(frames[0], b"", *frames[2:])
        case "no frames":
            peer.send(b"hello")
            if isinstance(peer.wire, UnixPeer):
                peer.send()
        case "no request":
            peer.send(*peer.session.serialize(peer.session.msg("shutdown_request", {"restart": False})))
        case "no content":
            _, sealed = Envelopes(peer.session.key).seal("dspex_request", {})
            spoilt = [*sealed[2:5], b"{"]
            peer.send(sealed[0], Envelopes(peer.session.key)._sign(spoilt), *spoilt)
            assert peer.answer()["error"]["code"] == "invalid_message"
    assert peer.ask("list_programs")["status"] == "ok"
    assert not peer.wire.has_come()


def test_a_request_that_was_recorded_is_refused_on_every_channel(offline: LiveKernel, peer: Peer) -> None:
    program = {"program_id": "once", "signature": "question -> answer"}
    frames = peer.frames("create_program", program)
    peer.send(*frames)
    assert peer.answer()["status"] == "ok"
    assert peer.ask("delete_program", {"program_id": "once"})["status"] == "ok"
    peer.send(*frames)
    offline.client.shell_channel.socket.send_multipart(frames)
    assert offline.result("list_programs")["count"] == 0
    assert peer.ask("list_programs")["result"]["count"] == 0


def test_a_client_that_does_not_read_loses_no_reply(offline: LiveKernel, peer: Peer) -> None:
    count = 4000
    for number in range(count):
        peer.send(*peer.frames("list_programs", request_id=f"r{number}"))
    last = offline.result("ping", control=True)
    assert last["status"] == "ok"
    assert {peer.answer(60.0)["request_id"] for _ in range(count)} == {f"r{n}" for n in range(count)}


def test_changes_of_a_session_are_made_in_the_order_in_which_they_came(offline: LiveKernel) -> None:
    async def work() -> None:
        async with connect_kernel(offline.manager.connection_file) as session:
            program = {"program_id": "ordered", "replace": True}
            made = await asyncio.gather(
                *(
                    session.call("create_program", {**program, "signature": f"question -> answer_{n}"})
                    for n in range(30)
                )
            )
            assert [result["version"] for result in made] == list(range(1, 31))

    run(work())


def test_a_call_on_the_road_is_cancelled_over_control_and_streams_as_on_shell(offline: LiveKernel) -> None:
    async def work() -> None:
        async with connect_kernel(offline.manager.connection_file) as session:
            await session.configure(lm={"model": "offline/echo", "cache": False, "offline": {"latency_s": 60}})
            await session.create_program("qa", "question -> answer")
            call = asyncio.create_task(session.call("execute_program", RUN, request_id="long"))
            while not await session.cancel("long"):
                assert not call.done()
            with pytest.raises(errors.CommandCancelled):
                await call
            await session.configure(lm={"model": "offline/echo", "cache": False})
            events: list[dict[str, Any]] = []
            await session.call("execute_program", RUN, stream=True, on_event=events.append)
            assert "token" in {event["event"] for event in events}

    run(work())


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_it_is_encrypted_where_the_kernel_is(transport: str) -> None:
    with LiveKernel(transport=transport, transport_encryption="required") as kernel:
        peer = Peer(kernel)
        assert peer.endpoint.startswith(f"{transport}://")
        assert peer.ask("list_programs")["status"] == "ok"
        peer.wire.close()
        plain = DealerPeer(peer.endpoint, immediate=True)
        assert plain.socket.poll(500, zmq.POLLOUT) == 0
        plain.close()


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_a_restarted_kernel_is_found_again_by_a_client_that_stayed(transport: str) -> None:
    with LiveKernel(transport=transport) as kernel:

        async def work() -> None:
            async with KernelConnection(kernel.manager.get_connection_info()) as link:
                before = await link.identify()
                road = link._channels["road"]
                await link.request("list_programs")
                await asyncio.to_thread(kernel.restart)
                assert (await link.request("list_programs"))["count"] == 0
                await wait_until(lambda: link._channels.get("road") not in (None, road), what="the new road")
                after = await link.identify()
                assert link._road == after["endpoint"]
                assert (before["endpoint"] == after["endpoint"]) is (transport == "ipc")
                assert (await link.request("list_programs"))["count"] == 0

        run(work())


@pytest.mark.parametrize("end", ["killed", "ended"])
def test_over_ipc_nothing_of_it_is_left(tmp_path: Path, end: str) -> None:

    async def work() -> None:
        service = SessionService(
            data_dir=str(tmp_path / "data"), store_url=f"sqlite:///{tmp_path / 'store.sqlite'}"
        )
        async with service, service.session(lm={"model": "offline/echo"}) as session:
            await session.create_program("qa", "question -> answer")
            file = await service.get_connection_file(session.session_id)
            assert file is not None
            async with connect_kernel(file) as direct:
                endpoint = (await direct.info())["endpoint"]
                assert (await direct.program("qa").acall(question="?")).answer
            socket = Path(endpoint.removeprefix("unix://"))
            assert socket.is_socket()
            assert socket.parent.stat().st_mode & 0o777 == 0o700
            if end == "killed":
                os.kill((await session.info())["kernel_pid"], signal.SIGKILL)
            else:
                await session.destroy()
            await wait_until(lambda: not socket.exists(), what="the socket to be removed")
        assert not socket.parent.exists()

    run(work())


def test_over_ipc_a_kernel_whose_starter_would_not_remove_it_has_none() -> None:
    stock = LiveKernel(transport="ipc")
    del stock.manager.kernel_spec.metadata["kernel_provisioner"]
    with stock as kernel:
        info = kernel.reply(kernel.send_raw({}, msg_type="kernel_info_request"))
        assert "endpoint" not in info["dspex"]
        assert kernel.result("list_programs")["count"] == 0


def test_the_death_of_a_kernel_answers_every_call_on_its_road(tmp_path: Path) -> None:
    async def work() -> None:
        slow = {"model": "offline/echo", "cache": False, "offline": {"latency_s": 60}}
        service = SessionService(data_dir=str(tmp_path), store_url=f"sqlite:///{tmp_path / 'store.sqlite'}")
        async with service, service.session(lm=slow) as session:
            await session.create_program("qa", "question -> answer")
            calls = [asyncio.create_task(session.call("execute_program", RUN)) for _ in range(20)]
            pid = (await session.info())["kernel_pid"]
            while (await session.ping())["running"] < 20:
                assert not any(call.done() for call in calls)
            os.kill(pid, signal.SIGKILL)
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {errors.KernelDied}

    run(work())
