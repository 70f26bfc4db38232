"""Prometheus metrics of a service, attached as a listener: the service itself knows nothing of them.

``PrometheusMetrics(service)`` counts what happens and shows, when it is scraped, how many sessions there are and
what the pool tells of itself. Labels are of bounded number: no session, owner or kernel is among them, and what is
not known by its name is ``other``. Importing this module needs ``prometheus_client``, the extra ``metrics``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, get_args

from dspex_kernels import errors
from dspex_kernels.sessions import happenings
from dspex_kernels.sessions.figures import Figures
from dspex_kernels.sessions.happenings import OTHER, Listeners, RecycleReason, known_command, known_outcome

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, Metric
    from prometheus_client.core import GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError as missing:
    raise errors.DependencyMissing(
        "metrics need the package prometheus_client: pip install 'dspex-kernels[metrics]'",
        details={"package": "prometheus_client", "extra": "metrics"},
    ) from missing

CALL_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""Seconds: from a command that reaches no LM to a program of many requests."""
WAIT_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""Seconds in the pool's queue, up to the default ``KernelPool.queue_timeout``."""
START_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Seconds: from a kernel that stood by to one that imports DSPy on a busy machine."""

COUNTERS: dict[type[happenings.Happening], tuple[str, str]] = {
    happenings.SessionCreated: ("dspex_sessions_created", "Sessions that began."),
    happenings.SessionDestroyed: ("dspex_sessions_destroyed", "Sessions that ended for good."),
    happenings.SessionRestored: ("dspex_sessions_restored", "Sessions that were given another place."),
    happenings.SessionHibernated: (
        "dspex_sessions_hibernated",
        "Sessions that were put to rest, or lost their place.",
    ),
    happenings.SessionMigrated: ("dspex_sessions_migrated", "Sessions that moved here from another backend."),
    happenings.SessionFailed: ("dspex_sessions_failed", "Sessions that could not be given a place."),
    happenings.ReplyLate: ("dspex_late_replies", "Replies whose caller had been answered or had left."),
    happenings.PoolSaturated: ("dspex_saturations", "Calls that were refused, for too many waited."),
    happenings.KernelDied: ("dspex_kernels_died", "Kernels that ended unasked."),
}
"""What is counted by backend alone. (Prometheus adds ``_total`` to each name.)"""

POOL_GAUGES = {
    "size": ("dspex_pool_size", "Kernels that the pool is meant to have."),
    "available": ("dspex_pool_kernels_available", "Kernels of the pool that serve."),
    "starting": ("dspex_pool_kernels_starting", "Kernels of the pool that start."),
    "retiring": ("dspex_pool_kernels_retiring", "Kernels of the pool that take no new sessions."),
    "waiting": ("dspex_pool_calls_waiting", "Calls that wait for their turn."),
    "memory_bytes": ("dspex_pool_memory_bytes", "Resident memory of the pool's kernels."),
}
"""Which of a backend's readings are shown, and how."""

_REASONS = frozenset(get_args(RecycleReason))


class Measured(Protocol):
    """What is asked of a service."""

    @property
    def listeners(self) -> Listeners:
        """Who is told what happens."""

    @property
    def figures(self) -> Figures:
        """What the service counts itself."""


class PrometheusMetrics(Collector):
    """The metrics of one service, ``dspex_…``, from here on until ``detach``.

    Args:
        service: Whose.
        registry: Where they are registered, one service's in each; None is Prometheus's own.

    Raises:
        ValueError: The registry has such metrics already: another service's, or this one's.
    """

    def __init__(self, service: Measured, registry: CollectorRegistry | None = None) -> None:
        self._service = service
        self._registry: CollectorRegistry | None = REGISTRY if registry is None else registry
        by_backend = ["backend"]
        self._counters = {
            kind: Counter(name, text, by_backend, registry=None) for kind, (name, text) in COUNTERS.items()
        }
        self._calls = Counter("dspex_calls", "Calls that ended.", ["backend", "command", "outcome"], registry=None)
        self._call_seconds = Histogram(
            "dspex_call_seconds",
            "Seconds from a call's coming in to its answer.",
            ["backend", "command"],
            buckets=CALL_BUCKETS,
            registry=None,
        )
        self._queue_seconds = Histogram(
            "dspex_call_queue_seconds",
            "Seconds that a call waited for its turn.",
            by_backend,
            buckets=WAIT_BUCKETS,
            registry=None,
        )
        self._start_seconds = Histogram(
            "dspex_kernel_start_seconds",
            "Seconds from a kernel's launch to its first answer.",
            by_backend,
            buckets=START_BUCKETS,
            registry=None,
        )
        self._recycled = Counter(
            "dspex_kernels_recycled", "Kernels that were retired.", ["backend", "reason"], registry=None
        )
        self._registry.register(self)
        service.listeners.add(self._take)

    def detach(self) -> None:
        """Count no more, and take the metrics out of the registry. A second time nothing happens."""
        self._service.listeners.remove(self._take)
        if self._registry is not None:
            self._registry.unregister(self)
            self._registry = None

    def collect(self) -> Iterator[Metric]:
        """What there is to show. Called by the registry at each scrape, in the scraper's thread."""
        families = (*self._counters.values(), self._calls, self._call_seconds, self._queue_seconds)
        for family in (*families, self._start_seconds, self._recycled):
            yield from family.collect()
        yield self._sessions()
        yield from self._pool()

    def describe(self) -> Iterator[Metric]:
        """Which metrics these are. Called by the registry when they are registered, to see whether they are new."""
        return self.collect()

    def _take(self, happening: happenings.Happening) -> None:
        """Called with each happening."""
        backend = happening.backend
        match happening:
            case happenings.CallEnded():
                command = known_command(happening.command)
                self._calls.labels(backend, command, known_outcome(happening.outcome)).inc()
                self._call_seconds.labels(backend, command).observe(happening.duration_s)
                self._queue_seconds.labels(backend).observe(happening.queue_wait_s)
            case happenings.KernelStarted():
                self._start_seconds.labels(backend).observe(happening.duration_s)
            case happenings.KernelRecycled():
                reason = happening.reason if happening.reason in _REASONS else OTHER
                self._recycled.labels(backend, reason).inc()
            case _:
                if (counter := self._counters.get(type(happening))) is not None:
                    counter.labels(backend).inc()

    def _sessions(self) -> Metric:
        family = GaugeMetricFamily("dspex_sessions", "Sessions by status.", labels=["backend", "status"])
        for backend, counts in self._service.figures.sessions().items():
            for status, count in counts.items():
                family.add_metric([backend, status], count)
        return family

    def _pool(self) -> Iterator[Metric]:
        readings = self._service.figures.readings()
        for reading, (name, text) in POOL_GAUGES.items():
            family = GaugeMetricFamily(name, text, labels=["backend"])
            for backend, told in readings.items():
                if reading in told:
                    family.add_metric([backend], told[reading])
            yield family
