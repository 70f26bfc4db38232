"""What a user holds of a session: a handle with a method for each command, however the commands travel."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from typing import Any, Unpack

from dspex_kernels.sessions.calls import CallOptions, EventListener


class Prediction:
    """What a program answered: its output fields as attributes, as DSPy's own ``Prediction`` has them.

    An output named like one of the attributes below is reached with ``prediction["name"]``.

    Attributes:
        program_id: Which program answered.
        version: Which version of it.
        cost: USD; None when a price is unknown.
        lm_calls: Requests sent to a provider, retries included.
        duration_s: Seconds in the kernel.
    """

    def __init__(self, result: Mapping[str, Any]) -> None:
        """Take the result of ``execute_program``."""
        self._outputs: dict[str, Any] = dict(result["outputs"])
        self._usage: dict[str, dict[str, Any]] = dict(result.get("usage") or {})
        self.program_id: str = result["program_id"]
        self.version: int = result["version"]
        self.cost: float | None = result.get("cost")
        self.lm_calls: int = result.get("lm_calls", 0)
        self.duration_s: float = result.get("duration_s", 0.0)

    def get_lm_usage(self) -> dict[str, dict[str, Any]]:
        """Tokens by model: ``prompt_tokens``, ``completion_tokens``, …."""
        return {model: dict(usage) for model, usage in self._usage.items()}

    def keys(self) -> list[str]:
        """The names of the output fields, in the signature's order."""
        return list(self._outputs)

    def items(self) -> list[tuple[str, Any]]:
        """The output fields with their values."""
        return list(self._outputs.items())

    def toDict(self) -> dict[str, Any]:  # noqa: N802  # DSPy's name
        """The outputs as a dictionary of JSON values."""
        return dict(self._outputs)

    def __getattr__(self, name: str) -> Any:
        outputs = self.__dict__.get("_outputs", {})
        try:
            return outputs[name]
        except KeyError:
            raise AttributeError(f"the prediction has no field {name!r}: it has {', '.join(outputs)}") from None

    def __getitem__(self, name: str) -> Any:
        return self._outputs[name]

    def __contains__(self, name: object) -> bool:
        return name in self._outputs

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prediction) and self._outputs == other._outputs

    __hash__ = None  # type: ignore[assignment]  # outputs are mutable JSON values

    def __repr__(self) -> str:
        fields = ",\n    ".join(f"{name}={value!r}" for name, value in self._outputs.items())
        return f"Prediction(\n    {fields}\n)"


