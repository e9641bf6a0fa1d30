"""All scenarios, in the order in which they are shown."""

from benchmarks.scenario import Scenario
from benchmarks.scenarios import cost, drain, enqueue, fronts, held, latency

SCENARIOS: tuple[Scenario, ...] = (
    *enqueue.SCENARIOS,
    *drain.SCENARIOS,
    *latency.SCENARIOS,
    *fronts.SCENARIOS,
    *held.SCENARIOS,
    *cost.SCENARIOS,
)
