"""A socket on a loop: each message is taken, none is lost to a slow reader, nothing waits.

ZMQ's and a plain unix one keep the same contract; what only the latter does is in ``test_streams``.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from dspex_kernels.sockets import LoopSocket
from dspex_kernels.streams import LoopStream, StreamListener, TakeFrom
from tests.peers import DealerPeer, UnixPeer
from tests.waiting import wait_until

MANY = 3000
"""Messages: more than are read in one turn of the loop."""
LARGE = bytes(range(256)) * (5 << 12)
"""More than a socket holds for a peer that does not read: 5 MB."""


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work

    asyncio.run(bounded())


class OverZMQ:
    """A ROUTER that listens, and DEALERs."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.router.sndhwm = 0
        self.router.bind("tcp://127.0.0.1:*")
        self._endpoint = self.router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._peers: list[DealerPeer] = []

    def listen(self, take: TakeFrom) -> None:
        """Listen on this loop."""

        def take_from(frames: list[bytes]) -> None:
            take(frames[1:], lambda answer: self._channel.send([frames[0], *answer]))

        self._channel = LoopSocket(self.router, take_from)

    def close(self, *, linger: int) -> None:
        """Listen no more."""
        self._channel.close(linger=linger)

    def connect(self, take: Callable[[list[bytes]], Any]) -> LoopSocket:
        return LoopSocket(DealerPeer(self._endpoint, context=self.context).socket, take)

    def peer(self, **options: Any) -> DealerPeer:
        self._peers.append(DealerPeer(self._endpoint, context=self.context, **options))
        return self._peers[-1]

    def has_come(self) -> bool:
        """Whether what a peer sent is there to be read."""
        return bool(self.router.poll(10_000))

    def end(self) -> None:
        for peer in self._peers:
            peer.close()
        self.context.destroy(linger=0)


class OverUnixSockets:
    """A listener at a path, and who connects there."""

    def __init__(self, directory: Path) -> None:
        self._path = str(directory / uuid.uuid4().hex)
        self._listener = StreamListener(self._path)
        self.listen, self.close = self._listener.listen, self._listener.close
        self._peers: list[UnixPeer] = []

    def connect(self, take: Callable[[list[bytes]], Any]) -> LoopStream:
        return LoopStream.connect(self._path, take)

    def peer(self, **_: Any) -> UnixPeer:
        self._peers.append(UnixPeer.connect(self._path))
        return self._peers[-1]

    def has_come(self) -> bool:
        """A unix socket's is there once it is sent."""
        return True

    def end(self) -> None:
        for peer in self._peers:
            peer.close()
        self.close(linger=0)


Kind = OverZMQ | OverUnixSockets


