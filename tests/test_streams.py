"""A unix socket on a loop, where it is not as ZMQ's: pieces, peers that misbehave or go, the file of the listener.

What both do is in ``test_sockets``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspex_kernels import streams
from dspex_kernels.streams import LoopStream, StreamListener
from tests.peers import SIZE, UnixPeer, packed
from tests.waiting import wait_until

LARGE = bytes(1 << 22)
"""More than a socket holds for a peer that does not read: 4 MB."""

Frames = list[bytes]


def run(work: Coroutine[Any, Any, None], *, within: float = 30) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(within):
            await work

    asyncio.run(bounded())


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("s") / "s")


@pytest.fixture
def make_peer(path: str) -> Iterator[Callable[[], UnixPeer]]:
    """Connects to who listens at the path."""
    with contextlib.ExitStack() as made:

        def make() -> UnixPeer:
            peer = UnixPeer.connect(path)
            made.callback(peer.close)
            return peer

        yield make


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, UnixPeer]]:
    """A connection: the end that is to be put on a loop, and its peer's."""
    ours, theirs = socket.socketpair()
    yield ours, UnixPeer(theirs)
    ours.close()
    theirs.close()


async def is_read(ours: socket.socket) -> None:
    """Return when the loop has read all that has come."""

    def is_empty() -> bool:
        with contextlib.suppress(BlockingIOError):
            return not ours.recv(1, socket.MSG_PEEK)
        return True

    await wait_until(is_empty, what="what came to be read")


# What comes in


def test_messages_that_come_in_pieces_are_taken_once_they_are_whole(pair):
    async def work() -> None:
        ours, peer = pair
        taken: list[Frames] = []
        stream = LoopStream(ours, taken.append)
        sent = [[b"one", b"", b"two"], [b""], [b"three"]]
        for count, frames in enumerate(sent):
            for byte in packed(*frames):
                assert len(taken) == count
                peer.socket.sendall(bytes([byte]))
                await is_read(ours)
            assert taken == sent[: count + 1]
        stream.close(linger=0)

    run(work())


def test_messages_that_come_together_are_taken_one_by_one(pair):
    async def work() -> None:
        ours, peer = pair
        taken: list[Frames] = []
        stream = LoopStream(ours, taken.append)
        fourth = packed(b"the fourth")
        peer.socket.sendall(packed(b"first") + packed(b"second", b"") + packed(b"third") + fourth[:7])
        await is_read(ours)
        assert taken == [[b"first"], [b"second", b""], [b"third"]]
        peer.socket.sendall(fourth[7:])
        await is_read(ours)
        assert taken[3:] == [[b"the fourth"]]
        stream.close(linger=0)

    run(work())


def test_who_closes_it_in_taking_a_message_takes_none_of_those_that_came_along(pair):
    async def work() -> None:
        ours, peer = pair
        taken: list[Frames] = []

        def take(frames: Frames) -> None:
            taken.append(frames)
            stream.close(linger=0)

        stream = LoopStream(ours, take)
        peer.socket.sendall(packed(b"first") + packed(b"second"))
        await wait_until(lambda: taken, what="the first")
        assert taken == [[b"first"]]

    run(work())


def test_what_a_peer_sent_before_it_went_is_taken(pair):
    async def work() -> None:
        ours, peer = pair
        happened: list[Any] = []
        stream = LoopStream(ours, happened.append)
        stream.when_disconnected(lambda: happened.append("gone"))
        peer.socket.sendall(packed(b"first") + packed(b"last words") + packed(b"cut off")[:-1])
        peer.close()
        await wait_until(lambda: "gone" in happened, what="the peer's end noticed")
        assert happened == [[b"first"], [b"last words"], "gone"]

    run(work())


@pytest.mark.parametrize(
    "nonsense",
    [
        SIZE.pack(streams.MAX_MESSAGE_BYTES + 1),
        SIZE.pack(6) + SIZE.pack(3) + b"ab",
        SIZE.pack(7 + 3) + SIZE.pack(3) + b"abc" + bytes(3),
    ],
    ids=["too much", "a frame cut off", "a frame's size cut off"],
)
def test_who_sends_nonsense_is_not_listened_to_any_more_and_others_are(path, make_peer, nonsense, caplog):
    async def work() -> None:
        taken: list[Frames] = []
        listener = StreamListener(path)
        listener.listen(lambda frames, send: (taken.append(frames), send(frames)))
        other, peer = make_peer(), make_peer()
        peer.socket.sendall(packed(b"fine") + nonsense)
        assert await asyncio.to_thread(peer.receive) == [b"fine"]
        with pytest.raises(EOFError):
            await asyncio.to_thread(peer.receive)
        with pytest.raises(BrokenPipeError):
            peer.send(b"listen to me")
        for one in (other, make_peer()):
            one.send(b"me too")
            assert await asyncio.to_thread(one.receive) == [b"me too"]
        assert taken == [[b"fine"], [b"me too"], [b"me too"]]
        assert caplog.text.count("is not listened to any more") == 1
        listener.close(linger=0)

    run(work())


