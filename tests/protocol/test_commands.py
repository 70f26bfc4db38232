"""The command table: every row is whole, its schemas are valid, and its models keep secrets to themselves."""

from __future__ import annotations

import json
import traceback
from typing import Any

import jsonschema
import orjson
import pytest
from pydantic import ValidationError

from dspex_kernels import errors
from dspex_kernels.protocol import PROTOCOL_VERSION, commands, records
from dspex_kernels.protocol.commands import COMMANDS, Args, Command, Result
from dspex_kernels.protocol.schemas import json_schemas

CANARY = "sk-canary-2718281828"
ROWS = list(COMMANDS.values())
row_id = lambda row: row.name  # noqa: E731  # an id for parametrize, no more


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_a_row_is_whole(row: Command) -> None:
    assert COMMANDS[row.name] is row is commands.get_command(row.name)
    assert issubclass(row.args, Args)
    assert issubclass(row.result, Result)
    assert row.timeout_s is None or 0 < row.timeout_s <= 86_400


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_only_what_changes_nothing_and_reaches_no_lm_may_be_repeated(row: Command) -> None:
    assert row.repeatable is (not row.mutates and not row.reaches_lm)
    if row.control:
        assert row.repeatable, "control commands are answered beside everything: they must change no state"


def test_the_table_holds_the_commands_of_the_design() -> None:
    assert {row.name for row in ROWS if row.control and not row.internal} == {"get_stats", "cancel", "ping"}
    assert {row.name for row in ROWS if row.mutates} == {
        *("create_program", "delete_program", "import_program", "configure", "reset", "follow_program")
    }
    assert {row.name for row in ROWS if row.reaches_lm} == {"execute_program"}
    assert {"list_programs", "get_program", "export_program", "inspect_history"} <= set(COMMANDS)


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_an_unknown_argument_is_refused_by_name(row: Command) -> None:
    with pytest.raises(errors.InvalidArguments, match=rf"^{row.name}: .*") as caught:
        row.parse({"surplus": 1})

    assert caught.value.details == {"command": row.name}


def test_an_unknown_command_is_refused_with_those_there_are() -> None:
    with pytest.raises(errors.UnknownCommand, match="no command 'evaluate': there are cancel, configure"):
        commands.get_command("evaluate")


def test_a_program_may_be_named_by_id_as_the_seed_did() -> None:
    for name in ("create_program", "execute_program", "get_program", "delete_program"):
        assert COMMANDS[name].parse({"id": "qa_bot"}).program_id == "qa_bot"
        assert COMMANDS[name].parse({"program_id": "qa_bot"}).program_id == "qa_bot"


@pytest.mark.parametrize("program_id", ["", "../x", "a b", "a/b", ".hidden", "x" * 129, "é", "a\n", 7])
def test_a_program_id_that_is_none_is_refused(program_id: object) -> None:
    with pytest.raises(errors.InvalidArguments, match="create_program: program_id: "):
        COMMANDS["create_program"].parse({"program_id": program_id, "signature": "q -> a"})


@pytest.mark.parametrize(
    ("args", "field"),
    [
        ({"signature": {"inputs": [], "outputs": [{"name": "a"}]}}, r"signature\.inputs"),
        (
            {"signature": {"inputs": [{"nam": "q"}], "outputs": [{"name": "a"}]}},
            r"signature\.inputs\.0\.name",
        ),
        ({"signature": "q -> a", "tools": ["t"] * 201}, "tools"),
        ({"signature": "q -> a", "adapter": "yaml"}, "adapter"),
        ({"signature": "q -> a", "if_version": -1}, "if_version"),
    ],
)
def test_a_finding_names_the_field_within_the_object(args: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.InvalidArguments, match=rf"^create_program: {field}: "):
        COMMANDS["create_program"].parse({"program_id": "p", **args})


# Schemas


def _schemas() -> list[tuple[str, dict[str, Any]]]:
    told = json_schemas()
    named = [(f"messages.{name}", schema) for name, schema in told["messages"].items()]
    for name, row in told["commands"].items():
        named += [(f"{name}.args", row["args"]), (f"{name}.result", row["result"])]
    return [*named, ("program_record", told["program_record"])]


@pytest.mark.parametrize(("name", "schema"), _schemas(), ids=[name for name, _ in _schemas()])
def test_every_schema_is_valid_draft_2020_12(name: str, schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)

    for reference in _references(schema):  # one that leads nowhere is found only when it is followed
        assert reference.removeprefix("#/$defs/") in schema["$defs"], f"{name}: {reference}"


