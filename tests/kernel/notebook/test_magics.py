"""What a person types after %dspex: words, values, verbs, errors, completion."""

from __future__ import annotations

import re
from typing import Any

import dspy
import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from dspex_kernels import errors
from dspex_kernels.kernel.notebook import magics
from dspex_kernels.kernel.notebook.words import Scope, mapping, split_words
from dspex_kernels.protocol.commands import COMMANDS

SUMMARY = {
    "program_id": "qa",
    "version": 1,
    "versions": [1],
    "module": "Predict",
    "signature": "question -> answer",
    "inputs": {"question": "str", "n": "int"},
    "outputs": {"answer": "str"},
    "instructions": None,
    "tools": [],
    "adapter": None,
    "portable": True,
    "created_at": "2026-11-23T00:00:00Z",
}
STATS = {
    "session_id": "s",
    "programs": 1,
    "executions": 2,
    "commands": {"ok": 2, "error": 0, "aborted": 0, "running": 0},
    "lm": {},
    "lm_calls": 2,
    "cache_hits": 0,
    "total_tokens": 9,
    "cost": None,
    "budget": {},
    "kernel_memory_bytes": 1 << 20,
    "created_at": "",
    "last_activity": "",
}
NO_SETTINGS = {"lm": None, "adapter": None, "budget": {"usd": None, "tokens": None, "lm_calls": None}}


class ScriptedSession:
    """An Asker that checks each command's args against the table and answers from a script."""

    session_id = "session_0123456789abcdef"

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.modules: dict[str, Any] = {}
        self.tools: dict[str, Any] = {}
        self.timeouts: list[float | None] = []
        self.answers: dict[str, Any] = {
            "create_program": {"program_id": "qa", "version": 1, "signature": "question -> answer"},
            "execute_program": {
                "program_id": "qa",
                "version": 1,
                "outputs": {"answer": "42"},
                "usage": {"offline/echo": {"total_tokens": 7}},
                "cost": 0.0,
                "lm_calls": 1,
                "duration_s": 0.1,
            },
            "list_programs": {"programs": [SUMMARY], "count": 1},
            "get_program": SUMMARY,
            "delete_program": {"program_id": "qa"},
            "reset": {"programs": 3},
            "configure": {"settings": NO_SETTINGS},
            "get_stats": STATS,
            "inspect_history": {"entries": [], "count": 0},
        }

    def ask(self, command, args, *, timeout_s=None, on_event=None):
        COMMANDS[command].parse(args)
        self.asked.append((command, args))
        self.timeouts.append(timeout_s)
        answer = self.answers[command]
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def add_module(self, program_id, module):
        self.modules[program_id] = module
        return {"program_id": program_id, "version": 1, "signature": "question -> answer"}

    def add_tool(self, function, name=None):
        name = name or function.__name__
        self.tools[name] = function
        return name

    def program_ids(self):
        return ["qa", "qa.long-name", "summary"]


@pytest.fixture
def session():
    return ScriptedSession()


@pytest.fixture
def shell(session):
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    magics.load(shell, session)
    yield shell
    shell.history_manager.end_session()
    shell._atexit_once()


def typed(shell, text):
    """Run a cell as a front end does; its result, or the error it was marked failed with."""
    return shell.run_cell(text, store_history=False)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("run qa question=hi", ["run", "qa", "question=hi"]),
        ('run qa question="two words"', ["run", "qa", "question=two words"]),
        ("run qa question='it\"s'", ["run", "qa", 'question=it"s']),
        ('run qa tags=["a b", "c"] n=1', ["run", "qa", 'tags=["a b", "c"]', "n=1"]),
        ('run qa o={"a": {"b": "}"}}', ["run", "qa", 'o={"a": {"b": "}"}}']),
        ('run qa q="see x=[1, 2]"', ["run", "qa", "q=see x=[1, 2]"]),
        ("run qa q={a}-{b}", ["run", "qa", "q={a}-{b}"]),
        ("run qa q=", ["run", "qa", "q="]),
        ("", []),
    ],
)
def test_a_line_is_split_by_quotes_and_brackets(line, words):
    assert split_words(line) == words


