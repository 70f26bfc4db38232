"""A socket on a loop: each message is taken, none is lost to a slow reader, nothing waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
import zmq

from dspex_kernels.sockets import BURST, LoopSocket
from tests.waiting import wait_until


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work

    asyncio.run(bounded())


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.fixture
def router(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.ROUTER)
    socket.sndhwm = 0
    socket.bind("tcp://127.0.0.1:*")
    return socket


def dealer(context: zmq.Context[zmq.Socket[bytes]], router: zmq.Socket[bytes], **options: Any) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    socket.sndhwm = 0
    for name, value in options.items():
        setattr(socket, name, value)
    socket.connect(router.getsockopt_string(zmq.LAST_ENDPOINT))
    return socket


def test_messages_go_both_ways_in_their_order(context, router):
    async def work() -> None:
        taken: list[list[bytes]] = []
        answers: list[list[bytes]] = []
        there = LoopSocket(router, lambda frames: (taken.append(frames), there.send(frames)))
        here = LoopSocket(dealer(context, router), answers.append)
        for n in range(3 * BURST):
            assert here.send([b"%d" % n, b""])
        await wait_until(lambda: len(answers) == 3 * BURST, what="the answers")
        assert answers == [[b"%d" % n, b""] for n in range(3 * BURST)]
        assert [frames[1:] for frames in taken] == answers
        here.close(linger=0)
        there.close(linger=0)

    run(work())


def test_a_reader_that_is_slow_loses_nothing(context, router):
    async def work() -> None:
        peer = dealer(context, router, rcvhwm=10)
        arrived: list[bytes] = []
        there = LoopSocket(router, lambda frames: arrived.append(frames[0]))
        peer.send(b"hello")
        await wait_until(lambda: arrived, what="the hello")
        for n in range(5000):
            assert there.send([arrived[0], b"%d" % n, b"x" * 500])
        assert [await asyncio.to_thread(peer.recv_multipart) for _ in range(5000)] == [
            [b"%d" % n, b"x" * 500] for n in range(5000)
        ]
        peer.close(linger=0)
        there.close(linger=0)

    run(work())


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


def test_a_message_that_cannot_be_taken_costs_no_other(context, router, caplog):
    async def work() -> None:
        taken: list[bytes] = []

        def take(frames: list[bytes]) -> None:
            if frames[1] == b"bad":
                raise RuntimeError("the taker's own fault")
            taken.append(frames[1])

        there = LoopSocket(router, take)
        here = LoopSocket(dealer(context, router), taken.append)
        for text in (b"good", b"bad", b"better"):
            here.send([text])
        await wait_until(lambda: taken == [b"good", b"better"], what="the others")
        assert "the taker's own fault" in caplog.text
        here.close(linger=0)
        there.close(linger=0)

    run(work())


def test_it_is_closed_from_any_thread_and_more_than_once(context, router):
    async def work() -> None:
        there = LoopSocket(router, lambda frames: None)
        closing = threading.Thread(target=there.close, kwargs={"linger": 0})
        closing.start()
        closing.join()
        assert router.closed
        assert not there.send([b"who", b"late"])
        there.close(linger=0)

    run(work())


def test_what_is_sent_when_the_loop_has_ended_still_leaves_though_more_has_come(context, router):
    made: list[LoopSocket] = []

    async def work() -> None:
        made.append(LoopSocket(router, lambda frames: None))

    peer = dealer(context, router, identity=b"peer")
    run(work())
    peer.send(b"nobody reads this any more")
    assert router.poll(10_000)
    assert made[0].send([b"peer", b"the last answer"])
    assert peer.recv() == b"the last answer"
    made[0].close(linger=0)
    peer.close(linger=0)
