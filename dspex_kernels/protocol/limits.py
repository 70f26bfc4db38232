"""The bounds of the wire: whoever passes one gets ``too_large``, never a truncated answer."""

MAX_REQUEST_BYTES = 8 * 1024 * 1024
"""A ``dspex_request`` content as JSON, in bytes."""

MAX_RESULT_BYTES = 8 * 1024 * 1024
"""A command's result as JSON, in bytes."""

MAX_SESSION_BYTES = 256 * 1024 * 1024
"""A whole session as JSON, on its way into a pooled kernel."""

MAX_DEPTH = 64
"""Nesting of arrays and objects in a request."""

MAX_PROGRAMS = 1000
"""Programs in one session."""

MAX_VERSIONS_KEPT = 50
"""Versions kept of one program; older ones are dropped, the latest is always kept."""

MAX_RUNNING_COMMANDS = 1000
"""Commands of one session running at once in one kernel."""

MAX_TRACEBACK_LINES = 100
"""Lines of a user's traceback in a reply; the middle is cut."""

MAX_MODELS = 100
"""Models of one session that statistics tell apart; the rest are told as one."""
