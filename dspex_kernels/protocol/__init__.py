"""What the service and a kernel say to each other, as data: no sockets, no files, no DSPy.

Theory of operation. A *command* is asked of a *session* in a ``dspex_request`` message; it gets exactly one
``dspex_reply``; on the way it may report ``dspex_event`` messages. ``commands.COMMANDS`` is the table of all
commands: a row names the arguments and the result (pydantic models), whether the command changes state, whether
it travels on the control channel, and its default deadline. A row here and a handler in ``kernel.handlers`` are
all that a new command needs; the JSON Schemas (``schemas.json_schemas()``) follow from the same models.

The words: a *session* is what a user holds; a *kernel* is a process; a *namespace* is one session's programs and
settings inside a kernel; a *program record* is the JSON from which a program is built again anywhere.
"""

PROTOCOL_VERSION = "1.0"
"""``major.minor``. Another major is refused (``protocol_mismatch``); a higher minor only adds."""

FEATURE = "dspex"
"""What a kernel announces in ``kernel_info_reply.supported_features`` (JEP 92)."""
