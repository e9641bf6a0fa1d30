"""A long transaction in the same database: vacuum can't remove rows that it still sees."""

from __future__ import annotations

import psycopg

from benchmarks.bench import Bench, percentile
from benchmarks.scenario import Scenario
from benchmarks.scenarios.latency import under_rate

PARTS = 10


def held(bench: Bench, name: str) -> dict[str, float]:
    """Hold a snapshot for ten minutes, at 1,000 tasks per second, with autovacuum at its default settings.

    It measures p50 and p99 from commit to start, for each tenth of the time. The limit is the number of dead
    index entries that a claim has to read. The other contenders run for a minute and a half.
    """
    sizes = bench.sizes
    seconds = sizes.held_seconds if name == "apoq" else sizes.others_held_seconds
    part = seconds / PARTS
    with bench.database(name) as database, psycopg.connect(database.url) as holder:
        holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        holder.execute(f"SELECT count(*) FROM {database.who.table}")
        found = under_rate(database, sizes.held_rate, seconds)
        dead = database.value(
            "SELECT n_dead_tup FROM pg_stat_user_tables WHERE relid = %s::regclass", database.who.table
        )
    minutes: list[list[float]] = [[] for _ in range(PARTS)]
    for when, delay in found:
        minutes[min(PARTS - 1, int(when / part))].append(delay)
    figures = {}
    for share in (50, 99):
        values = [percentile(minute, share / 100) for minute in minutes if minute]
        figures[f"p{share} first"] = values[0]
        figures[f"p{share} last"] = values[-1]
        figures |= {f"p{share} part {number}": value for number, value in enumerate(values, 1)}
    figures["last / first p99"] = figures["p99 last"] / figures["p99 first"]
    figures["dead rows"] = dead
    figures["seconds"] = seconds
    return figures


SCENARIOS = (
    Scenario(
        "held_snapshot",
        "commit to start at 1,000 tasks/s with a held snapshot, by tenths of the time",
        "ms",
        held,
        less_is_better=True,
        once=True,
        units={"last / first p99": "", "dead rows": "rows", "seconds": "s"},
    ),
)