def test_a_message_may_be_as_large_as_the_limit_and_no_larger(pair, monkeypatch):
    monkeypatch.setattr(streams, "MAX_MESSAGE_BYTES", 100)

    async def work() -> None:
        ours, peer = pair
        happened: list[Any] = []
        stream = LoopStream(ours, happened.append)
        stream.when_disconnected(lambda: happened.append("gone"))
        largest = bytes(100 - SIZE.size)
        peer.send(largest)
        peer.send(largest + b"!")
        await wait_until(lambda: "gone" in happened, what="the stream to end")
        assert happened == [[largest], "gone"]

    run(work())


# What goes out


def test_the_largest_messages_go_as_fast_as_small_ones(pair):
    """What is left of one must not be moved each time that a socket takes the next part."""

    async def work() -> None:
        ours, peer = pair
        taken: list[int] = []
        here = LoopStream(ours, lambda frames: None)
        there = LoopStream(peer.socket, lambda frames: taken.append(len(frames[0])))
        assert here.send([bytes(1 << 26)])
        await wait_until(lambda: taken, deadline=30, what="the message")
        assert taken == [1 << 26]
        here.close(linger=0)
        there.close(linger=0)

    run(work(), within=4)


def test_nothing_is_sent_to_a_peer_that_has_gone(pair):
    async def work() -> None:
        ours, peer = pair
        gone: list[str] = []
        stream = LoopStream(ours, lambda frames: None)
        stream.when_disconnected(lambda: gone.append("gone"))
        peer.close()
        assert not stream.send([b"before it is noticed"])
        await wait_until(lambda: gone, what="the peer's end noticed")
        assert not stream.send([b"after"])
        stream.close(linger=1000)
        assert gone == ["gone"]

    run(work())


def test_a_peer_that_goes_with_much_unread_is_lost_once(pair):
    async def work() -> None:
        ours, peer = pair
        gone: list[str] = []
        stream = LoopStream(ours, lambda frames: None)
        stream.when_disconnected(lambda: gone.append("gone"))
        assert stream.send([LARGE])
        assert stream.send([LARGE])
        peer.close()
        await wait_until(lambda: gone, what="the peer's end noticed")
        assert not stream.send([b"after"])
        stream.close(linger=1000)
        assert gone == ["gone"]

    run(work())


@pytest.mark.parametrize("how", ["sends", "closes"])
def test_a_peer_that_has_gone_raises_no_signal(pair, how):
    """A cell may have given SIGPIPE its default back, which ends the process."""
    signals: list[int] = []
    before = signal.signal(signal.SIGPIPE, lambda number, _: signals.append(number))

    async def work() -> None:
        ours, peer = pair
        stream = LoopStream(ours, lambda frames: None)
        if how == "closes":
            stream.send([LARGE])
        peer.close()
        if how == "sends":
            assert not stream.send([b"anybody?"])
        stream.close(linger=1000)

    try:
        run(work())
    finally:
        signal.signal(signal.SIGPIPE, before)
    assert signals == []


def test_a_peer_that_does_not_read_is_waited_for_no_longer_than_the_linger(path, make_peer):
    senders: list[Callable[[Frames], Any]] = []
    listener = StreamListener(path)
    peer = make_peer()

    async def work() -> None:
        listener.listen(lambda _, send: senders.append(send))
        peer.send(b"hello")
        await wait_until(lambda: senders, what="the hello")
        assert senders[0]([b"small"])
        assert senders[0]([LARGE])

    run(work())
    started = time.monotonic()
    listener.close(linger=50)
    assert 0.05 <= time.monotonic() - started < 5
    assert peer.receive() == [b"small"]
    with pytest.raises(EOFError):
        peer.receive()


# Who connects, and where


