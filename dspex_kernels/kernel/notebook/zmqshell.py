"""ipykernel's shell in two steps: it can be built before it is known whose it is.

A fork server builds it once, for kernels of other directories and environments than its own. The class and this
module bear the stock names: libraries look for them in the shell's type to know that they run in a notebook.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ipykernel import zmqshell
from IPython.core.history import HistoryManager
from IPython.core.profiledir import ProfileDir
from IPython.paths import get_ipython_dir
from traitlets import default


class ZMQInteractiveShell(zmqshell.ZMQInteractiveShell):
    """Stock, once it is settled. Until then it has read no environment, and has no directory and no history."""

    configurables: list[Any]
    history_manager: Any

    def init_ipython_dir(self, ipython_dir: str | None) -> None:
        """Called by IPython while it builds the shell, as those below: what they do waits for ``settle``."""

    def init_profile_dir(self, profile_dir: Any) -> None: ...

    def init_environment(self) -> None: ...

    def init_virtualenv(self) -> None: ...

    def init_history(self) -> None:
        # Not none at all: the names of the notebook's history are given to its namespace.
        self._take_history(HistoryManager(shell=self, parent=self, enabled=False, hist_file=":memory:"))

    @default("ipython_dir")
    def _default_ipython_dir(self) -> str:
        return str(get_ipython_dir())

    @default("profile_dir")
    def _default_profile_dir(self) -> Any:
        return ProfileDir.create_profile_dir_by_name(self.ipython_dir, "default")

    def settle(self, profile_dir: Any = None, *, history: bool) -> None:
        """Take up the environment and the directory of the process. Called once, before the first cell.

        Args:
            profile_dir: IPython's profile, a ``ProfileDir``; None finds the default one when it is first asked for.
            history: Whether the cells go into IPython's database.
        """
        if profile_dir is not None:
            super().init_ipython_dir(None)
            super().init_profile_dir(profile_dir)
        super().init_environment()
        super().init_virtualenv()
        self.init_encoding()
        self.init_pushd_popd_magic()
        self.starting_dir = os.getcwd()  # noqa: PTH109  # the text that IPython keeps
        if history:
            self._take_history(HistoryManager(shell=self, parent=self))
        else:
            self.history_manager.dir_hist = [Path.cwd()]
        self.init_user_ns()
        session_name = os.environ.get("JPY_SESSION_NAME")
        if session_name:
            self.user_ns["__session__"] = session_name

    def _take_history(self, history: HistoryManager) -> None:
        before = self.history_manager
        self.history_manager = history
        self.configurables = [one for one in self.configurables if one is not before]
        self.configurables.append(history)
