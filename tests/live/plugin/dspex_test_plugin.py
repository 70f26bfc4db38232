"""A pipeline and a tool as a site installs them: found by their entry points."""

from __future__ import annotations

import io
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