@pytest.mark.parametrize("where", ["no file", "a predecessor's file", "too long a path"])
def test_who_connects_to_nobody_is_told_so(path, where):
    if where == "a predecessor's file":
        with socket.socket(socket.AF_UNIX) as predecessor:
            predecessor.bind(path)

    async def work() -> None:
        with pytest.raises(OSError, match="long" if where == "too long a path" else "refused|No such file"):
            LoopStream.connect(path * (20 if where == "too long a path" else 1), lambda frames: None)

    run(work())


def test_who_connected_before_anybody_listened_is_heard(path, make_peer):
    async def work() -> None:
        listener = StreamListener(path)
        peers = [make_peer() for _ in range(3)]
        for n, peer in enumerate(peers):
            peer.send(b"early", b"%d" % n)
        peers[2].close()
        taken: list[Frames] = []
        listener.listen(lambda frames, send: (taken.append(frames), send(frames)))
        for n in range(2):
            assert await asyncio.to_thread(peers[n].receive) == [b"early", b"%d" % n]
        await wait_until(lambda: len(taken) == 3, what="the last words of who left")
        assert sorted(taken) == [[b"early", b"%d" % n] for n in range(3)]
        listener.close(linger=0)

    run(work())


@pytest.mark.parametrize("left", ["nothing", "a socket", "a file"])
def test_a_listener_takes_the_place_of_a_predecessor_and_leaves_nothing(path, make_peer, left):
    if left == "a socket":
        with socket.socket(socket.AF_UNIX) as predecessor:
            predecessor.bind(path)
    elif left == "a file":
        Path(path).write_text("left")

    async def work() -> None:
        listener = StreamListener(path)
        assert Path(path).is_socket()
        listener.listen(lambda frames, send: send(frames))
        peer = make_peer()
        peer.send(b"hello")
        assert await asyncio.to_thread(peer.receive) == [b"hello"]
        listener.close(linger=0)
        with pytest.raises(EOFError):
            await asyncio.to_thread(peer.receive)

    run(work())
    assert list(Path(path).parent.iterdir()) == []


def test_a_listener_whose_file_is_gone_already_closes_all_the_same(path):
    listener = StreamListener(path)
    Path(path).unlink()
    listener.close(linger=0)
    with pytest.raises(FileNotFoundError):
        UnixPeer.connect(path)


def test_a_listener_that_cannot_be_made_says_so_and_holds_nothing(path):
    with pytest.raises(FileNotFoundError):
        StreamListener(f"{path}/no/directory")
    with pytest.raises(OSError, match="long"):
        StreamListener(path * 20)


def test_a_listener_forgets_those_who_have_gone(path, make_peer):
    async def work() -> None:
        listener = StreamListener(path)
        listener.listen(lambda frames, send: send(frames))
        stays = make_peer()
        for n in range(20):
            peer = make_peer()
            peer.send(b"%d" % n)
            assert await asyncio.to_thread(peer.receive) == [b"%d" % n]
            peer.close()
        stays.send(b"still here")
        assert await asyncio.to_thread(stays.receive) == [b"still here"]
        await wait_until(lambda: len(listener._streams) == 1, what="the others to be forgotten")
        listener.close(linger=0)

    run(work())


class NoDescriptorAtFirst(socket.socket):
    """A socket of a process that has every descriptor in use when somebody comes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._tried = False

    def accept(self) -> tuple[socket.socket, Any]:
        if not self._tried:
            self._tried = True
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


@pytest.mark.parametrize("then", ["is heard", "is closed"])
def test_a_peer_for_whom_there_is_no_descriptor_waits_until_there_is_one(
    path, make_peer, monkeypatch, caplog, then
):
    monkeypatch.setattr(streams, "ACCEPT_AGAIN_AFTER", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr("dspex_kernels.streams.socket.socket", NoDescriptorAtFirst)
        listener = StreamListener(path)
    failures: list[dict[str, Any]] = []
    tried_again, listen = asyncio.Event(), listener.listen
    monkeypatch.setattr(listener, "listen", lambda take: (tried_again.set(), listen(take)))

    async def work() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        peer = make_peer()
        peer.send(b"hello")
        listen(lambda frames, send: send(frames))
        await wait_until(lambda: f"a peer on {path} waits" in caplog.text, what="the first try")
        if then == "is heard":
            assert await asyncio.to_thread(peer.receive) == [b"hello"]
            assert caplog.text.count("waits") == 1
            listener.close(linger=0)
            return
        listener.close(linger=0)
        await tried_again.wait()

    run(work())
    assert failures == []
