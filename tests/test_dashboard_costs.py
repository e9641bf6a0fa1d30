"""No page of the dashboard reads more than a bounded number of blocks, however many tasks there are."""

from __future__ import annotations

import importlib.util

import pytest
from pages import ROOT

pytestmark = pytest.mark.slow

SPEC = importlib.util.spec_from_file_location("dashboard_costs", ROOT / "benchmarks" / "dashboard.py")
costs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(costs)

ROWS = 100_000
"""`python -m benchmarks.dashboard` does the same with five million."""


@pytest.mark.parametrize("queues", [5, 25])
def test_no_page_reads_more_than_2000_blocks(engine, queues):
    costs.fill(engine, ROWS)
    if queues > 5:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(f"UPDATE apoq_tasks SET queue = 'queue ' || mod(id, {queues})")
            connection.exec_driver_sql("VACUUM FULL ANALYZE apoq_tasks")
            connection.exec_driver_sql("VACUUM apoq_tasks")

    found = list(costs.measure(engine, ROWS))

    assert [cost for cost in found if cost.status != 200] == []
    assert [cost for cost in found if cost.buffers > costs.MOST_BUFFERS] == []
    assert [cost for cost in found if cost.statements > 40] == []
