"""The ``%dspex`` magics: what a notebook types reaches the same session as commands sent from outside.

Theory of operation. A verb is a row of ``VERBS``: its words, options, help and what it does; help, completion and
the texts of errors are read off that table. Every verb asks the session through an ``Asker``; nothing here holds
state.

Errors show as one red line and fail the cell: they are the session's own DSPexErrors, and ``invalid_arguments``
where a line was typed wrongly.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol, get_args

from IPython.core.completer import SimpleCompletion, context_matcher
from IPython.core.magic import needs_local_scope, no_var_expand
from IPython.display import display as show

from dspex_kernels import errors
from dspex_kernels.kernel.notebook import display
from dspex_kernels.kernel.notebook.words import Scope, Value, assignments, mapping, split_words
from dspex_kernels.protocol.commands import LMProfileArgs
from dspex_kernels.protocol.records import AdapterName, Budget


class Asker(Protocol):
    """The notebook's session, as the magics reach it."""

    session_id: str

    def ask(
        self,
        command: str,
        args: dict[str, Any],
        *,
        timeout_s: float | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Run a command on the kernel's command thread and wait for its result; Ctrl-C cancels it.

        Args:
            command: A name of the command table.
            args: Its arguments.
            timeout_s: Seconds until ``timeout``; None is the command's default.
            on_event: Called with each event on the way; None asks for none.

        Raises:
            DSPexError: The command failed.
        """

    def add_module(self, program_id: str, module: Any) -> dict[str, Any]:
        """Make a ``dspy.Module`` of the notebook a program: ``program_id``, ``version``, ``signature``."""

    def add_tool(self, function: Any, name: str | None = None) -> str:
        """Make a function of the notebook a tool; its name there."""

    def program_ids(self) -> list[str]:
        """The ids of the session's programs, at once."""


@dataclass(frozen=True, slots=True)
class Call:
    """One magic as it was typed."""

    asker: Asker
    options: argparse.Namespace
    scope: Scope
    cell: str | None


@dataclass(frozen=True, slots=True)
class Verb:
    """A row of the table.

    Attributes:
        usage: What stands after ``%dspex``.
        summary: One line of help.
        act: What runs it; its result is displayed.
        words: Its words by name with argparse's keywords; none is exactly one word.
        options: Its options with argparse's keywords.
        cell: What a cell below ``%%dspex`` holds; "" where it takes none.
    """

    usage: str
    summary: str
    act: Callable[[Call], Any]
    words: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cell: str = ""


def create(call: Call) -> display.Notice:
    options, scope = call.options, call.scope
    args: dict[str, Any] = {"program_id": scope.text(options.program_id), "replace": options.replace}
    signature = _signature(call)
    if signature is not None:
        args["signature"] = signature
    for name, given in (("module", options.module), ("adapter", options.adapter)):
        if given is not None:
            args[name] = scope.text(given)
    if options.if_version is not None:
        args["if_version"] = options.if_version
    if options.args is not None:
        args["module_args"] = scope.value(options.args).value
    if options.config:
        args["config"] = _values(scope, options.config, what="--config")
    if options.tools is not None:
        args["tools"] = [name.strip() for name in scope.text(options.tools).split(",") if name.strip()]
    return display.program_created(_create_with_tools(call, args))


def _create_with_tools(call: Call, args: dict[str, Any], added: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Create; a tool that is missing is taken from the notebook's functions, each tried once."""
    try:
        return call.asker.ask("create_program", args)
    except errors.ToolNotFound as failure:
        named = failure.details.get("tool")
        missing = [named] if isinstance(named, str) else args.get("tools", [])
        functions = {
            name: call.scope.names[name]
            for name in missing
            if name not in added and callable(call.scope.names.get(name))
        }
        if not functions:
            raise
    for name, function in functions.items():
        call.asker.add_tool(function, name)
    return _create_with_tools(call, args, added | functions.keys())


def _signature(call: Call) -> Any:
    given, cell = call.options.signature, (call.cell or "").strip()
    signature = None if given is None else call.scope.value(given).value
    if not cell:
        return signature
    if signature is None:
        if cell.startswith("{") or re.search(r"^inputs\s*:\s*$", cell, re.MULTILINE):
            return {name: value.value for name, value in mapping(cell, what="signature").items()}
        signature, _, cell = (part.strip() for part in re.split(r"(\n\s*\n|\Z)", cell, maxsplit=1))
    if not cell:
        return " ".join(signature.split())
    if isinstance(signature, dict):
        return {**signature, "instructions": cell}
    return {**_fields(" ".join(str(signature).split())), "instructions": cell}


def _fields(signature: str) -> dict[str, Any]:
    """``"question, n: int -> answer"`` as data, types as they were written."""
    sides = signature.split("->")
    if len(sides) != 2:
        raise errors.InvalidSignature(f'signature {signature!r} is not "inputs -> outputs": write one arrow')
    return {name: _side(side, signature) for name, side in zip(("inputs", "outputs"), sides, strict=True)}


def _side(side: str, signature: str) -> list[dict[str, str]]:
    try:
        fields = ast.parse(f"def fields({side}): ...").body[0]
    except (SyntaxError, ValueError) as failure:
        raise errors.InvalidSignature(
            f'signature {signature!r}: {side.strip()!r} is not "name, name: type, …"'
        ) from failure
    assert isinstance(fields, ast.FunctionDef)
    return [
        {"name": argument.arg, "type": ast.unparse(argument.annotation) if argument.annotation else "str"}
        for argument in fields.args.args
    ]


def run(call: Call) -> Any:
    options, scope = call.options, call.scope
    given = {name: scope.value(word) for name, word in assignments(options.inputs, what="inputs").items()}
    if call.cell and call.cell.strip():
        below = mapping(call.cell, what="inputs")
        twice = sorted(given.keys() & below.keys())
        if twice:
            raise errors.InvalidArguments(f"{twice[0]!r} is given twice: on the line and in the cell")
        given.update(below)
    args: dict[str, Any] = {"program_id": scope.text(options.program_id)}
    if options.version is not None:
        args["version"] = options.version
    inputs = _as_typed(call, dict(args), given)
    if options.config:
        args["config"] = _values(scope, options.config, what="--config")
    result = call.asker.ask("execute_program", {**args, "inputs": inputs}, timeout_s=options.timeout)
    return _prediction(result)


def _as_typed(call: Call, program: dict[str, Any], given: Mapping[str, Value]) -> dict[str, Any]:
    """The inputs' values; where a number was typed for a field of text, its text."""
    doubtful = {
        name for name, value in given.items() if value.text is not None and not isinstance(value.value, str)
    }
    types = call.asker.ask("get_program", program)["inputs"] if doubtful else {}
    return {
        name: value.text if name in doubtful and types.get(name) == "str" else value.value
        for name, value in given.items()
    }


def _prediction(result: Mapping[str, Any]) -> Any:
    import dspy  # the kernel has it in; a shell that only loads the magics need not

    made = dspy.Prediction(dict(result["outputs"]))
    made.set_lm_usage(result["usage"])
    return made


def list_programs(call: Call) -> display.Table:
    return display.programs_table(call.asker.ask("list_programs", {}))


def show_program(call: Call) -> display.Table:
    args: dict[str, Any] = {"program_id": call.scope.text(call.options.program_id)}
    if call.options.version is not None:
        args["version"] = call.options.version
    return display.program_table(call.asker.ask("get_program", args))


def delete(call: Call) -> display.Notice:
    result = call.asker.ask("delete_program", {"program_id": call.scope.text(call.options.program_id)})
    return display.Notice(f"{result['program_id']} is deleted", result)


def reset(call: Call) -> display.Notice:
    result = call.asker.ask("reset", {})
    return display.Notice(f"{result['programs']} programs and the session's settings are dropped", result)


def stats(call: Call) -> display.Table:
    return display.stats_table(call.asker.ask("get_stats", {}))


def history(call: Call) -> display.Table:
    return display.history_table(call.asker.ask("inspect_history", {"n": call.options.n}))


def add(call: Call) -> display.Notice:
    name = call.options.name
    thing = call.scope.get(name)
    dspy = sys.modules.get("dspy")  # whoever made a dspy.Module has it imported
    if dspy is not None and isinstance(thing, dspy.Module):
        return display.program_created(call.asker.add_module(call.options.as_ or name, thing))
    if isinstance(thing, type) or not callable(thing):
        kind = (
            f"the class {name}: make an instance of it" if isinstance(thing, type) else f"a {type(thing).__name__}"
        )
        raise errors.InvalidArguments(f"{name!r} is {kind}; add takes a dspy.Module or a function")
    tool = call.asker.add_tool(thing, call.options.as_)
    return display.Notice(f"{tool} is a tool now: %dspex create … --tools {tool}", {"tool": tool})


_PROFILE = tuple(name for name in LMProfileArgs.model_fields if name != "model")
_TEXT_SETTINGS = ("api_base", "api_key", "api_key_env", "model_type", "adapter")
_NESTED_SETTINGS = ("params", "offline", "budget")
SETTINGS = (
    "lm",
    "adapter",
    *(name for name in _PROFILE if name not in _NESTED_SETTINGS),
    *(f"budget.{name}" for name in Budget.model_fields),
)


def configure(call: Call) -> display.Table:
    words = assignments(call.options.settings, what="settings")
    if _tells_key(words):
        show(display.Notice(_KEY_TYPED))
    args, profile, budget = _settings(call.scope, words)
    if profile or budget:
        current = {} if "lm" in args and not budget else call.asker.ask("configure", {})["settings"]
        if profile:
            args["lm"] = _profile(args, profile, current.get("lm"))
        if budget:
            args["budget"] = {**(current.get("budget") or {}), **budget}
    return display.settings_table(call.asker.ask("configure", args))


_KEY_TYPED = (
    "The key you typed is now in this notebook and in its history: better api_key=@variable, or api_key_env=NAME."
)


def _tells_key(words: Mapping[str, str]) -> bool:
    """Whether a key stands in the line itself, not in a variable."""
    inner = any(word.startswith("{") and "api_key" in word for word in words.values())
    return inner or words.get("api_key", "@")[:1] not in ("@", "$", "{", "")


def _settings(scope: Scope, words: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The command's args, the LM profile's fields, and the budget's limits, as they were given."""
    args: dict[str, Any] = {}
    profile: dict[str, Any] = {}
    budget: dict[str, Any] = {}
    for name, word in words.items():
        group, _, inner = name.partition(".")
        if name in _TEXT_SETTINGS:
            value: Any = scope.text(word)
        else:
            value = scope.value(word).value
        if value in ("none", "None", "null"):
            value = None
        if name in ("lm", "model"):
            args["lm"] = _named_lm(value)
        elif name in ("adapter", "budget"):
            args[name] = value
        elif group == "budget":
            budget[inner] = value
        elif group in ("params", "offline") and inner:
            profile.setdefault(group, {})[inner] = value
        elif name in _PROFILE:
            profile[name] = value
        else:
            raise errors.InvalidArguments(
                f"there is no setting {name!r}: there are {', '.join(SETTINGS)}; "
                f"more sampling parameters go as params.{name}"
            )
    return args, profile, budget


def _named_lm(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("{"):
        raise errors.InvalidArguments(
            'lm is no JSON object: write lm={"model": "openai/gpt-5-mini", …}, or lm=@variable for a dict'
        )
    return value


def _profile(args: Mapping[str, Any], fields: dict[str, Any], current: Mapping[str, Any] | None) -> dict[str, Any]:
    """The LM profile to set: the given fields over the named LM, or over the session's present one."""
    if "lm" in args:
        named = args["lm"]
        return {**(named if isinstance(named, dict) else {"model": named}), **fields}
    if current is None:
        raise errors.LMNotConfigured("no LM to change: name one as well, lm=openai/gpt-5-mini")
    if current.get("key_given") and "api_key" not in fields and "api_key_env" not in fields:
        raise errors.LMCredentialsRequired(
            "the session's key was given directly and is not told: name lm=… and api_key=@variable again"
        )
    return {
        **{name: value for name, value in current.items() if name != "key_given" and value is not None},
        **fields,
    }


def _values(scope: Scope, words: Iterable[str], *, what: str) -> dict[str, Any]:
    return {name: scope.value(word).value for name, word in assignments(words, what=what).items()}


def help_(call: Call) -> display.Notice:
    return display.Notice(help_text(call.options.verb))


_CONFIG_OPTION = {"--config": {"action": "append", "metavar": "NAME=VALUE"}}
_VERSION_OPTION = {"--version": {"type": int}}

VERBS: dict[str, Verb] = {
    "create": Verb(
        'create ID "question -> answer" [--module M] [--tools a,b] [--adapter A] [--config NAME=VALUE]'
        " [--args JSON] [--replace] [--if-version N]",
        "make a program of a signature",
        create,
        {"program_id": {}, "signature": {"nargs": "?"}},
        {
            "--module": {},
            "--tools": {},
            "--adapter": {},
            **_CONFIG_OPTION,
            "--args": {},
            "--replace": {"action": "store_true"},
            "--if-version": {"type": int},
        },
        cell="the instructions; or the signature, an empty line, the instructions; or inputs and outputs as YAML",
    ),
    "run": Verb(
        'run ID name="value" … [--config NAME=VALUE] [--version N] [--timeout SECONDS]',
        "run a program; the result is a dspy.Prediction",
        run,
        {"program_id": {}, "inputs": {"nargs": "*"}},
        {**_CONFIG_OPTION, **_VERSION_OPTION, "--timeout": {"type": float}},
        cell="the inputs as YAML (name: value) or JSON",
    ),
    "list": Verb("list", "the session's programs", list_programs),
    "show": Verb("show ID [--version N]", "one program", show_program, {"program_id": {}}, _VERSION_OPTION),
    "delete": Verb("delete ID", "drop a program and its versions", delete, {"program_id": {}}),
    "add": Verb(
        "add NAME [--as ID]",
        "make a program of a dspy.Module of the notebook, or a tool of a function",
        add,
        {"name": {}},
        {"--as": {"dest": "as_"}},
    ),
    "configure": Verb(
        "configure [lm=provider/model] [temperature=0.2] [api_key_env=NAME] [adapter=json] [budget.usd=0.5] …",
        "change the settings that are named; without any, show them",
        configure,
        {"settings": {"nargs": "*"}},
    ),
    "stats": Verb("stats", "calls, tokens, cost and memory", stats),
    "history": Verb(
        "history [N]",
        "the session's last N LM calls (default 1)",
        history,
        {"n": {"nargs": "?", "type": int, "default": 1}},
    ),
    "reset": Verb("reset", "drop all programs and settings", reset),
    "help": Verb("help [VERB]", "this page, or one verb", help_, {"verb": {"nargs": "?"}}),
}

_VALUES_HELP = """\
Values are JSON or Python literals where they are such, else text. @name is the value of a notebook variable;
$name and {expression} are put into text, as in other magics. Keys: api_key=@variable or api_key_env=NAME."""


def help_text(verb: str | None = None) -> str:
    """The help of one verb, or of all.

    Raises:
        InvalidArguments: There is no such verb.
    """
    if verb is None:
        width = max(map(len, VERBS))
        rows = [f"  %dspex {name.ljust(width)}  {row.summary}" for name, row in VERBS.items()]
        return "\n".join(
            [
                "DSPy programs in this notebook's session.",
                "",
                *rows,
                "",
                _VALUES_HELP,
                "`%dspex help run` tells all about one; `%%dspex run` and `%%dspex create` take a cell.",
            ]
        )
    row = _verb(verb)
    below = [f"%%dspex {verb} …: the cell holds {row.cell}"] if row.cell else []
    return "\n".join([f"%dspex {row.usage}", f"  {row.summary}", *below, "", _VALUES_HELP])


def _verb(name: str) -> Verb:
    try:
        return VERBS[name]
    except KeyError:
        raise errors.InvalidArguments(f"%dspex has no verb {name[:40]!r}: there are {', '.join(VERBS)}") from None


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of ending the process, and never repeats a value: it may be a secret."""

    def error(self, message: str) -> NoReturn:
        raise errors.InvalidArguments(re.sub(r"=\S+", "=…", message))


def _parse(name: str, words: list[str]) -> argparse.Namespace:
    row = _verb(name)
    parser = _Parser(prog=f"%dspex {name}", add_help=False, allow_abbrev=False)
    for word, keywords in (*row.words.items(), *row.options.items()):
        parser.add_argument(word, **keywords)
    try:
        options, unknown = parser.parse_known_intermixed_args(words)
        if unknown:
            parser.error(_about_unknown(unknown))
    except errors.InvalidArguments as failure:
        raise errors.InvalidArguments(f"{failure.message}; usage: %dspex {row.usage}") from None
    return options


def _about_unknown(words: list[str]) -> str:
    if any("->" in word for word in words):
        return 'put the signature in quotes: "question -> answer"'
    options = [word.partition("=")[0] for word in words if word.startswith("-")]
    return f"no option {options[0]}" if options else f"{len(words)} words too many: quote what has spaces"


def dispatch(asker: Asker, line: str, cell: str | None, names: Mapping[str, Any]) -> Any:
    """Run what was typed after ``%dspex`` or ``%%dspex``.

    Args:
        asker: The session.
        line: The rest of the line.
        cell: The lines below; None for a line magic.
        names: The notebook's variables.

    Returns:
        What to display, a dspy.Prediction for ``run``.

    Raises:
        DSPexError: The line is wrong (``invalid_arguments``) or the command failed; IPython shows it as one line.
    """
    try:
        words = split_words(line)
        if "--help" in words or "-h" in words:
            words = ["help", *(word for word in words[:1] if word in VERBS)]
        name = words[0] if words else "help"
        options = _parse(name, words[1:])
        if cell is not None and cell.strip() and not VERBS[name].cell:
            raise errors.InvalidArguments(f"%dspex {name} takes no cell: write it with one % on a line of its own")
        return VERBS[name].act(Call(asker, options, Scope(names), cell))
    except errors.DSPexError as failure:
        # IPython asks the exception itself how to show it: as one line, the frames are ours and tell nothing.
        failure._render_traceback_ = functools.partial(rendered, failure)  # type: ignore[attr-defined]  # IPython's hook
        raise


def rendered(failure: errors.DSPexError) -> list[str]:
    """An error as it is shown: the user's own frames where it carries them, and one red line."""
    frames = failure.traceback if isinstance(failure, errors.ProgramFailed) else []
    return [*frames, f"\x1b[31m{failure.code}\x1b[0m: {failure.message}"]


MODULES = ("Predict", "ChainOfThought", "ReAct", "MultiChainComparison", "BestOfN", "Refine")
_MAGIC_LINE = re.compile(r"(?:^|=)\s*%%?dspex\s+(.*)$")


def completions(asker: Asker, text: str, names: Mapping[str, Any]) -> tuple[str, list[str]]:
    """What may follow on a magic's line.

    Args:
        asker: The session.
        text: The line up to the cursor.
        names: The notebook's variables.

    Returns:
        The piece before the cursor that is completed, and what it may become; none for other lines.
    """
    match = _MAGIC_LINE.search(text)
    if match is None:
        return "", []
    *before, piece = re.split(r"\s+", match.group(1))
    option, equals, value = piece.partition("=")
    if equals and option.startswith("--"):
        before, piece = [*before, option], value
    found = sorted({word for word in _candidates(asker, before, piece, names) if word.startswith(piece)})
    return piece, found


def _candidates(asker: Asker, before: list[str], piece: str, names: Mapping[str, Any]) -> Iterator[str]:
    if not before:
        yield from VERBS
        return
    verb, previous = before[0], before[-1]
    row = VERBS.get(verb)
    if row is None:
        return
    if previous == "--module":
        yield from MODULES
    elif previous == "--adapter":
        yield from get_args(AdapterName)
    elif previous == "--tools":
        yield from _functions(names)
    elif piece.startswith("-"):
        yield from row.options
    elif len(before) == 1 and "program_id" in row.words:
        yield from asker.program_ids()
    elif verb == "help" and len(before) == 1:
        yield from VERBS
    elif verb == "add" and len(before) == 1:
        yield from (*_modules(names), *_functions(names))
    elif "=@" in piece:
        yield from (f"{piece.partition('=@')[0]}=@{name}" for name in names if not name.startswith("_"))
    elif verb == "configure":
        yield from (f"{name}=" for name in SETTINGS)
        yield from (f"adapter={name}" for name in get_args(AdapterName))
    else:
        yield from row.options


def _functions(names: Mapping[str, Any]) -> Iterator[str]:
    return (
        name for name, thing in names.items() if type(thing).__name__ == "function" and not name.startswith("_")
    )


def _modules(names: Mapping[str, Any]) -> Iterator[str]:
    dspy = sys.modules.get("dspy")
    kind = () if dspy is None else dspy.Module
    return (name for name, thing in names.items() if isinstance(thing, kind) and not name.startswith("_"))


def load(shell: Any, asker: Asker) -> None:
    """Give a shell the magics, their completion, and the display of DSPy's objects; again replaces them.

    Args:
        shell: The IPython shell.
        asker: The notebook's session.
    """

    def dspex(line: str, cell: str | None = None, local_ns: dict[str, Any] | None = None) -> Any:
        return dispatch(asker, line, cell, {**shell.user_ns, **(local_ns or {})})

    dspex.__doc__ = help_text()
    magic = needs_local_scope(no_var_expand(dspex))
    shell.register_magic_function(magic, magic_kind="line_cell", magic_name="dspex")

    def matcher(context: Any) -> dict[str, Any]:
        piece, found = completions(asker, context.text_until_cursor, shell.user_ns)
        return {
            "completions": [SimpleCompletion(text=text, type="dspex") for text in found],
            "matched_fragment": piece,
            "suppress": bool(found),
            "ordered": True,
        }

    # A matcher, not a `complete_command` hook: hooks see words cut at dots and dashes, and take no option names.
    ours = context_matcher(identifier="dspex")(matcher)
    others = [one for one in shell.Completer.custom_matchers if getattr(one, "matcher_identifier", "") != "dspex"]
    shell.Completer.custom_matchers = [*others, ours]
    display.register(shell)