class Session(abc.ABC):
    """A session: programs under ids of their own, an LM, statistics.

    The methods are the commands of the command table; ``call`` is the plain form of each. All of them raise what
    the command answered, as a ``DSPexError``, and take ``timeout`` in seconds (None: the command's default).

    Attributes:
        session_id: The session's id.
    """

    def __init__(self, session_id: str | None) -> None:
        self.session_id = session_id

    @abc.abstractmethod
    async def call(
        self,
        command: str,
        args: Mapping[str, Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> dict[str, Any]:
        """Ask one command and return its result.

        Args:
            command: A name of the command table.
            args: Its arguments; None is none.
            **options: ``timeout`` (seconds; None is the default), ``request_id`` (a name by which ``cancel`` finds
                the call), ``stream`` (report tokens and status on the way), ``on_event`` (takes each event's
                content, on the event loop).
        """

    @abc.abstractmethod
    async def info(self) -> dict[str, Any]:
        """What is known about the session itself: id, backend, generation, kernel id, and more with a service."""

    @abc.abstractmethod
    async def destroy(self) -> None:
        """End the session and all it holds; over a direct connection, all it holds."""

    def program(self, program_id: str) -> Program:
        """A handle on a program by its id; nothing is asked, so it need not exist."""
        return Program(self, program_id)

    async def create_program(
        self,
        program_id: str,
        signature: str | Mapping[str, Any] | None = None,
        module: str = "Predict",
        *,
        timeout: float | None = None,
        **options: Any,
    ) -> Program:
        """Make a program.

        Args:
            program_id: Unique in this session.
            signature: ``"question -> answer"``, or fields as data; None where the module brings its own.
            module: The module's name.
            timeout: Seconds.
            **options: ``module_args``, ``config``, ``tools``, ``adapter``, ``replace``, ``if_version``.
        """
        args = {"program_id": program_id, "signature": signature, "module": module, **options}
        return self._made(await self.call("create_program", args, timeout=timeout))

    async def execute_program(
        self,
        program_id: str,
        inputs: Mapping[str, Any],
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        stream: bool = False,
        on_event: EventListener | None = None,
        **options: Any,
    ) -> Prediction:
        """Run a program.

        Args:
            program_id: Which.
            inputs: Its input fields.
            timeout: Seconds.
            request_id: A name for the call, for ``cancel``.
            stream: Whether tokens and status are reported on the way.
            on_event: Takes each event's content.
            **options: ``config`` (sampling parameters for this call), ``version``, ``budget``.
        """
        args = {"program_id": program_id, "inputs": dict(inputs), **options}
        return Prediction(
            await self.call(
                "execute_program", args, timeout=timeout, request_id=request_id, stream=stream, on_event=on_event
            )
        )

    async def list_programs(self, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """A summary of each program."""
        programs: list[dict[str, Any]] = (await self.call("list_programs", timeout=timeout))["programs"]
        return programs

    async def get_program(
        self, program_id: str, *, version: int | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        """A program's summary."""
        return await self.call("get_program", _given(program_id=program_id, version=version), timeout=timeout)

    async def delete_program(
        self, program_id: str, *, if_version: int | None = None, timeout: float | None = None
    ) -> None:
        """Delete a program with all its versions."""
        args = _given(program_id=program_id, if_version=if_version)
        await self.call("delete_program", args, timeout=timeout)

    async def export_program(
        self, program_id: str, *, version: int | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        """The program record: JSON from which the same program is built anywhere."""
        args = _given(program_id=program_id, version=version)
        record: dict[str, Any] = (await self.call("export_program", args, timeout=timeout))["record"]
        return record

    async def import_program(
        self, record: Mapping[str, Any], *, timeout: float | None = None, **options: Any
    ) -> Program:
        """Build a program from its record.

        Args:
            record: What ``export_program`` gave.
            timeout: Seconds.
            **options: ``program_id`` (another id), ``replace``, ``if_version``.
        """
        args = {"record": dict(record), **options}
        return self._made(await self.call("import_program", args, timeout=timeout))

    async def configure(self, *, timeout: float | None = None, **settings: Any) -> dict[str, Any]:
        """Change the session's settings; what is not given stays, None drops the setting.

        Args:
            timeout: Seconds.
            **settings: ``lm`` (a model string, or a profile), ``adapter``, ``budget``.

        Returns:
            The settings, without secrets.
        """
        changed: dict[str, Any] = (await self.call("configure", settings, timeout=timeout))["settings"]
        return changed

    async def reset(self, *, timeout: float | None = None) -> int:
        """Drop all programs and settings; how many programs that were."""
        dropped: int = (await self.call("reset", timeout=timeout))["programs"]
        return dropped

    async def get_stats(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Counts, LM usage and cost, memory."""
        return await self.call("get_stats", timeout=timeout)

    async def inspect_history(self, n: int = 1, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """The session's last ``n`` LM calls, newest last."""
        entries: list[dict[str, Any]] = (await self.call("inspect_history", {"n": n}, timeout=timeout))["entries"]
        return entries

    async def cancel(self, request_id: str, *, timeout: float | None = None) -> bool:
        """Cancel a running call; False when none of that name runs."""
        cancelled: bool = (await self.call("cancel", {"request_id": request_id}, timeout=timeout))["cancelled"]
        return cancelled

    async def ping(self, *, timeout: float | None = None) -> dict[str, Any]:
        """The health of the session's kernel."""
        return await self.call("ping", timeout=timeout)

    def _made(self, result: Mapping[str, Any]) -> Program:
        return Program(self, result["program_id"], version=result["version"], signature=result["signature"])

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.session_id}>"


class Program:
    """A program of a session: call it with its inputs.

    Attributes:
        session: Whose program.
        program_id: Its id there.
        version: The version when the handle was made; None when unknown. Calls take the latest.
        signature: As text; None when unknown.
    """

    def __init__(
        self, session: Session, program_id: str, *, version: int | None = None, signature: str | None = None
    ) -> None:
        self.session = session
        self.program_id = program_id
        self.version = version
        self.signature = signature

    async def acall(self, **inputs: Any) -> Prediction:
        """Run the program with these inputs; ``Session.execute_program`` takes a timeout and more."""
        return await self.session.execute_program(self.program_id, inputs)

    async def info(self) -> dict[str, Any]:
        """The program's summary."""
        return await self.session.get_program(self.program_id)

    async def export(self) -> dict[str, Any]:
        """The program record."""
        return await self.session.export_program(self.program_id)

    async def delete(self) -> None:
        """Delete the program with all its versions."""
        await self.session.delete_program(self.program_id)

    def __repr__(self) -> str:
        signature = f" {self.signature}" if self.signature else ""
        return f"<Program {self.program_id!r} of {self.session.session_id}:{signature}>"


def _given(**args: Any) -> dict[str, Any]:
    return {name: value for name, value in args.items() if value is not None}
