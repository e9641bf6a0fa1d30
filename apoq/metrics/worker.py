"""The metrics that a worker exports of itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from apoq.core.worker_state import WorkerState
from apoq.errors import glimpse
from apoq.events import Events
from apoq.metrics.histogram import merged
from apoq.metrics.tally import OTHER, OUTCOMES, RESCUED, Runs, Series, Tally


class WorkerMetrics(Collector):
    """The metrics of one worker; it reads counters in memory, and never the database."""

    def __init__(self, tally: Tally, state: Callable[[], WorkerState]) -> None:
        self._tally = tally
        self._state = state

    def describe(self) -> Iterable[Metric]:
        """Return the families without samples, by which the registry finds duplicates."""
        return self._families()

    def collect(self) -> Iterator[Metric]:
        """Return all families."""
        state = self._state()
        families = self._families()
        outcomes, seconds, waits, slots, busy, claims, claim_seconds, conflicts, age, connected = families
        for (series, outcome), count in sorted(self._outcomes(state).items()):
            outcomes.add_metric([*series, outcome], count)
        for series, runs in sorted(self._runs(state).items()):
            seconds.add_metric(series, *merged(each.seconds for each in runs))
            waits.add_metric(series, *merged(each.wait_seconds for each in runs))
        slots.add_metric((), state.slots)
        busy.add_metric((), state.busy)
        claims.add_metric((), sum(self._tally.claims.counts))
        claim_seconds.add_metric((), *merged([self._tally.claims]))
        conflicts.add_metric((), state.place_conflicts)
        age.add_metric((), state.heartbeat_age)
        connected.add_metric((), float(state.is_connected))
        yield from families

    def _outcomes(self, state: WorkerState) -> dict[tuple[Series, str], int]:
        """Return the counts of all known series, which are zero from the start."""
        found = {(series, outcome): 0 for series in state.series for outcome in OUTCOMES}
        found[(OTHER, OTHER), RESCUED] = 0
        for (outcome, series), count in self._tally.outcomes().items():
            key = _known(series, state), outcome
            found[key] = found.get(key, 0) + count
        return found

    def _runs(self, state: WorkerState) -> dict[Series, list[Runs]]:
        found: defaultdict[Series, list[Runs]] = defaultdict(list, {series: [] for series in state.series})
        for series, runs in self._tally.runs():
            found[_known(series, state)].append(runs)
        return found

    @staticmethod
    def _families() -> tuple[
        CounterMetricFamily,
        HistogramMetricFamily,
        HistogramMetricFamily,
        GaugeMetricFamily,
        GaugeMetricFamily,
        CounterMetricFamily,
        HistogramMetricFamily,
        CounterMetricFamily,
        GaugeMetricFamily,
        GaugeMetricFamily,
    ]:
        by = ["queue", "type"]
        return (
            CounterMetricFamily(
                "apoq_tasks", "Attempts of tasks by outcome, since the worker began.", labels=[*by, "outcome"]
            ),
            HistogramMetricFamily("apoq_task_seconds", "Duration of attempts.", labels=by),
            HistogramMetricFamily(
                "apoq_task_wait_seconds", "Time from when a task was due until it began.", labels=by
            ),
            GaugeMetricFamily("apoq_slots", "Tasks that the worker can run at once.", labels=()),
            GaugeMetricFamily("apoq_slots_busy", "Tasks that it runs now.", labels=()),
            CounterMetricFamily("apoq_claims", "Claims of tasks from the database.", labels=()),
            HistogramMetricFamily("apoq_claim_seconds", "Duration of claims.", labels=()),
            CounterMetricFamily(
                "apoq_place_conflicts",
                "Claims repeated because another worker had just given away the same place of a key or type.",
                labels=(),
            ),
            GaugeMetricFamily(
                "apoq_heartbeat_age_seconds", "Time since the worker's last heartbeat.", labels=()
            ),
            GaugeMetricFamily("apoq_connected", "Whether the worker reaches the database.", labels=()),
        )


def check(metrics: object, name: str) -> None:
    """Raise `TypeError` if this is neither True nor a registry; `name` is the option or setting."""
    if metrics is not True and not isinstance(metrics, CollectorRegistry):
        raise TypeError(f"{name} must be True, False or a CollectorRegistry, got {glimpse(metrics)}")


def observe(
    metrics: Any, events: Events, state: Callable[[], WorkerState], *, has_one_queue: bool
) -> tuple[Tally, CollectorRegistry]:
    """Return what a worker has to tell for its metrics, and the registry that has them.

    `metrics` is that registry, or True for a new one.
    """
    registry = CollectorRegistry() if metrics is True else metrics
    tally = Tally(has_one_queue=has_one_queue)
    try:
        registry.register(WorkerMetrics(tally, state))
    except ValueError as error:
        raise ValueError(
            "metrics must be a registry without the metrics of another worker: give each worker of this "
            "process a CollectorRegistry of its own, or True"
        ) from error
    tally.listen(events)
    return tally, registry


def _known(series: Series, state: WorkerState) -> Series:
    queue, _ = series
    return series if series in state.series or series == (OTHER, OTHER) else (queue, OTHER)
