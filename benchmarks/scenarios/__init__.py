"""All scenarios, in the order in which they are shown."""

from benchmarks.scenario import Scenario
from benchmarks.scenarios import cost, drain, enqueue, fronts, held, latency, many, steady

SCENARIOS: tuple[Scenario, ...] = (
    *enqueue.SCENARIOS,
    *drain.SCENARIOS,
    *latency.SCENARIOS,
    *steady.SCENARIOS,
    *fronts.SCENARIOS,
    *held.SCENARIOS,
    *cost.SCENARIOS,
    *many.SCENARIOS,
)
