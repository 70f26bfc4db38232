"""What a scrape shows, read back from Prometheus's own text format."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dspex_kernels.metrics import COUNTERS, PrometheusMetrics
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions import happenings
from dspex_kernels.sessions.figures import Figures
from dspex_kernels.sessions.happenings import (
    CallEnded,
    Happening,
    KernelRecycled,
    KernelStarted,
    Listeners,
    OfSession,
    SessionCreated,
    SessionMigrated,
)


class Service:
    """What the metrics ask of a service: somebody who tells, and figures."""

    def __init__(self) -> None:
        self.listeners = Listeners(logging.getLogger("tests.metrics"))
        self.figures = Figures()
        self.listeners.add(self.figures.take)


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(service: Service, registry: CollectorRegistry) -> Iterator[PrometheusMetrics]:
    metrics = PrometheusMetrics(service, registry)
    yield metrics
    metrics.detach()


def scraped(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """Each sample of a scrape, by its name and its labels' values; without the times of their making."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created") or sample.name == "dspex_sessions_created_total"
    }


def call(**fields: object) -> CallEnded:
    told = {"backend": "pooled", "session_id": "s-4711", "owner": "alice", "command": "execute_program"}
    return CallEnded(**{**told, "outcome": "ok", "duration_s": 0.3, **fields})


def test_calls_are_counted_by_command_and_outcome_and_timed(service, registry, metrics):
    service.listeners.tell(call(kernel_id="k-4711", request_id="r-4711", queue_wait_s=0.02))
    service.listeners.tell(call(duration_s=40.0))
    service.listeners.tell(call(outcome="rate_limit"))
    service.listeners.tell(call(backend="dedicated", command="ping"))
    shown = scraped(registry)
    assert shown["dspex_calls_total", "pooled", "execute_program", "ok"] == 2
    assert shown["dspex_calls_total", "pooled", "execute_program", "rate_limit"] == 1
    assert shown["dspex_calls_total", "dedicated", "ping", "ok"] == 1
    assert shown["dspex_call_seconds_count", "pooled", "execute_program"] == 3
    assert shown["dspex_call_seconds_sum", "pooled", "execute_program"] == pytest.approx(40.6)
    assert shown["dspex_call_seconds_bucket", "pooled", "execute_program", "0.5"] == 2
    assert shown["dspex_call_seconds_bucket", "pooled", "execute_program", "60.0"] == 3
    assert shown["dspex_call_queue_seconds_sum", "pooled"] == pytest.approx(0.02)


def test_labels_are_of_bounded_number_and_name_nobody(service, registry, metrics):
    for number in range(1000):
        service.listeners.tell(
            call(session_id=f"s-{number}", owner=f"alice-{number}", kernel_id=f"k-{number}", outcome=f"c-{number}")
        )
        service.listeners.tell(call(command=f"command-{number}"))
        service.listeners.tell(KernelRecycled(backend="pooled", kernel_id=f"k-{number}", reason=f"r-{number}"))
    shown = scraped(registry)
    assert shown["dspex_calls_total", "pooled", "execute_program", "other"] == 1000
    assert shown["dspex_calls_total", "pooled", "other", "ok"] == 1000
    assert shown["dspex_kernels_recycled_total", "pooled", "other"] == 1000
    text = generate_latest(registry).decode()
    assert not [name for name in ("alice", "s-1", "k-1", "c-1", "r-1", "command-1") if name in text]
    assert len(shown) < 200


def test_every_kind_of_happening_has_its_counter(service, registry, metrics):
    values = {"generation": 2, "duration_s": 1.0}
    for kind in COUNTERS:
        names = set(kind.__dataclass_fields__)
        service.listeners.tell(kind(**{name: values.get(name, "x") for name in names} | {"backend": "pooled"}))
    service.listeners.tell(KernelStarted(backend="pooled", kernel_id="k", duration_s=0.7))
    service.listeners.tell(KernelRecycled(backend="pooled", kernel_id="k", reason="age"))
    shown = scraped(registry)
    for name, _ in COUNTERS.values():
        assert shown[f"{name}_total", "pooled"] == 1, name
    assert shown["dspex_kernel_start_seconds_count", "pooled"] == 1
    assert shown["dspex_kernel_start_seconds_bucket", "pooled", "1.0"] == 1
    assert shown["dspex_kernels_recycled_total", "pooled", "age"] == 1
    kinds = {cls for cls in vars(happenings).values() if isinstance(cls, type) and issubclass(cls, Happening)}
    assert kinds == {*COUNTERS, CallEnded, KernelStarted, KernelRecycled, Happening, OfSession}


def test_sessions_and_the_pool_are_read_when_they_are_scraped(service, registry, metrics):
    pool = {"size": 4, "available": 4, "failed": {"3": "it dies at once"}, "memory_bytes": 10**9}
    service.figures.watch("pooled", lambda: pool)
    service.figures.moved("pooled", None, SessionStatus.STARTING)
    assert scraped(registry)["dspex_sessions", "pooled", "starting"] == 1
    service.figures.moved("pooled", SessionStatus.STARTING, SessionStatus.READY)
    pool["available"] = 3
    shown = scraped(registry)
    assert shown["dspex_sessions", "pooled", "starting"] == 0
    assert shown["dspex_sessions", "pooled", "ready"] == 1
    assert shown["dspex_pool_kernels_available", "pooled"] == 3
    assert shown["dspex_pool_memory_bytes", "pooled"] == 1e9
    assert ("dspex_pool_calls_waiting", "pooled") not in shown, "the pool does not tell it here"


def test_a_registry_takes_one_service_and_another_after_it_detached(service, registry):
    first = PrometheusMetrics(service, registry)
    with pytest.raises(ValueError, match="dspex_calls"):
        PrometheusMetrics(Service(), registry)
    service.listeners.tell(SessionCreated(backend="pooled", session_id="s"))
    first.detach()
    first.detach()
    service.listeners.tell(SessionCreated(backend="pooled", session_id="s"))
    assert generate_latest(registry) == b""
    assert service.figures.read()["backends"]["pooled"]["totals"]["sessions_created"] == 2
    second = PrometheusMetrics(service, registry)
    service.listeners.tell(SessionMigrated(backend="dedicated", session_id="s", previous="pooled"))
    shown = scraped(registry)
    assert shown["dspex_sessions_migrated_total", "dedicated"] == 1
    assert ("dspex_sessions_created_total", "pooled") not in shown
    second.detach()


def test_without_prometheus_client_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from dspex_kernels import errors\n"
        "try:\n    import dspex_kernels.metrics\n"
        "except errors.DependencyMissing as failure:\n    print(failure.code, failure.message)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("dependency_missing")
    assert "pip install 'dspex-kernels[metrics]'" in done.stdout
