"""The three ways in which a kernel is born: started plainly, forked when it is wanted, or one that stood by."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from dspex_kernels import SessionService, config
from dspex_kernels.provisioning.fork_provisioner import ForkServerProvisioner
from dspex_kernels.provisioning.fork_servers import ForkServer
from dspex_kernels.provisioning.guardian_client import GuardedProcess
from dspex_kernels.provisioning.provisioner import GuardedProvisioner, shared_guardians
from tests.live.kernels import LiveKernel
from tests.waiting import wait_for, wait_until

BIRTHS = ("plain", "forked", "standby")


class Births:
    """How the kernels of a test were born."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    @contextlib.contextmanager
    def watched(self, patch: pytest.MonkeyPatch, birth: str) -> Iterator[None]:
        """Have all kernels born so; afterwards, that they were is made sure of."""
        patch.setenv(config.ENV_FORK, "0" if birth == "plain" else "1")
        patch.setattr(ForkServerProvisioner, "standby", 2 if birth == "standby" else 0)
        patch.setattr(SessionService, "spare_kernels", 0)  # they are born beside the test's own
        if birth == "standby":
            self._have_some_stand_by()
        else:
            _have_none_stand_by()
        self._note(patch)
        yield
        # Who asks for many at once is given more than stand by.
        assert birth in self.seen, self.seen
        assert set(self.seen) <= {birth, "forked" if birth == "standby" else birth}, self.seen

    def _note(self, patch: pytest.MonkeyPatch) -> None:
        take, launch = ForkServer.take, GuardedProvisioner._launch

        def taken(server: ForkServer, standby: int) -> Any:
            future = take(server, standby)
            self.seen.append("standby" if future.done() else "forked")
            return future

        async def launched(provisioner: Any, *args: Any) -> GuardedProcess:
            self.seen.append("plain")
            process: GuardedProcess = await launch(provisioner, *args)
            return process

        patch.setattr(ForkServer, "take", taken)
        patch.setattr(GuardedProvisioner, "_launch", launched)

    @staticmethod
    def _have_some_stand_by() -> None:
        with LiveKernel() as kernel:
            used = kernel.manager.provisioner._guardian.fork_servers.all()[
                -1
            ]  # just now; others' kernels are others'
            wait_for(lambda: used.standby, deadline=30, what="a standby kernel")


def _have_none_stand_by() -> None:
    """End those that another test has left behind: they would be handed out."""
    guardian = shared_guardians()._shared
    assert guardian is not None
    for server in guardian.fork_servers.all():
        server._wanted = 0
        for pid in server.standby:
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(server.standby for server in guardian.fork_servers.all()), what="none that stands by")


@contextlib.contextmanager
def born(birth: str) -> Iterator[None]:
    """Have all kernels born so while this lasts: for a module's kernel, as ``birth`` is for a test's."""
    with pytest.MonkeyPatch.context() as patch, Births().watched(patch, birth):
        yield


async def wait_for_standby(service: SessionService) -> None:
    """Return when a kernel stands by in a service, one of whose sessions has a kernel."""
    servers = service._kernels._guardian.fork_servers
    await wait_until(lambda: any(server.standby for server in servers.all()), deadline=30, what="a standby kernel")


@pytest.fixture(params=BIRTHS)
def birth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How the test's kernels are born: each in its turn."""
    with Births().watched(monkeypatch, request.param):
        yield request.param
