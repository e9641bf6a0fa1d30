"""The import example, installed from the wheel, with 10,000 rows and a worker that is killed half-way."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from applications.harness import Process, Site, free_port, until
from applications.imports import (
    EXAMPLE,  # noqa: F401 - the fixture `application` installs it
    LARGEST,
    Imported,
    Importing,
    ImportScenario,
    ImportSite,
    make_broken_orders,
    make_orders,
)

pytestmark = pytest.mark.slow

ROWS = 10_000

LOCKED_OUT = """
    SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE 'INSERT INTO customers%'
"""
"""The sessions that wait for the customer whose row the test holds."""


@pytest.fixture(scope="module")
def imported(importing: Importing, worker: Process, start_worker: Callable[[], Process]) -> Imported:
    with importing.held_customer(LARGEST):
        imported = importing.upload(make_orders(ROWS), worker)
        importing.until_rows(imported, ROWS // 2)
        until(lambda: importing.rows(LOCKED_OUT), what="a task waits in its transaction", alive=worker)
        worker.kill()
        imported.killed_at = time.monotonic()
    imported.looks.append(importing.site.look(imported.id))
    imported.worker = start_worker()
    importing.until_ended(imported)
    return imported


@pytest.fixture(scope="module")
def broken(importing: Importing, imported: Imported) -> Imported:
    broken = importing.upload(make_broken_orders(ROWS), imported.worker)
    importing.until_ended(broken)
    return broken


def unfinished(importing: Importing, imported: Imported) -> list[int]:
    """Return the ids of the tasks of the largest customer that have begun, and have not ended."""
    calls = importing.calls.read(imported.id)
    return [call.id for call in calls if call.customer == LARGEST and call.end is None]


class TestTheImport(ImportScenario):
    def test_the_worker_was_killed_half_way(self, importing, imported):
        at_kill = next(look for look in imported.looks if look.done >= ROWS // 2)

        assert at_kill.done < ROWS
        assert at_kill.state == "running"

    def test_the_task_that_was_killed_in_its_transaction_ran_again(self, importing, imported):
        (killed,) = unfinished(importing, imported)

        first, second = (call for call in importing.calls.read(imported.id) if call.id == killed)
        assert first.end is None
        assert second.begin > imported.killed_at
        assert second.end is not None

    def test_its_history_and_its_models_agree(self, application, variables):
        assert "No new upgrade operations" in application.run(["flask", "db", "check"], **variables)

    def test_one_command_starts_everything(self, application):
        port = free_port()
        program = application.start(
            ["python", f"examples/{application.folder.name}"], cwd=application.folder.parent.parent, PORT=port
        )

        with ExitStack() as stack:
            stack.callback(program.end)
            site = Site(port, stack)
            until(site.responds, what="the site responds", alive=program)
            imports = ImportSite(site)
            import_id = imports.upload(make_broken_orders(100))
            until(lambda: imports.look(import_id).state == "failed", what="the import fails", alive=program)
            until(lambda: "Import 1 has failed" in program.output(), what="a mail", alive=program)
            program.interrupt()
            program.wait()