def _references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*(_references(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(_references(item) for item in value))
    return set()


def test_the_schemas_are_json_and_name_every_command() -> None:
    told = json.loads(orjson.dumps(json_schemas()))

    assert told["protocol_version"] == PROTOCOL_VERSION
    assert set(told["commands"]) == set(COMMANDS)
    assert set(told["messages"]) == {"dspex_request", "dspex_reply", "dspex_event"}


@pytest.mark.parametrize(
    ("args", "fits"),
    [
        ({"program_id": "p", "signature": "q -> a"}, True),
        ({"program_id": "p", "signature": {"inputs": [{"name": "q"}], "outputs": [{"name": "a"}]}}, True),
        ({"program_id": "p", "signature": 7}, False),
        ({"program_id": "p", "surplus": 1}, False),
        ({"program_id": "../p"}, False),
    ],
)
def test_the_schema_and_the_model_agree(args: dict[str, Any], fits: bool) -> None:
    row = COMMANDS["create_program"]
    validator = jsonschema.Draft202012Validator(json_schemas()["commands"]["create_program"]["args"])

    assert validator.is_valid(args) is fits
    if fits:
        row.parse(args)
    else:
        with pytest.raises(errors.InvalidArguments):
            row.parse(args)


@pytest.mark.parametrize(
    ("session_id", "fits"), [("session_5f0c9a3be21d7746", True), (None, True), ("../etc", False)]
)
def test_the_request_schema_and_the_model_agree(session_id: str | None, fits: bool) -> None:
    validator = jsonschema.Draft202012Validator(json_schemas()["messages"]["dspex_request"])

    assert validator.is_valid({"command": "ping", "session_id": session_id}) is fits


@pytest.mark.parametrize(
    ("more", "fits"),
    [
        ({"status": "ok", "result": {}}, True),
        ({"status": "aborted", "ename": "E", "evalue": "v", "error": {"code": "c", "message": "m"}}, True),
        ({"status": "error", "ename": "E", "evalue": "v", "error": {"code": "c"}}, False),
        ({"status": "ok"}, False),
        ({"status": "perhaps", "result": {}}, False),
    ],
)
def test_the_reply_schema_tells_the_two_forms_apart(more: dict[str, Any], fits: bool) -> None:
    validator = jsonschema.Draft202012Validator(json_schemas()["messages"]["dspex_reply"])

    about = {"session_id": "s", "request_id": "r", "kernel_id": "k", "generation": 1}
    assert validator.is_valid({**about, **more}) is fits


# Secrets


@pytest.mark.parametrize(
    "lm",
    [
        {"model": "openai/x", "api_key": CANARY, "temperature": "hot"},
        {"model": "openai/x", "api_key": [CANARY]},
        {"model": "openai/x", "api_key": {"value": CANARY}},
        {"model": "openai/x", "apikey": CANARY},
        {"model": "openai/x", "api_key_env": CANARY},
        {"api_key": CANARY},
        {"model": "openai/x", "api_key": CANARY * 1000},
        [CANARY],
    ],
    ids=["beside", "list", "object", "misspelt", "as-variable", "no-model", "too-long", "no-profile"],
)
def test_a_key_is_not_in_the_refusal_of_its_profile(lm: Any) -> None:
    with pytest.raises(errors.InvalidArguments) as caught:
        COMMANDS["configure"].parse({"lm": lm})

    assert CANARY not in "".join(traceback.format_exception(caught.value))
    assert CANARY not in str(caught.value.to_dict())


def test_a_key_is_in_no_dump_and_no_text_of_a_profile() -> None:
    args = COMMANDS["configure"].parse({"lm": {"model": "openai/x", "api_key": CANARY}})
    profile = args.lm.profile()
    settings = records.SessionSettings(lm=profile)
    result = commands.ConfigureResult(settings=settings)

    for value in (args, args.lm, profile, settings, result):
        for text in (repr(value), str(value), value.model_dump_json(), repr(value.model_dump())):
            assert CANARY not in text
    assert profile.key_given is True
    assert profile.api_key.get_secret_value() == CANARY
    assert "api_key" not in profile.model_dump()


def test_a_validation_error_of_a_profile_hides_its_key() -> None:
    with pytest.raises(ValidationError) as caught:
        records.LMProfile.model_validate({"model": "openai/x", "api_key": CANARY, "temperature": "hot"})

    assert CANARY not in str(caught.value)


def test_a_profile_arrives_whole() -> None:
    lm = {
        "model": "openai/x",
        "api_base": "http://127.0.0.1:1/v1",
        "api_key_env": "KEY",
        "temperature": 0.5,
        "max_tokens": 9,
        "params": {"top_p": 0.1},
        "offline": {"latency_s": 0.5},
    }
    profile = COMMANDS["configure"].parse({"lm": lm}).lm.profile()

    assert profile.key_given is False
    assert {name: profile.model_dump()[name] for name in lm if name != "offline"} == {
        name: value for name, value in lm.items() if name != "offline"
    }
    assert profile.offline.latency_s == 0.5


def test_configure_tells_what_was_left_out_from_what_was_dropped() -> None:
    assert COMMANDS["configure"].parse({}).model_fields_set == set()
    assert COMMANDS["configure"].parse({"lm": None}).model_fields_set == {"lm"}
    assert COMMANDS["configure"].parse({"lm": "openai/gpt-5-mini"}).lm == "openai/gpt-5-mini"
