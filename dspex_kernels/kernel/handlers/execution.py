"""A program runs: its inputs are checked, it runs in its session's own DSPy context, its cost is told."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

import dspy

from dspex_kernels import errors
from dspex_kernels.kernel.calls import Call
from dspex_kernels.kernel.failures import explain
from dspex_kernels.kernel.programs.live import LiveProgram
from dspex_kernels.kernel.programs.modules import check_config, named_predictors
from dspex_kernels.kernel.programs.streaming import run_streaming
from dspex_kernels.kernel.programs.values import to_json
from dspex_kernels.protocol.commands import ExecuteProgramArgs, ExecuteProgramResult

if TYPE_CHECKING:
    from dspex_kernels.kernel.dispatch import Dispatcher


async def execute_program(dispatcher: Dispatcher, call: Call, args: ExecuteProgramArgs) -> ExecuteProgramResult:
    """Run a program once."""
    began = time.perf_counter()
    namespace = call.namespace
    record = namespace.record(args.program_id, args.version)
    program = namespace.live(record)
    inputs = program.check_inputs(args.inputs)
    module = _for_this_call(program, check_config(args.config))
    try:
        with namespace.context(call, adapter_name=record.spec.adapter):
            prediction = await _run(dispatcher, call, program, module, inputs)
    finally:
        namespace.executions += 1
        await namespace.write_spent()
    if prediction is None:
        # BestOfN and Refine swallow the failures of their attempts and answer nothing.
        reason = call.last_provider_error or errors.ProgramFailed("every attempt failed")
        raise explain(_as_dspy_error(reason), call)
    usage = prediction.get_lm_usage() if hasattr(prediction, "get_lm_usage") else {}
    return ExecuteProgramResult(
        program_id=record.program_id,
        version=record.version,
        outputs=program.outputs(prediction),
        usage=to_json(usage or {}),
        cost=call.ledger.cost(),
        lm_calls=call.ledger.lm_calls(),
        duration_s=time.perf_counter() - began,
    )


async def _run(
    dispatcher: Dispatcher, call: Call, program: LiveProgram, module: dspy.Module, inputs: dict[str, Any]
) -> Any:
    if program.has_acall and call.stream:
        return await run_streaming(call, module, inputs)
    if program.has_acall:
        return await module.acall(**inputs)
    return await dispatcher.in_thread(call, lambda: module(**inputs))


def _for_this_call(program: LiveProgram, config: dict[str, Any]) -> dspy.Module:
    """The module, with what one call may change made its own.

    BestOfN and Refine count their failures down on the module itself, for ever.
    """
    if not config:
        return copy.copy(program.module)
    module = program.module.deepcopy()
    for _, predictor in named_predictors(module):
        predictor.config = {**predictor.config, **config}
    return module


def _as_dspy_error(failure: Exception) -> Exception:
    from dspy.clients.errors import wrap_error

    return wrap_error(failure, model="") if not isinstance(failure, errors.DSPexError) else failure