@pytest.mark.parametrize("line", ['run qa q="open', "run qa q='open", "run qa q=it's"])
def test_an_open_quote_is_named(line):
    with pytest.raises(errors.InvalidArguments, match="quote is not closed"):
        split_words(line)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1", 1),
        ("0.5", 0.5),
        ("true", True),
        ("True", True),
        ("null", None),
        ('["a", 1]', ["a", 1]),
        ("['a', (1, 2)]", ["a", [1, 2]]),
        ('{"a": 1}', {"a": 1}),
        ("plain", "plain"),
        ("007", "007"),
        ("NaN", "NaN"),
        ("1e999", "1e999"),
        ("{1, 2}", "{1, 2}"),
        ("[" * 5000, "[" * 5000),
        ("@text", 'it\'s "so" $n {n} @n'),
        ("$text", 'it\'s "so" $n {n} @n'),
        ("{text}", 'it\'s "so" $n {n} @n'),
        ("$n", 3),
        ("n is $n", "n is 3"),
        ("twice {n * 2}", "twice 6"),
        ("$5 each", "$5 each"),
        ("{nothing}", "{nothing}"),
        ("@@text", "@text"),
        ("mail me @home", "mail me @home"),
        ("it's about $n", "it's about 3"),
        ('{"n":5}', {"n": 5}),
        ('say {"n"} and {{n}}', 'say {"n"} and {3}'),
        ("{n / 0}", "{n / 0}"),
    ],
)
def test_a_word_is_a_literal_a_variable_or_text(word, value):
    scope = Scope({"n": 3, "text": 'it\'s "so" $n {n} @n'})
    assert scope.value(word).value == value


def test_a_variable_that_is_no_data_is_named():
    with pytest.raises(errors.InvalidArguments, match="@thing: a object is not data"):
        Scope({"thing": object()}).value("@thing")


def test_an_unknown_variable_is_named():
    with pytest.raises(errors.InvalidArguments, match="no variable 'nobody'"):
        Scope({}).value("@nobody")


def test_yaml_in_a_cell_keeps_what_yaml_1_1_would_change():
    cell = "a: no\nb: 2026-11-23\nc: 010\nd: 12:30\ne: 7\nf: 0.5\ng: true\nh: [1, x]\ni: |\n  one: two\n"
    values = {name: value.value for name, value in mapping(cell, what="inputs").items()}
    assert values == {
        "a": "no",
        "b": "2026-11-23",
        "c": "010",
        "d": "12:30",
        "e": 7,
        "f": 0.5,
        "g": True,
        "h": [1, "x"],
        "i": "one: two\n",
    }


def test_a_cell_may_be_json_with_tabs():
    assert mapping('{\n\t"question": "why?"\n}', what="inputs")["question"].value == "why?"


@pytest.mark.parametrize("cell", ["just text", "- a\n- b", "question: what: this", "!!python/object:os.system {}"])
def test_a_cell_that_is_no_mapping_is_refused_with_the_remedy(cell):
    with pytest.raises(errors.InvalidArguments, match="name: value"):
        mapping(cell, what="inputs")


def test_create_sends_signature_module_tools_and_options(shell, session):
    result = typed(
        shell,
        '%dspex create qa "question -> answer" --module ReAct --tools a,b --config temperature=0.5 --replace',
    )
    result.raise_error()
    assert session.asked == [
        (
            "create_program",
            {
                "program_id": "qa",
                "replace": True,
                "signature": "question -> answer",
                "module": "ReAct",
                "config": {"temperature": 0.5},
                "tools": ["a", "b"],
            },
        )
    ]
    assert "question -> answer" in repr(result.result)


def test_create_with_a_cell_takes_it_as_instructions(shell, session):
    typed(
        shell, '%%dspex create qa "question, n: list[int] -> answer"\nAnswer in one word.\n\nBe kind.'
    ).raise_error()
    assert session.asked[0][1]["signature"] == {
        "inputs": [{"name": "question", "type": "str"}, {"name": "n", "type": "list[int]"}],
        "outputs": [{"name": "answer", "type": "str"}],
        "instructions": "Answer in one word.\n\nBe kind.",
    }


def test_create_with_signature_and_instructions_in_the_cell(shell, session):
    typed(shell, "%%dspex create qa\nquestion: str\n  -> answer: bool\n\nAnswer truly.").raise_error()
    assert session.asked[0][1]["signature"] == {
        "inputs": [{"name": "question", "type": "str"}],
        "outputs": [{"name": "answer", "type": "bool"}],
        "instructions": "Answer truly.",
    }


def test_create_with_the_signature_alone_in_the_cell(shell, session):
    typed(shell, "%%dspex create qa\nquestion -> answer\n").raise_error()
    assert session.asked[0][1]["signature"] == "question -> answer"


