"""What a person sees: predictions, programs and the magics' answers as small tables.

DSPy's own classes are not touched: IPython's formatters are told, by name, how to show them, so that nothing here
imports DSPy. All text is data of a language model or of a user: it is escaped for HTML and stripped of control
characters for a terminal. Secrets never get here, but what could carry one (a URL's password, a parameter named
like a key) is masked all the same.
"""

from __future__ import annotations

import functools
import html
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from pydantic_core import to_jsonable_python

HTML_CELL_CHARS = 600
"""Characters of a value shown in an HTML cell; the rest is in its tooltip."""
TOOLTIP_CHARS = 4000
TEXT_CELL_CHARS = 60
"""Characters of a value shown in a terminal's cell."""

JSON_TYPE = "application/vnd.dspex+json"
"""The media type of an output's JSON, for programs that read a notebook: ``application/json`` JupyterLab would show
in place of the table, as a tree with its fields sorted."""

MASK = "•••"
_SECRET_NAME = re.compile(r"key|token(?!s)|secret|password|passwd|authori[sz]ation|credential|header|cookie", re.I)
_LEFT = "text-align:left;vertical-align:top"


class Table:
    """Rows under column names, for HTML, JSON and plain text.

    Args:
        title: A line above the table; may be empty.
        columns: The column names; empty hides the head, as fits a table of names and values.
        rows: One sequence of values a row, as many as there are columns.
        data: The same as JSON-able data, for programs that read the output.
    """

    def __init__(
        self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], data: dict[str, Any]
    ) -> None:
        self.title = title
        self.columns = list(columns)
        self.rows = [list(row) for row in rows]
        self.data = data

    def __repr__(self) -> str:
        lines = [[text_cell(value) for value in row] for row in self.rows]
        if self.columns:
            lines.insert(0, self.columns)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join([one_line(self.title), *(line.rstrip() for line in padded)]).strip("\n")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        head = "".join(f'<th style="{_LEFT}">{html.escape(name)}</th>' for name in self.columns)
        table = _html_table(self.title, f"<thead><tr>{head}</tr></thead>" if head else "", self.rows)
        return {"text/html": table, JSON_TYPE: jsonable(self.data)}


class Notice:
    """A line or a page of plain text, as the answer of a magic."""

    def __init__(self, text: str, data: dict[str, Any] | None = None) -> None:
        self.text = text
        self.data = data

    def __repr__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        page = {"text/html": f'<pre style="margin:0">{html.escape(self.text)}</pre>'}
        return page if self.data is None else {**page, JSON_TYPE: jsonable(self.data)}


def _html_table(title: str, head: str, rows: Iterable[Sequence[Any]]) -> str:
    body = "".join(
        "<tr>" + "".join(f'<td style="{_LEFT}">{html_cell(value)}</td>' for value in row) + "</tr>" for row in rows
    )
    caption = f"<div><small>{html.escape(one_line(title, limit=300))}</small></div>" if title else ""
    return f'<div class="dspex">{caption}<table>{head}<tbody>{body}</tbody></table></div>'


def html_cell(value: Any) -> str:
    """A value as escaped HTML: nested ones as indented JSON, long ones cut with the rest in the tooltip."""
    nested = isinstance(value, (dict, list, tuple))
    text = json.dumps(jsonable(value), indent=2, ensure_ascii=False) if nested else plain(value)
    tooltip = ""
    if len(text) > HTML_CELL_CHARS:
        tooltip = f' title="{html.escape(text[:TOOLTIP_CHARS])}"'
        text = text[:HTML_CELL_CHARS] + "…"
    font = ";font-family:monospace" if nested else ""
    return f'<span style="white-space:pre-wrap{font}"{tooltip}>{html.escape(text)}</span>'


def text_cell(value: Any) -> str:
    """A value as one short line without control characters."""
    nested = isinstance(value, (dict, list, tuple))
    return one_line(json.dumps(jsonable(value), ensure_ascii=False) if nested else plain(value))


