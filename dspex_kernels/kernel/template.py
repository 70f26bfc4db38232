"""A kernel that is built before it is known whose it is, and finished after a fork.

The fork server imports this module by name, calls ``build`` once, and ``park`` and ``serve`` in each child; it
knows nothing of kernels, and this knows nothing of forking. A kernel that is started plainly goes the same way in
one process (``dspex_kernels.kernel.__main__``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspex_kernels.kernel.app import DSPexKernelApp


def prepare() -> None:
    """Make so what must be so before DSPy and Jupyter are imported."""
    # jsonschema compiles a grammar for IRI formats at its import when this package is there (jupyter_server brings
    # it): one second of each kernel's start, and nothing in a kernel checks IRIs. jsonschema guards the import.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # None is "not importable"
    # DSPy and litellm fetch price lists over the network on first use otherwise.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")


def build() -> Template:
    """Import and build everything that a kernel needs and that can exist before the fork.

    It leaves one thread, no ZMQ context, no event loop, no ``dspy.cache``, no connection and no open file.
    """
    prepare()
    from jupyter_client.localinterfaces import localhost

    from dspex_kernels.kernel import rehearsal
    from dspex_kernels.kernel.app import DSPexKernelApp

    localhost()  # else each child looks through the network's interfaces: 11 ms
    rehearsal.warm()
    app = DSPexKernelApp.instance()
    app.build()
    app.init_extensions()  # without configuration, IPython's own only
    return Template(app)


class Template:
    """A built kernel, whose copies in forked children become kernels.

    Attributes:
        sources: Files that were read while it was built, whose change makes it stale.
    """

    def __init__(self, app: DSPexKernelApp) -> None:
        self._app = app
        self.sources: list[str] = []

    def rehearse(self) -> None:
        """Live a short kernel's life in a throw-away child, so that all is imported that a kernel imports.

        Called in place of ``serve``, in a directory that is removed afterwards. It is a full kernel's life: a lean
        one imports no more.
        """
        from dspex_kernels.kernel.rehearsal import Visitor

        os.environ.pop("DSPEX_LEAN", None)
        visitor = Visitor()
        self.serve(visitor.connection_file, visitor.start)
        visitor.join()

    def warm(self) -> None:
        """Run commands once more: what was imported since has made Python forget which classes are no mappings.

        Each abstract class remembers that until any is registered with another, and looks through all its
        subclasses else, which copied 470 pages.
        """
        from dspex_kernels.kernel import rehearsal

        rehearsal.warm()

    def park(self, is_wanted: Callable[[], bool]) -> None:
        """Do in a child what its kernel will do first: it is done, or its pages are copied, before somebody waits.

        Args:
            is_wanted: Whether somebody waits now.
        """
        from dspex_kernels.kernel import rehearsal

        prepare()
        if os.environ.get("DSPEX_LEAN") == "1":
            self._app.park(is_wanted)
        else:
            rehearsal.warm(is_wanted)

    def serve(
        self, connection_file: str, bound: Callable[[], None], serving: Callable[[], None] = lambda: None
    ) -> None:
        """Be the kernel until it ends.

        Args:
            connection_file: Its path.
            bound: Called once its sockets are bound.
            serving: Called once it answers; it may take a moment.
        """
        from tornado.ioloop import IOLoop

        prepare()  # this kernel's environment is another than the template's
        app = self._app
        app.connection_file, app.bound = connection_file, bound
        app.initialize([])
        IOLoop.current().add_callback(serving)
        app.start()