def test_create_with_fields_as_yaml_in_the_cell(shell, session):
    cell = "inputs:\n  - {name: question, description: what}\noutputs:\n  - {name: answer, type: int}\n"
    typed(shell, f"%%dspex create qa\n{cell}").raise_error()
    assert session.asked[0][1]["signature"] == {
        "inputs": [{"name": "question", "description": "what"}],
        "outputs": [{"name": "answer", "type": "int"}],
    }


def test_create_takes_a_missing_tool_from_the_notebooks_functions(shell, session):
    created = session.answers["create_program"]
    session.answers["create_program"] = [errors.ToolNotFound("no tool 'look_up'"), created]
    shell.run_cell("def look_up(word: str) -> str:\n    return word", store_history=False)
    typed(shell, '%dspex create qa "question -> answer" --module ReAct --tools look_up').raise_error()
    assert session.tools == {"look_up": shell.user_ns["look_up"]}


def test_create_gives_up_on_a_tool_that_stays_missing(shell, session):
    session.answers["create_program"] = errors.ToolNotFound("no tool 'len'", details={"tool": "len"})
    shell.user_ns["len"] = len
    result = typed(shell, '%dspex create qa "question -> answer" --tools len')
    assert isinstance(result.error_in_exec, errors.ToolNotFound)
    assert len(session.asked) == 2


def test_run_returns_a_prediction_with_its_usage(shell, session):
    typed(shell, 'answer = %dspex run qa question="What is it?" --timeout 5').raise_error()
    answer = shell.user_ns["answer"]
    assert isinstance(answer, dspy.Prediction)
    assert answer.answer == "42"
    assert answer.get_lm_usage() == {"offline/echo": {"total_tokens": 7}}
    assert session.asked == [("execute_program", {"program_id": "qa", "inputs": {"question": "What is it?"}})]
    assert session.timeouts == [5.0]


def test_a_number_typed_for_a_field_of_text_stays_text(shell, session):
    typed(shell, "%dspex run qa question=42 n=42").raise_error()
    assert session.asked[-1][1]["inputs"] == {"question": "42", "n": 42}


def test_a_variables_own_type_is_kept(shell, session):
    shell.user_ns["question"] = 'says "it\'s 5" = {n}'
    shell.user_ns["n"] = 5
    typed(shell, "%dspex run qa question=$question n=@n").raise_error()
    assert session.asked == [
        ("execute_program", {"program_id": "qa", "inputs": {"question": 'says "it\'s 5" = {n}', "n": 5}})
    ]


def test_a_functions_own_variables_are_seen(shell, session):
    shell.run_cell(
        "def ask(q):\n    return get_ipython().run_line_magic('dspex', 'run qa question=@q')", store_history=False
    )
    shell.user_ns["get_ipython"] = lambda: shell
    typed(shell, "ask('local')").raise_error()
    assert session.asked[0][1]["inputs"] == {"question": "local"}


def test_run_takes_its_inputs_from_the_cell(shell, session):
    typed(shell, "%%dspex run qa n=1\nquestion: 42").raise_error()
    assert session.asked[-1][1]["inputs"] == {"n": 1, "question": "42"}


def test_an_input_on_the_line_and_in_the_cell_is_refused(shell):
    result = typed(shell, "%%dspex run qa question=a\nquestion: b")
    assert isinstance(result.error_in_exec, errors.InvalidArguments)
    assert "'question' is given twice" in str(result.error_in_exec)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("fly", "no verb 'fly'"),
        ("create", "required: program_id"),
        ("create qa question -> answer", "put the signature in quotes"),
        ("create qa a b", "quote what has spaces"),
        ('create qa "a -> b" --modul Predict', "no option --modul"),
        ('create qa "a -> b" --if-version x', "invalid int value"),
        ("run qa what is it", "write inputs as name=value"),
        ("run qa q=1 q=2", "'q' is given twice"),
        ('run qa q="open', "quote is not closed"),
        ("show", "required: program_id"),
        ("history many", "invalid int value"),
        ("configure temprature=1", "no setting 'temprature'"),
        ("help fly", "no verb 'fly'"),
        ("add nobody", "no variable 'nobody'"),
    ],
)
def test_wrong_use_is_one_line_and_fails_the_cell(shell, session, capsys, line, says):
    result = typed(shell, f"%dspex {line}")
    assert isinstance(result.error_in_exec, errors.InvalidArguments)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).strip()
    assert says in shown
    assert shown.startswith("invalid_arguments: ")
    assert len(shown.splitlines()) == 1
    assert session.asked == []


