"""A pipeline and a tool as a site installs them: found by their entry points."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import dspy


def look_up(subject: str) -> str:
    """Looks a subject up."""
    return f"nothing about {subject}"


class Blocks(dspy.Module):
    """Blocks its thread until somebody opens the FIFO for writing; no async path."""

    def __init__(self, fifo: str) -> None:
        super().__init__()
        self.fifo = fifo

    def forward(self, question: str) -> dspy.Prediction:
        Path(self.fifo).read_text()
        return dspy.Prediction(answer="let go")


class Hangs(Blocks):
    """As Blocks, and blocks the command loop: its async path does not await."""

    async def aforward(self, question: str) -> dspy.Prediction:
        return self.forward(question)


class Grips(Blocks):
    """Holds the interpreter: nothing else runs in its process, on whatever thread."""

    def forward(self, question: str) -> dspy.Prediction:
        re.fullmatch("(a|aa)+", 100 * "a" + "b")  # tries for longer than anybody lives, and never lets go
        return dspy.Prediction(answer="let go")


_CHILD = """
import os, signal
here, there = os.pipe()
if not os.fork():
    os.setsid()
    if os.fork():
        os._exit(0)
    os.write(there, str(os.getpid()).encode())
    signal.pause()
os.wait()  # the one between
print(os.getpid(), os.read(here, 32).decode(), flush=True)
signal.pause()
"""


class Forks(dspy.Module):
    """Leaves a child, and a grandchild that called setsid and was forked twice; answers with their process ids."""

    async def aforward(self, question: str) -> dspy.Prediction:
        child = subprocess.Popen([sys.executable, "-I", "-S", "-c", _CHILD], stdout=subprocess.PIPE, text=True)
        with child.stdout as told:
            return dspy.Prediction(answer=told.readline().strip())


class Where(dspy.Module):
    """Answers with the process that it runs in."""

    async def aforward(self, question: str) -> dspy.Prediction:
        return dspy.Prediction(answer=str(os.getpid()))


class _Recorder(dspy.utils.BaseCallback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_lm_end(self, call_id: str, outputs: object, exception: Exception | None = None) -> None:
        self.seen.append(str(outputs))


class Snoop(dspy.Module):
    """Answers with all that DSPy's settings let it see besides its own call."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.Predict("question -> answer")

    async def aforward(self, question: str) -> dspy.Prediction:
        recorder = _Recorder()
        dspy.settings.callbacks.append(recorder)
        prediction = await self.predict.acall(question=question)
        shown = io.StringIO()
        dspy.inspect_history(n=50, file=shown)
        return dspy.Prediction(
            answer=prediction.answer,
            trace=str([(inputs, dict(outputs)) for _, inputs, outputs in dspy.settings.trace or []]),
            callbacks=str(recorder.seen),
            history=shown.getvalue(),
            lm_history=str(dspy.settings.lm.history),
        )