def one_line(text: str, *, limit: int = TEXT_CELL_CHARS) -> str:
    """``text`` on one line of at most ``limit`` characters; an escape sequence could repaint a terminal."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text[: limit * 4]).split())
    return words if len(words) <= limit else words[: limit - 1] + "…"


def plain(value: Any) -> str:
    """A scalar as people write it; None is a dash."""
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def jsonable(value: Any) -> Any:
    """``value`` as JSON types: models and dates in their JSON form, NaN and infinity null, the unknown as text."""
    return to_jsonable_python(value, fallback=str, inf_nan_mode="null")


def money(usd: float | None) -> str:
    """A cost as people write it."""
    return "unknown" if usd is None else f"${usd:.6f}".rstrip("0").rstrip(".")


def masked(value: Any, name: str = "") -> Any:
    """``value`` with all masked that is named like a secret, and a URL without its user and password."""
    told = name in ("api_key_env", "key_given") or isinstance(value, bool) or value is None
    if not told and _SECRET_NAME.search(name):
        return MASK
    if isinstance(value, Mapping):
        return {key: masked(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(inner) for inner in value]
    return _without_userinfo(value) if isinstance(value, str) and "://" in value else value


def _without_userinfo(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return MASK
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{MASK}@{host}" if host != parts.netloc else host).geturl()


def program_created(result: dict[str, Any]) -> Notice:
    """The answer of ``create_program``."""
    text = f"{result['program_id']} (version {result['version']}): {result['signature']}"
    return Notice(text, result)


def programs_table(result: dict[str, Any]) -> Table:
    """The answer of ``list_programs``."""
    rows = [
        [p["program_id"], p["version"], p["module"], typed_signature(p["inputs"], p["outputs"])]
        for p in result["programs"]
    ]
    count = result["count"]
    title = (
        f"{count} program{'' if count == 1 else 's'}"
        if count
        else 'no programs yet: %dspex create qa "question -> answer"'
    )
    return Table(title, ["program", "version", "module", "signature"] if rows else [], rows, result)


def program_table(result: dict[str, Any]) -> Table:
    """The answer of ``get_program``."""
    rows = [
        ["module", result["module"]],
        ["signature", typed_signature(result["inputs"], result["outputs"])],
        ["instructions", result["instructions"]],
        ["version", f"{result['version']} of {', '.join(map(str, result['versions']))}"],
        ["tools", ", ".join(result["tools"]) or None],
        ["adapter", result["adapter"]],
        ["portable", "yes" if result["portable"] else "no: it needs what only this kernel has"],
        ["created", result["created_at"]],
    ]
    return Table(result["program_id"], [], rows, result)


def settings_table(result: dict[str, Any]) -> Table:
    """The answer of ``configure``: the settings that are in force."""
    settings = masked(result["settings"])
    lm = settings.get("lm") or {}
    told = {
        name: value
        for name, value in lm.items()
        if value not in (None, {}) and (name, value) != ("key_given", False)
    }
    rows = [[name, value] for name, value in told.items()] or [["lm", "none yet"]]
    rows.append(["adapter", settings.get("adapter") or "chat (DSPy's default)"])
    limits = {name: limit for name, limit in (settings.get("budget") or {}).items() if limit is not None}
    rows.append(["budget", limits or "no limit"])
    return Table("settings of this session", [], rows, {**result, "settings": settings})


def stats_table(result: dict[str, Any]) -> Table:
    """The answer of ``get_stats``."""
    commands = ", ".join(f"{count} {outcome}" for outcome, count in result["commands"].items() if count)
    limits = {name: limit for name, limit in (result.get("budget") or {}).items() if limit is not None}
    rows = [
        ["programs", result["programs"]],
        ["executions", result["executions"]],
        ["commands", commands or "none yet"],
        ["LM calls", f"{result['lm_calls']} ({result['cache_hits']} more answered by the cache)"],
        *([f"  {model}", _usage_line(usage)] for model, usage in result["lm"].items()),
        ["tokens", result["total_tokens"]],
        ["cost", money(result["cost"])],
        ["budget", limits or "no limit"],
        ["kernel memory", f"{result['kernel_memory_bytes'] / 2**20:.0f} MiB"],
        ["created", result["created_at"]],
        ["last activity", result["last_activity"]],
    ]
    return Table(f"session {result['session_id']}", [], rows, result)


def _usage_line(usage: Mapping[str, Any]) -> str:
    failed = f", {usage['failed_calls']} failed" if usage.get("failed_calls") else ""
    return f"{usage['lm_calls']} calls{failed}, {usage['total_tokens']} tokens, {money(usage['cost'])}"


def history_table(result: dict[str, Any]) -> Table:
    """The answer of ``inspect_history``: the session's own LM calls, newest last."""
    rows = [
        [
            entry["timestamp"],
            entry["model"],
            _last_text(entry["messages"]),
            entry["outputs"][0] if len(entry["outputs"]) == 1 else entry["outputs"],
            "cache" if entry["cache_hit"] else entry["usage"].get("total_tokens"),
            money(entry["cost"]),
        ]
        for entry in result["entries"]
    ]
    columns = ["time", "model", "last message", "answer", "tokens", "cost"] if rows else []
    count = result["count"]
    title = f"{count} LM call{'' if count == 1 else 's'}, newest last" if count else "no LM calls yet"
    return Table(title, columns, rows, result)


