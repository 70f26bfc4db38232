"""Every error that a user can cause has a code of its own, and a message that names the thing and the remedy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from dspex_kernels.config import LMPolicy
from dspex_kernels.errors import by_code
from dspex_kernels.protocol.limits import MAX_REQUEST_BYTES, MAX_RESULT_BYTES
from tests.live.kernels import LiveKernel
from tests.lm_server import Answer, Disconnect, EchoKeyInError, Hang, Junk, LMServer, NotJSON, Status

KEY = "sk-test-0123456789abcdef"
QA = {"id": "qa", "signature": "question -> answer"}
ASK = {"id": "qa", "inputs": {"question": "?"}}
DSPY_CODES = {
    "adapter_parse_error", "auth", "billing", "context_window_exceeded", "invalid_request", "not_configured",
    "provider", "rate_limit", "server", "timeout", "transport", "unsupported_model",
}  # fmt: skip


@dataclass
class Case:
    """One way to go wrong.

    Attributes:
        code: What it is answered with.
        names: What the message must name.
        remedy: A word of the remedy.
        command, args, content: What is sent.
        lm: The profile of the session; None is none.
        behaviour: Of the LM server, where the profile is "server".
        control: On the control channel.
        first: Commands that are sent before.
    """

    code: str
    names: str
    remedy: str
    command: str = "execute_program"
    args: dict[str, Any] = field(default_factory=lambda: dict(ASK))
    content: dict[str, Any] = field(default_factory=dict)
    lm: Any = "offline/echo"
    behaviour: Any = None
    first: list[tuple[str, dict[str, Any]]] = field(default_factory=lambda: [("create_program", QA)])
    status: str = "error"


def _create(**args: Any) -> dict[str, Any]:
    return {"id": "new", **args}


SERVER = "server"
CASES: dict[str, Case] = {
    "bad signature": Case("invalid_signature", "question", "->", "create_program", _create(signature="question")),
    "reserved name": Case(
        "invalid_signature", "demos", "rename it", "create_program", _create(signature="demos -> answer")
    ),
    "bad type": Case("invalid_type", "this", "list[", "create_program", _create(signature="q: this -> a")),
    "unknown module": Case(
        "unknown_module", "Guess", "Predict", "create_program", _create(signature="q -> a", module="Guess")
    ),
    "module of later": Case(
        "module_not_available", "ProgramOfThought", "later", "create_program",
        _create(signature="q -> a", module="ProgramOfThought"),
    ),
    "bad module arguments": Case(
        "invalid_module", "max_iters", "200", "create_program",
        _create(signature="q -> a", module="ReAct", tools=[], module_args={"max_iters": 1000}),
    ),
    "unknown tool": Case(
        "tool_not_found", "hammer", "tools", "create_program",
        _create(signature="q -> a", module="ReAct", tools=["hammer"]),
    ),
    "unknown reward": Case(
        "reward_not_found", "applause", "field_equals", "create_program",
        _create(
            module="BestOfN",
            module_args={
                "module": {"module": "Predict", "signature": "q -> a"}, "N": 2, "threshold": 1.0,
                "reward": {"name": "applause", "args": {}},
            },
        ),
    ),
    "bad sampling parameter": Case(
        "invalid_arguments", "api_base", "temperature", "create_program",
        _create(signature="q -> a", config={"api_base": "http://example.org"}),
    ),
    "unknown program": Case("program_not_found", "nobody", "there are qa", args={**ASK, "id": "nobody"}),
    "unknown version": Case("program_not_found", "version 9", "there are [1]", args={**ASK, "version": 9}),
    "duplicate program": Case("program_exists", "qa", "replace", "create_program", QA),
    "outdated version": Case(
        "version_conflict", "qa", "read it again", "create_program", {**QA, "replace": True, "if_version": 7}
    ),
    "missing input": Case("missing_input", "question", "needs the input", args={"id": "qa", "inputs": {}}),
    "unknown input": Case(
        "invalid_input", "colour", "question", args={"id": "qa", "inputs": {"question": "?", "colour": 1}}
    ),
    "wrong type of input": Case("invalid_input", "question", "str", args={"id": "qa", "inputs": {"question": [1]}}),
    "no LM": Case("lm_not_configured", "no language model", "configure", lm=None),
    "no such variable": Case(
        "lm_credentials_required", "NO_SUCH_KEY", "set it", "configure",
        {"lm": {"model": "openai/gpt-5-mini", "api_key_env": "NO_SUCH_KEY"}},
    ),
    "bad profile": Case(
        "invalid_lm_profile", "rollout_id", "own fields", "configure",
        {"lm": {"model": "openai/gpt-5-mini", "params": {"rollout_id": 3}}},
    ),
    "wrong key": Case("auth", "canary-model", "api_key", lm=SERVER, behaviour=EchoKeyInError()),
    "rate limit": Case("rate_limit", "canary-model", "later", lm=SERVER, behaviour=Status(429)),
    "provider failed": Case("server", "canary-model", "later", lm=SERVER, behaviour=Status(500)),
    "unknown model": Case("unsupported_model", "canary-model", "name", lm=SERVER, behaviour=Status(404)),
    "connection lost": Case("transport", "canary-model", "api_base", lm=SERVER, behaviour=Disconnect()),
    "not the provider's words": Case("provider", "canary-model", "api_base", lm=SERVER, behaviour=NotJSON()),
    "unreadable answer": Case("adapter_parse_error", "canary-model", "json", lm=SERVER, behaviour=Junk("junk")),
    "deadline": Case(
        "timeout", "execute_program", "timeout", lm=SERVER, behaviour=Hang(), content={"timeout_s": 0.3}
    ),
    "budget": Case(
        "budget_exceeded", "lm_calls", "raise the budget", first=[
            ("create_program", QA), ("configure", {"budget": {"lm_calls": 0}}),
        ],
    ),
    "budget without a price": Case(
        "budget_unpriced", "US dollars", "tokens", lm=SERVER, first=[
            ("create_program", QA), ("configure", {"budget": {"usd": 1}}),
        ],
    ),
    "oversized input": Case(
        "too_large", "request", "send less",
        args={"id": "qa", "inputs": {"question": "x" * (MAX_REQUEST_BYTES + 1)}},
    ),
    "oversized result": Case(
        "too_large", "8,388,608", "return less", lm=SERVER,
        behaviour=Answer({"answer": "y" * (MAX_RESULT_BYTES + 1)}),
    ),
    "deep input": Case("too_large", "64", "flatten", args={"id": "qa", "inputs": {"question": [[]]}}),
    "unknown command": Case("unknown_command", "dance", "execute_program", "dance"),
    "bad arguments": Case("invalid_arguments", "inputs", "valid dict", args={"id": "qa", "inputs": "text"}),
    "wrong protocol version": Case(
        "protocol_mismatch", "'2.0'", "same major version", content={"protocol_version": "2.0"}
    ),
    "foreign session": Case(
        "session_mismatch", "somebody-else", "kernel of that session", content={"session_id": "somebody-else"}
    ),
    "malformed message": Case("invalid_message", "surprise", "not permitted", content={"surprise": 1}),
    "bad record": Case(
        "invalid_record", "state", "predict", "import_program",
        {"record": {"program_id": "x", "version": 1, "spec": {"signature": {
            "inputs": [{"name": "q"}], "outputs": [{"name": "a"}]}}, "state": {"nothing": {
                "traces": [], "train": [], "demos": [], "lm": None,
                "signature": {"instructions": "", "fields": []},
            }}}},
    ),
}  # fmt: skip


def _deep(levels: int) -> Any:
    value: Any = "deep"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("name", CASES)
def test_an_error_names_the_thing_and_the_remedy(kernel: LiveKernel, lm_server: LMServer, name: str) -> None:
    case = CASES[name]
    kernel.result("reset")
    if case.lm == SERVER:
        lm = {
            "model": "openai/canary-model", "api_base": lm_server.api_base, "api_key": KEY,
            "max_retries": 0, "cache": False,
        }  # fmt: skip
        kernel.result("configure", {"lm": lm})
    elif case.lm is not None:
        kernel.result("configure", {"lm": case.lm})
    if case.behaviour is not None:
        lm_server.behaviour = case.behaviour
    for command, args in case.first:
        kernel.result(command, args)
    args = case.args if name != "deep input" else {"id": "qa", "inputs": {"question": _deep(70)}}
    answer = kernel.ask(case.command, args, **case.content)
    assert answer["status"] == case.status, answer
    error = answer["error"]
    assert error["code"] == case.code, error
    assert case.names in error["message"], error["message"]
    assert case.remedy in error["message"], error["message"]
    assert "\n" not in error["message"]
    assert KEY not in str(answer)


def test_a_policy_refuses_models_hosts_and_variables(lm_server: LMServer) -> None:
    policy = LMPolicy(
        unrestricted=False,
        allowed_models=["openai/*"],
        allowed_hosts=[f"127.0.0.1:{lm_server.port}"],
        allowed_keys=[("ALLOWED_KEY", "")],
    )
    env = {"DSPEX_LM_POLICY": policy.to_json(), "ALLOWED_KEY": KEY, "SECRET_OF_THE_SERVICE": "s3cret-s3cret"}
    refused = {
        "model": {"model": "anthropic/claude-sonnet-4-6", "api_key": KEY},
        "host": {"model": "openai/x", "api_base": "http://127.0.0.1:1/v1", "api_key": KEY},
        "userinfo": {
            "model": "openai/x",
            "api_base": f"http://127.0.0.1:{lm_server.port}@127.0.0.2/v1",
            "api_key": KEY,
        },
        "variable": {"model": "openai/x", "api_key_env": "SECRET_OF_THE_SERVICE"},
        "pair": {"model": "openai/x", "api_key_env": "ALLOWED_KEY", "api_base": lm_server.api_base},
        "implicit key": {"model": "openai/x", "api_base": lm_server.api_base},
    }
    with LiveKernel(env=env) as kernel:
        for what, profile in refused.items():
            error = kernel.error("configure", {"lm": profile})
            assert error["code"] == "policy_denied", (what, error)
            assert "LMPolicy" in error["message"], (what, error)
        kernel.result("configure", {"lm": {"model": "openai/x", "api_key_env": "ALLOWED_KEY"}})
        kernel.result("configure", {"lm": {"model": "openai/x", "api_base": lm_server.api_base, "api_key": KEY}})
        kernel.result("configure", {"lm": "offline/echo"})
    assert lm_server.requests == []


def test_the_table_covers_every_code_that_a_kernel_answers_with() -> None:
    elsewhere = {
        "interrupted", "cancelled", "kernel_died", "kernel_out_of_memory",  # test_kernel_interrupts, test_lives
        "policy_denied",  # above
        "duplicate_request", "program_limit", "tool_changed", "not_portable", "program_failed",  # test_programs
        "dependency_missing", "internal_error", "kernel_start_failed", "not_a_dspex_kernel", "session_exists",
        "session_not_found", "session_status", "session_limit", "invalid_session", "service_closed", "store_error",
        "pool_saturated", "result_not_found", "provider_unavailable",  # test_queue, test_outcomes, test_breaker
    }  # fmt: skip
    covered = {case.code for case in CASES.values()} | elsewhere
    assert set(by_code()) - covered == set()
    assert {case.code for case in CASES.values()} - set(by_code()) <= DSPY_CODES
