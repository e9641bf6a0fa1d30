"""What counting for Prometheus costs a worker."""

from __future__ import annotations

from statistics import median

from benchmarks.features.laboratory import Crew, Figure, Laboratory, rate

ROUNDS = 6


def metrics(laboratory: Laboratory) -> list[Figure]:
    """Run tasks with metrics, which are scraped twice a second, and without, in turn."""
    laboratory.clear()
    count = laboratory.size(100_000, 2_000)
    found: dict[bool, list[float]] = {False: [], True: []}
    for has_metrics in (False, True, True, False) * (ROUNDS // 2):
        laboratory.execute("TRUNCATE apoq_tasks")
        laboratory.add("plain", range(count))
        laboratory.settle()
        crew = Crew({"plain": 0.0}, has_metrics=has_metrics)
        found[has_metrics].append(rate(laboratory.run(crew, wait_for={"plain": count})))
    without, with_metrics = median(found[False]), median(found[True])
    return [
        Figure("without metrics", without, "tasks/s"),
        Figure("with metrics", with_metrics, "tasks/s"),
        Figure("with / without", with_metrics / without, "times", "at least 0.98"),
    ]
