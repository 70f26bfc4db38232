"""The lease: one service a session, and what a disk that refuses leaves."""

from __future__ import annotations

import os
import resource

import pytest

from dspex_kernels import errors
from dspex_kernels.sessions.lease import LOCK_NAME, Lease


def test_a_lease_is_held_by_one_until_it_is_released(tmp_path):
    lease = Lease.acquire("s", tmp_path)
    with pytest.raises(errors.SessionNotReady, match=rf"'s' is in use by another service \(pid {os.getpid()}\)"):
        Lease.acquire("s", tmp_path)
    assert (tmp_path / LOCK_NAME).exists()
    lease.release()
    Lease.acquire("s", tmp_path).release()


def test_a_disk_that_takes_no_byte_is_a_store_error_and_leaves_the_session_free(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # writes fail, as on a full disk
    try:
        with pytest.raises(errors.StoreError, match=f"session 's': {tmp_path / LOCK_NAME} cannot be used"):
            Lease.acquire("s", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    Lease.acquire("s", tmp_path).release()


def test_what_is_discarded_takes_its_directory_along_unless_there_is_more_in_it(tmp_path):
    Lease.acquire("s", tmp_path / "s").discard()
    assert not (tmp_path / "s").exists()
    lease = Lease.acquire("t", tmp_path / "t")
    (tmp_path / "t" / "journal.jsonl").write_text("")
    lease.discard()
    assert (tmp_path / "t" / "journal.jsonl").exists()
    Lease.acquire("t", tmp_path / "t").release()
