"""Callbacks that a notebook gives DSPy, as ``mlflow.dspy.autolog()`` does, see what commands and cells run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.live.kernels import LiveKernel

AUTOLOG = """
import dspy

class Recorder(dspy.utils.BaseCallback):
    def __init__(self):
        self.began, self.ended = [], []

    def on_module_start(self, call_id, instance, inputs):
        self.began.append(("module", type(instance).__name__, inputs["kwargs"]["question"]))

    def on_module_end(self, call_id, outputs, exception=None):
        self.ended.append(("module", exception))

    def on_lm_start(self, call_id, instance, inputs):
        self.began.append(("lm", instance.model))

    def on_lm_end(self, call_id, outputs, exception=None):
        self.ended.append(("lm", exception))

recorder = Recorder()
before = dspy.settings.callbacks
dspy.configure(callbacks=[*before, recorder])
"""


@pytest.fixture
def traced(offline: LiveKernel) -> Iterator[LiveKernel]:
    """The module's kernel with a program and a callback, and without the callback afterwards."""
    offline.result("create_program", {"id": "qa", "signature": "question -> answer"})
    offline.run(AUTOLOG)
    yield offline
    offline.run("dspy.configure(callbacks=before)")


def seen(kernel: LiveKernel) -> str:
    """What the callback was told, as the notebook shows it."""
    message_id = kernel.execute("print(recorder.began, recorder.ended)")
    kernel.reply(message_id)
    kernel.wait_for_state(message_id, "idle")
    return kernel.output(message_id).strip()


def of(question: str) -> str:
    began = [("module", "Predict", question), ("lm", "offline/echo")]
    return f"{began} {[('lm', None), ('module', None)]}"


def test_they_see_the_modules_and_lm_calls_of_a_command(traced):
    traced.result("execute_program", {"id": "qa", "inputs": {"question": "by command"}})
    assert seen(traced) == of("by command")


def test_they_see_what_a_magic_runs(traced):
    traced.run('%dspex run qa question="by magic"')
    assert seen(traced) == of("by magic")


def test_they_see_what_a_cell_runs(traced):
    traced.run('dspy.Predict("question -> answer")(question="by cell")')
    assert seen(traced) == of("by cell")


def test_they_are_told_of_a_failure(traced):
    traced.result(
        "configure",
        {"lm": {"model": "offline/echo", "cache": False, "max_retries": 0, "offline": {"failures": ["auth"]}}},
    )
    traced.error("execute_program", {"id": "qa", "inputs": {"question": "?"}})
    assert "LMAuthError" in seen(traced)
