"""A pipeline and a tool as a site installs them: found by their entry points."""

from __future__ import annotations

import io

import dspy


def look_up(subject: str) -> str:
    """Looks a subject up."""
    return f"nothing about {subject}"


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