@pytest.fixture(params=["zmq", "unix"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    made = OverZMQ() if request.param == "zmq" else OverUnixSockets(tmp_path_factory.mktemp("s"))
    yield made
    made.end()


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


def message(number: int) -> list[bytes]:
    """One of one to seven frames, of which some are empty."""
    return [b"" if (number + place) % 3 else b"%d.%d" % (number, place) for place in range(1 + number % 7)]


async def turns() -> None:
    """Some turns of the loop: what is ready is done in them."""
    for _ in range(5):
        await asyncio.sleep(0)


# What both do


def test_messages_go_both_ways_in_their_order(kind):
    async def work() -> None:
        taken: list[list[bytes]] = []
        answers: list[list[bytes]] = []
        kind.listen(lambda frames, send: (taken.append(frames), send(frames)))
        here = kind.connect(answers.append)
        sent = [message(n) for n in range(MANY)]
        for frames in sent:
            assert here.send(frames)
        await wait_until(lambda: len(answers) == MANY, what="the answers")
        assert taken == sent
        assert answers == sent
        here.close(linger=0)
        kind.close(linger=0)

    run(work())


def test_a_message_larger_than_the_sockets_hold_goes_both_ways_among_others(kind):
    async def work() -> None:
        taken: list[list[bytes]] = []
        answers: list[list[bytes]] = []
        kind.listen(lambda frames, send: (taken.append(frames), send(frames)))
        here = kind.connect(answers.append)
        sent = [[b"before"], [b"head", LARGE, b""], [b"between"], [LARGE], [b"after"]]
        for frames in sent:
            assert here.send(frames)
        await wait_until(lambda: len(answers) == len(sent), what="the answers")
        assert taken == sent
        assert answers == sent
        here.close(linger=0)
        kind.close(linger=0)

    run(work())


def test_each_peer_gets_the_answers_to_its_own(kind):
    async def work() -> None:
        kind.listen(lambda frames, send: send([b"to", *frames]))
        peers = {b"peer %d" % n: kind.peer() for n in range(10)}
        for turn in (b"first", b"second"):
            for name, peer in peers.items():
                peer.send(name, turn)
        for name, peer in peers.items():
            for turn in (b"first", b"second"):
                assert await asyncio.to_thread(peer.receive) == [b"to", name, turn]
        kind.close(linger=0)

    run(work())


def test_a_reader_that_is_slow_loses_nothing(kind):
    async def work() -> None:
        senders: list[Callable[[list[bytes]], Any]] = []
        kind.listen(lambda _, send: senders.append(send))
        peer = kind.peer(rcvhwm=10)
        peer.send(b"hello")
        await wait_until(lambda: senders, what="the hello")

        def receive(count: int) -> list[list[bytes]]:
            return [peer.receive() for _ in range(count)]

        def send(start: int) -> None:
            for n in range(start, start + 5000):
                assert senders[0]([b"%d" % n, b"x" * 500])

        send(0)
        await turns()
        received = await asyncio.to_thread(receive, 2000)  # while some waits, more is sent
        send(5000)
        received += await asyncio.to_thread(receive, 8000)
        assert received == [[b"%d" % n, b"x" * 500] for n in range(10_000)]
        kind.close(linger=0)

    run(work())


def test_a_message_that_cannot_be_taken_costs_no_other(kind, caplog):
    async def work() -> None:
        taken: list[list[bytes]] = []

        def take(frames: list[bytes], send: Callable[[list[bytes]], Any]) -> None:
            if frames == [b"bad"]:
                raise RuntimeError("the taker's own fault")
            taken.append(frames)

        kind.listen(take)
        here = kind.connect(taken.append)
        for text in (b"good", b"bad", b"better"):
            here.send([text])
        await wait_until(lambda: taken == [[b"good"], [b"better"]], what="the others")
        assert "the taker's own fault" in caplog.text
        here.close(linger=0)
        kind.close(linger=0)

    run(work())


def test_it_tells_once_that_its_peer_has_gone(kind):
    async def work() -> None:
        taken: list[list[bytes]] = []
        gone: list[str] = []
        kind.listen(lambda frames, _: taken.append(frames))
        here = kind.connect(taken.append)
        here.when_disconnected(lambda: gone.append("gone"))
        here.send([b"hello"])
        await wait_until(lambda: taken, what="the hello")
        assert gone == []
        kind.close(linger=0)
        await wait_until(lambda: gone, what="the peer's end noticed")
        await turns()
        here.close(linger=0)
        await turns()
        assert gone == ["gone"]

    run(work())


def test_who_closes_it_is_not_told_that_its_peer_has_gone(kind):
    async def work() -> None:
        gone: list[str] = []
        kind.listen(lambda frames, send: send(frames))
        answers: list[list[bytes]] = []
        here = kind.connect(answers.append)
        here.when_disconnected(lambda: gone.append("gone"))
        here.send([b"hello"])
        await wait_until(lambda: answers, what="the answer")
        here.close(linger=0)
        kind.close(linger=0)
        await turns()
        assert gone == []

    run(work())


def test_it_is_closed_from_any_thread_and_more_than_once(kind):
    async def work() -> None:
        kind.listen(lambda frames, send: send(frames))
        answers: list[list[bytes]] = []
        here = kind.connect(answers.append)
        here.send([b"in time"])
        await wait_until(lambda: answers, what="the answer")
        closing = threading.Thread(target=here.close, kwargs={"linger": 0})
        closing.start()
        closing.join()
        assert not here.send([b"late"])
        here.close(linger=0)
        assert not here.send([b"late"])
        kind.close(linger=0)

    run(work())


@pytest.mark.parametrize("by", ["its own thread", "another thread"])
def test_who_listens_is_closed_from_any_thread_and_more_than_once(kind, by):
    async def work() -> None:
        senders: list[Callable[[list[bytes]], Any]] = []
        kind.listen(lambda _, send: senders.append(send))
        peer = kind.peer()
        peer.send(b"hello")
        await wait_until(lambda: senders, what="the hello")
        for _ in range(2):
            if by == "another thread":
                await asyncio.to_thread(kind.close, linger=0)
            else:
                kind.close(linger=0)
            assert not senders[0]([b"late"])

    run(work())


async def hear(kind: Any, peer: Any, senders: list[Callable[[list[bytes]], Any]]) -> None:
    """Listen until the peer has said hello; what sends to it is put down."""
    kind.listen(lambda _, send: senders.append(send))
    peer.send(b"hello")
    await wait_until(lambda: senders, what="the hello")


@pytest.mark.parametrize("answers", [[b"the last answer", b"and one more"], [LARGE]], ids=["small", "large"])
def test_what_is_sent_when_the_loop_has_ended_still_leaves_though_more_has_come(kind, answers):
    senders: list[Callable[[list[bytes]], Any]] = []
    peer = kind.peer()

    async def work() -> None:
        await hear(kind, peer, senders)

    run(work())
    peer.send(b"nobody reads this any more")
    assert kind.has_come()
    for answer in answers:
        assert senders[0]([answer])
    closing = threading.Thread(target=kind.close, kwargs={"linger": 20_000})
    closing.start()
    assert [peer.receive() for _ in answers] == [[answer] for answer in answers]
    closing.join()


def test_what_was_not_yet_sent_when_the_loop_ended_leaves_while_another_thread_closes(kind):
    senders: list[Callable[[list[bytes]], Any]] = []
    peer = kind.peer()

    async def work() -> None:
        await hear(kind, peer, senders)
        for frames in ([LARGE], [b"after", LARGE], [b"the last"]):
            assert senders[0](frames)

    run(work())
    closing = threading.Thread(target=kind.close, kwargs={"linger": 20_000})
    closing.start()
    assert [peer.receive() for _ in range(3)] == [[LARGE], [b"after", LARGE], [b"the last"]]
    closing.join()


# What only ZMQ's does


def test_a_socket_that_waits_for_a_peer_says_that_it_did_not_send(context, tmp_path_factory):
    async def work() -> None:
        endpoint = f"ipc://{tmp_path_factory.mktemp('s')}/s"
        taken: list[list[bytes]] = []
        lonely = context.socket(zmq.DEALER)
        lonely.immediate = True
        lonely.setsockopt(zmq.RECONNECT_IVL, 5)
        lonely.connect(endpoint)
        here = LoopSocket(lonely, taken.append)
        assert not here.send([b"anybody?"])
        again = context.socket(zmq.ROUTER)
        again.bind(endpoint)
        there = LoopSocket(again, taken.append)
        await here.until_writable()
        assert here.send([b"now"])
        await wait_until(lambda: taken, what="the message")
        assert taken[0][1:] == [b"now"]
        here.close(linger=0)
        there.close(linger=0)

    run(work())
