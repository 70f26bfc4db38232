"""A program's answer while it is written: tokens of its output fields, and what it is doing."""

from __future__ import annotations

from typing import Any

import dspy
from dspy.streaming import StatusMessage, StatusMessageProvider, StreamListener, StreamResponse

from dspex_kernels.kernel.calls import Call


class _Doing(StatusMessageProvider):
    """What is told of a running program: which tool it uses. Arguments and results stay inside."""

    def tool_start_status_message(self, instance: Any, inputs: Any) -> str:
        return f"calling tool {instance.name}"

    def tool_end_status_message(self, outputs: Any) -> str:
        return "tool finished"


async def run_streaming(call: Call, module: dspy.Module, inputs: dict[str, Any]) -> Any:
    """Run an async program and report its tokens as events; returns its prediction.

    Listeners keep state: shared by concurrent calls they mix their texts (dspy issue 8173), so each call gets its
    own.
    """
    listeners = [
        StreamListener(field, predict=predictor, predict_name=name)
        for name, predictor in module.named_predictors()
        for field, info in predictor.signature.output_fields.items()
        if info.annotation is str
    ]
    stream = dspy.streamify(
        module, status_message_provider=_Doing(), stream_listeners=listeners, is_async_program=True
    )
    prediction = None
    async for item in stream(**inputs):
        match item:
            case StreamResponse():
                call.emit("token", predictor=item.predict_name, field=item.signature_field_name, text=item.chunk)
            case StatusMessage():
                call.emit("status", message=item.message)
            case dspy.Prediction():
                prediction = item
    return prediction
