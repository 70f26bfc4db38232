"""What `batch` reads and writes: input lines one at a time, results as they come, what an earlier run did."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import orjson

from dspex_kernels import errors
from dspex_kernels.protocol import limits


@dataclass(frozen=True, slots=True)
class InputLine:
    """One line of the input.

    Attributes:
        number: Counts from 1, blank lines included.
        input_hash: 16 hexadecimal digits of the line's bytes, space around them left out.
        item: The object it holds; None where it holds none.
        problem: Why it holds none.
    """

    number: int
    input_hash: str
    item: dict[str, Any] | None
    problem: errors.DSPexError | None = None


def read_lines(stream: IO[bytes]) -> Iterator[InputLine]:
    """The lines of a JSONL file, blank ones left out; never more than one of them in memory.

    Args:
        stream: The file, at its beginning.
    """
    number = 0
    while raw := stream.readline(limits.MAX_REQUEST_BYTES + 1):
        number += 1
        if len(raw) > limits.MAX_REQUEST_BYTES:
            yield _too_long(stream, number, raw)
        elif raw.strip():
            yield _parsed(number, raw.strip())


def _parsed(number: int, text: bytes) -> InputLine:
    input_hash = hashlib.sha256(text).hexdigest()[:16]
    try:
        item = orjson.loads(text)
    except orjson.JSONDecodeError as failure:
        problem = errors.InvalidInput(f"line {number} is not JSON: {failure}")
        return InputLine(number, input_hash, None, problem)
    if not isinstance(item, dict):
        problem = errors.InvalidInput(
            f'line {number} is not an object of inputs but {type(item).__name__}: write {{"question": …}}'
        )
        return InputLine(number, input_hash, None, problem)
    return InputLine(number, input_hash, item)


def _too_long(stream: IO[bytes], number: int, start: bytes) -> InputLine:
    digest = hashlib.sha256(start)
    part = start
    while part and not part.endswith(b"\n"):
        part = stream.readline(1 << 20)
        digest.update(part)
    problem = errors.TooLarge(
        f"line {number} has more than {limits.MAX_REQUEST_BYTES:,} bytes: send less, or a reference to it"
    )
    return InputLine(number, digest.hexdigest()[:16], None, problem)


def count_lines(path: Path) -> int:
    """How many lines of ``path`` are not blank."""
    with path.open("rb") as stream:
        return sum(1 for _ in read_lines(stream))


def repair(path: Path) -> None:
    """Cut off a last line that was not written to its end; one that only lacks its newline gets it."""
    with path.open("rb+") as stream:
        end = whole = 0
        last = b""
        for line in stream:
            whole, last = end, line
            end += len(line)
        if not last or last.endswith(b"\n"):
            return
        if _is_object(last):
            stream.write(b"\n")  # the answer is all there, and paid for
        else:
            stream.truncate(whole)


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False


def finished_lines(path: Path) -> dict[int, str]:
    """What an earlier run has done: the input's line numbers with the hashes of their inputs.

    Raises:
        InvalidArguments: The file holds something else than results of `batch`.
    """
    finished: dict[int, str] = {}
    with path.open("rb") as stream:
        for number, text in enumerate(stream, start=1):
            try:
                result = orjson.loads(text)
                finished[int(result["line"])] = str(result["input_hash"])
            except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
                raise errors.InvalidArguments(
                    f"line {number} of {path} is not a result of batch: name another --output"
                ) from None  # the cause would quote the line
    return finished


def check_unchanged(path: Path, finished: Mapping[int, str], output: Path) -> int:
    """Make sure that the input still holds the lines that were done.

    Args:
        path: The input.
        finished: Line numbers with the hashes of what was run.
        output: The results' file, for the message.

    Returns:
        How many lines of the input are not blank.

    Raises:
        InvalidArguments: A line is not what it was.
    """
    missing = dict(finished)
    count = 0
    with path.open("rb") as stream:
        for line in read_lines(stream):
            count += 1
            if missing.pop(line.number, line.input_hash) != line.input_hash:
                raise _changed(path, line.number, output)
    if missing:
        raise _changed(path, min(missing), output)
    return count


def _changed(path: Path, number: int, output: Path) -> errors.InvalidArguments:
    return errors.InvalidArguments(
        f"line {number} of {path} has changed since {output} was written: restore it, or name another --output"
    )


class LinesOut:
    """A JSONL file that grows line by line, each flushed as it comes; made when its first line does.

    Args:
        path: The file.
        append: Whether what it holds stays.
    """

    def __init__(self, path: Path, *, append: bool) -> None:
        self.path = path
        self.count = 0
        self._append = append
        self._file: IO[bytes] | None = None

    def write(self, value: Mapping[str, Any]) -> None:
        """Add one line.

        Raises:
            StoreError: The file cannot be written.
        """
        # Written from the event loop on purpose: a line to the page cache takes microseconds, and a hop to a
        # thread could be cancelled between an answer that was paid for and its line.
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab" if self._append else "wb")
            self._file.write(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))
            self._file.flush()
        except OSError as failure:
            raise errors.StoreError(
                f"cannot write {self.path}: {failure.strerror or failure}; make room and run again with --resume"
            ) from failure
        self.count += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