def test_a_failed_command_is_one_red_line_and_fails_the_cell(shell, session, capsys):
    session.answers["execute_program"] = errors.ProgramNotFound("no program 'qa': create it first")
    result = typed(shell, "%dspex run qa question=a")
    assert isinstance(result.error_in_exec, errors.ProgramNotFound)
    assert capsys.readouterr().out.strip() == "\x1b[31mprogram_not_found\x1b[0m: no program 'qa': create it first"


def test_a_failing_program_shows_the_users_own_frames(shell, session, capsys):
    session.answers["execute_program"] = errors.ProgramFailed("KeyError: 'x'", traceback=["in my tool, line 3"])
    typed(shell, "%dspex run qa question=a")
    assert capsys.readouterr().out.splitlines()[0] == "in my tool, line 3"


def test_a_cell_below_a_verb_without_one_is_refused(shell, session):
    result = typed(shell, "%%dspex list\nquestion: a")
    assert "takes no cell" in str(result.error_in_exec)
    assert session.asked == []


def test_configure_builds_profile_adapter_and_budget(shell, session):
    typed(
        shell,
        "%dspex configure lm=openai/gpt-5-mini temperature=0.2 api_key_env=MY_KEY params.top_p=0.9 adapter=json "
        "budget.usd=0.5",
    ).raise_error()
    assert session.asked[-1] == (
        "configure",
        {
            "lm": {
                "model": "openai/gpt-5-mini",
                "temperature": 0.2,
                "api_key_env": "MY_KEY",
                "params": {"top_p": 0.9},
            },
            "adapter": "json",
            "budget": {"usd": 0.5, "tokens": None, "lm_calls": None},
        },
    )


def test_configure_changes_one_thing_of_the_present_profile(shell, session):
    profile = {"model": "offline/echo", "api_base": None, "cache": False, "key_given": False}
    session.answers["configure"] = {"settings": {**NO_SETTINGS, "lm": profile}}
    typed(shell, "%dspex configure temperature=0.1").raise_error()
    assert session.asked[-1][1] == {"lm": {"model": "offline/echo", "cache": False, "temperature": 0.1}}


def test_configure_does_not_lose_a_key_that_was_given_directly(shell, session):
    session.answers["configure"] = {"settings": {**NO_SETTINGS, "lm": {"model": "openai/x", "key_given": True}}}
    result = typed(shell, "%dspex configure temperature=0.1")
    assert isinstance(result.error_in_exec, errors.LMCredentialsRequired)
    assert session.asked == [("configure", {})]


def test_configure_drops_a_setting_with_none(shell, session):
    typed(shell, "%dspex configure lm=none adapter=none").raise_error()
    assert session.asked == [("configure", {"lm": None, "adapter": None})]


def test_a_key_from_a_variable_is_sent_and_never_shown(shell, session, capsys):
    shell.user_ns["my_key"] = "sk-canary"
    typed(shell, "%dspex configure lm=openai/x api_key=@my_key").raise_error()
    assert session.asked[-1][1]["lm"]["api_key"] == "sk-canary"
    assert "sk-canary" not in capsys.readouterr().out


@pytest.mark.parametrize("line", ["api_key=sk-canary", 'lm={"model": "openai/x", "api_key": "sk-canary"}'])
def test_a_key_typed_literally_warns_without_repeating_it(shell, capsys, line):
    typed(shell, f"%dspex configure {'' if line.startswith('lm') else 'lm=openai/x '}{line}").raise_error()
    shown = capsys.readouterr().out
    assert "better api_key=@variable" in shown
    assert "sk-canary" not in shown


@pytest.mark.parametrize(
    "line",
    [
        "configure lm=x api_kee=sk-canary",
        "configure api_key sk-canary",
        "configure --api_key=sk-canary",
        "sho --api_key=sk-canary",
    ],
)
def test_an_error_never_repeats_a_value(shell, line):
    failure = typed(shell, f"%dspex {line}").error_in_exec
    assert isinstance(failure, errors.InvalidArguments)
    assert "canary" not in str(failure)


def test_add_makes_a_program_of_a_module_and_a_tool_of_a_function(shell, session):
    shell.run_cell("import dspy\nbot = dspy.Predict('q -> a')\ndef look_up(w: str): ...", store_history=False)
    typed(shell, "%dspex add bot --as mine").raise_error()
    typed(shell, "%dspex add look_up").raise_error()
    assert session.modules == {"mine": shell.user_ns["bot"]}
    assert session.tools == {"look_up": shell.user_ns["look_up"]}


@pytest.mark.parametrize(("code", "says"), [("thing = 3", "is a int"), ("class thing: ...", "make an instance")])
def test_add_refuses_what_is_neither(shell, code, says):
    shell.run_cell(code, store_history=False)
    assert says in str(typed(shell, "%dspex add thing").error_in_exec)