def _last_text(messages: Sequence[Mapping[str, Any]]) -> Any:
    return messages[-1].get("content") if messages else None


def typed_signature(inputs: Mapping[str, str], outputs: Mapping[str, str]) -> str:
    """``question: str -> answer: str`` from field names and types."""
    return " -> ".join(", ".join(f"{name}: {kind}" for name, kind in side.items()) for side in (inputs, outputs))


def prediction_json(prediction: Any) -> dict[str, Any]:
    """A prediction, DSPy's or of a session's handle, as its fields, nested models in their JSON form."""
    fields: dict[str, Any] = jsonable(prediction.toDict())
    return fields


def prediction_html(prediction: Any) -> str:
    """A prediction as a table of fields and values."""
    usage = prediction.get_lm_usage() or {}
    tokens = sum(int(used.get("total_tokens") or 0) for used in usage.values())
    title = f"Prediction · {tokens} tokens" if tokens else "Prediction"
    head = f'<thead><tr><th style="{_LEFT}">field</th><th style="{_LEFT}">value</th></tr></thead>'
    return _html_table(title, head, list(prediction_json(prediction).items()))


def module_json(module: Any) -> dict[str, Any]:
    """A ``dspy.Module`` as its predictors: their signatures and how many demos they hold."""
    predictors = [
        {
            "name": name,
            "module": type(predictor).__name__,
            "signature": typed_signature(
                _field_types(predictor.signature.input_fields), _field_types(predictor.signature.output_fields)
            ),
            "instructions": predictor.signature.instructions,
            "demos": len(predictor.demos),
        }
        for name, predictor in module.named_predictors()
    ]
    return {"module": type(module).__name__, "predictors": predictors}


def module_html(module: Any) -> str:
    """A ``dspy.Module`` as a table: one row a predictor."""
    shown = module_json(module)
    columns = ("predictor", "signature", "instructions", "demos")
    head = "".join(f'<th style="{_LEFT}">{name}</th>' for name in columns)
    rows = [[p["name"], p["signature"], p["instructions"], p["demos"]] for p in shown["predictors"]]
    return _html_table(shown["module"], f"<thead><tr>{head}</tr></thead>", rows)


def _field_types(fields: Mapping[str, Any]) -> dict[str, str]:
    return {name: _type_name(field.annotation) for name, field in fields.items()}


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not getattr(annotation, "__args__", ()):
        return annotation.__name__
    return re.sub(r"\b(?:typing|__main__)\.", "", str(annotation))


def register(shell: Any) -> None:
    """Show DSPy's objects in this shell as tables. Does not import DSPy.

    Args:
        shell: The IPython shell.
    """
    formatter = shell.display_formatter.mimebundle_formatter
    # A formatter for a class also serves its subclasses, those of the notebook too.
    for module, name, as_html, as_json in (
        ("dspy.primitives.prediction", "Prediction", prediction_html, prediction_json),
        # What a session's handle answers, where a notebook is the client.
        ("dspex_kernels.sessions.session", "Prediction", prediction_html, prediction_json),
        ("dspy.primitives.module", "Module", module_html, module_json),
    ):
        formatter.for_type_by_name(module, name, functools.partial(_bundle, as_html, as_json))


def _bundle(
    as_html: Callable[[Any], str], as_json: Callable[[Any], dict[str, Any]], thing: Any, **_: Any
) -> dict[str, Any]:
    """What IPython shows of a thing; the text is IPython's own."""
    return {"text/html": as_html(thing), JSON_TYPE: as_json(thing)}