@pytest.mark.parametrize(
    ("line", "command", "args", "shows"),
    [
        ("list", "list_programs", {}, "question: str"),
        ("show qa --version 1", "get_program", {"program_id": "qa", "version": 1}, "Predict"),
        ("delete qa", "delete_program", {"program_id": "qa"}, "qa is deleted"),
        ("reset", "reset", {}, "3 programs"),
        ("stats", "get_stats", {}, "unknown"),
        ("history", "inspect_history", {"n": 1}, "no LM calls"),
        ("history 5", "inspect_history", {"n": 5}, "no LM calls"),
        ("configure", "configure", {}, "no limit"),
    ],
)
def test_each_verb_asks_its_command(shell, session, line, command, args, shows):
    result = typed(shell, f"%dspex {line}")
    result.raise_error()
    assert session.asked == [(command, args)]
    assert shows in repr(result.result)


@pytest.mark.parametrize("line", ["", "help"])
def test_help_names_every_verb(shell, line):
    shown = repr(typed(shell, f"%dspex {line}").result)
    assert all(f"%dspex {verb}" in shown for verb in magics.VERBS)


@pytest.mark.parametrize("line", ["--help", "-h", "--help run"])
def test_help_asked_for_as_on_a_command_line_names_every_verb(shell, line):
    assert "%dspex create" in repr(typed(shell, f"%dspex {line}").result)


@pytest.mark.parametrize("line", ["run --help", "run qa -h", "create --help", "configure --help"])
def test_help_of_a_verb_may_be_asked_for_as_an_option_and_nothing_else_happens(shell, session, line):
    verb = line.split()[0]
    assert repr(typed(shell, f"%dspex {line}").result) == magics.help_text(verb)
    assert session.asked == []


@pytest.mark.parametrize("verb", magics.VERBS)
def test_help_of_a_verb_names_its_options(shell, verb):
    shown = repr(typed(shell, f"%dspex help {verb}").result)
    assert all(option in shown for option in magics.VERBS[verb].options)


def test_inspection_shows_the_help(shell):
    assert "%dspex create" in shell.object_inspect("%dspex")["docstring"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%dspex cr", {"create"}),
        ("%dspex ", set(magics.VERBS)),
        ("%dspex run q", {"qa", "qa.long-name"}),
        ("%dspex run qa.lo", {"qa.long-name"}),
        ("answer = %dspex run su", {"summary"}),
        ("%%dspex run qa.long-n", {"qa.long-name"}),
        ("%dspex create new --mod", {"--module"}),
        ("%dspex create new --module Chain", {"ChainOfThought"}),
        ("%dspex create new --adapter j", {"json"}),
        ('%dspex create new "a -> b" --adapter=j', {"json"}),
        ("%dspex create new --tools look", {"look_up"}),
        ("%dspex configure budget.u", {"budget.usd="}),
        ("%dspex configure adapter=j", {"adapter=json"}),
        ("%dspex run qa question=@te", {"question=@text"}),
        ("%dspex configure api_key=@te", {"api_key=@text"}),
        ("%dspex add bo", {"bot"}),
        ("%dspex help hi", {"history"}),
    ],
)
def test_completion_replaces_the_piece_before_the_cursor(shell, text, expected):
    shell.run_cell("import dspy\nbot = dspy.Predict('q -> a')\ntext = 'x'\ndef look_up(): ...", store_history=False)
    shell.Completer.use_jedi = False
    from IPython.core.completer import provisionalcompleter, rectify_completions

    with provisionalcompleter():
        found = list(rectify_completions(text, shell.Completer.completions(text, len(text))))
    piece = text.split()[-1].removeprefix("--adapter=") if not text.endswith(" ") else ""
    assert {one.text for one in found} == expected
    assert {(one.start, one.end) for one in found} == {(len(text) - len(piece), len(text))}


def test_completion_leaves_other_lines_alone(shell, session):
    assert magics.completions(session, "print(dspex", {}) == ("", [])
    assert magics.completions(session, "%time dspex", {}) == ("", [])


def test_loading_twice_keeps_one_matcher_and_asks_the_newer_session(shell, session):
    newer = ScriptedSession()
    magics.load(shell, newer)
    typed(shell, "%dspex list").raise_error()
    assert (session.asked, [name for name, _ in newer.asked]) == ([], ["list_programs"])
    assert len(shell.Completer.custom_matchers) == 1
