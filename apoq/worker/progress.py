"""Writes the progress that running tasks report."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from apoq.core.progress import Report
from apoq.postgres.connections import execute
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.progress import delete_orphans, mark_parts, write_progress
from apoq.worker import logs
from apoq.worker.circuit_breaker import CircuitBreaker
from apoq.worker.claim_log import ClaimLog
from apoq.worker.database import WorkerDatabase
from apoq.worker.execution.attempt import AnyAttempt
from apoq.worker.service import Service
from apoq.worker.threads import MissingThreads

WRITE_INTERVAL_SECONDS: Final = 1.0
"""Seconds between two writes, which have the last reports of all tasks."""

BATCH_SIZE: Final = 1_000
"""Rows that one statement writes at most. There are more only if thousands of short tasks report progress."""

MAX_TRIES: Final = 5
"""How often a report is written that took no effect: its task may be locked, lost or gone."""


@dataclass(frozen=True, slots=True)
class _Reported:
    report: Report
    tries: int = 1


Reports = dict[AnyAttempt, _Reported]


class ProgressWriter(Service):
    """Collects the reports of running tasks, and writes the last one of each.

    Its thread is started with the first report. The last report of a task is written even if the task has
    ended, unless a worker has claimed the task again since then.
    """

    def __init__(
        self,
        database: WorkerDatabase,
        missing: MissingThreads,
        claim_log: ClaimLog,
        *,
        keeps_completed: bool,
    ) -> None:
        super().__init__("apoq-progress", database.outage)
        self._database = database
        self._missing = missing
        self._claim_log = claim_log
        self._keeps_completed = keeps_completed
        self._breaker: CircuitBreaker[str | None] = CircuitBreaker(_describe, database.outage)
        self._lock = threading.Lock()
        self._reports: Reports = {}
        self._is_open = False
        self._is_idle = True
        self._writes_at = 0.0
        self._writing = threading.Lock()
        self._with_rows: set[AnyAttempt] = set()
        """Attempts whose tasks have a row, which nothing else deletes if completed tasks aren't kept."""

    def put(self, attempt: AnyAttempt, report: Report) -> None:
        """Write this progress soon, unless there is a newer one by then."""
        with self._lock:
            self._reports[attempt] = _Reported(report)
            is_first, self._is_idle = self._is_idle and self._is_open, False
            if is_first:
                try:
                    self.start()
                except RuntimeError as error:
                    self._missing.add(self.start, error)
        if is_first:
            self.wake()

    def open(self) -> None:
        """Write reports on a thread of its own from now on; before, they are only collected."""
        with self._lock:
            self._is_open = self._is_idle = True

    def close(self) -> None:
        """Start no thread any more, because the worker stops."""
        with self._lock:
            self._is_open = False

    def turn(self) -> float | None:
        """Write the last reports, if the time has come; return when to write the next ones."""
        if (left := self._writes_at - time.monotonic()) > 0:
            return left
        self._writes_at = time.monotonic() + WRITE_INTERVAL_SECONDS
        if self.flush():
            return WRITE_INTERVAL_SECONDS
        with self._lock:
            self._is_idle = not self._reports
            return None if self._is_idle else WRITE_INTERVAL_SECONDS

    def after_last_turn(self) -> None:
        """Write the last reports of a worker that stops."""
        self.finish()

    def finish(self) -> None:
        """Write all reports now, and log if that fails."""
        try:
            self.flush()
        except Exception as error:  # noqa: BLE001 - the tasks have ended, and only their progress is missing
            logs.progress_failed(error)

    def flush(self) -> bool:
        """Write all reports now; return whether there was anything to do, or will be soon."""
        with self._writing:
            with self._lock:
                reports, self._reports = self._reports, {}
            has_reports, schemas = bool(reports), {attempt.from_queue.schema for attempt in reports}
            try:
                for schema in schemas:
                    self._breaker.call(schema, schemas, partial(self._write, schema, reports), None)
                self._delete_rows()
            finally:
                with self._lock:
                    self._reports = reports | self._reports  # those that were not written, unless newer
            return has_reports or bool(self._with_rows)

    def _write(self, schema: str | None, reports: Reports) -> None:
        """Write the reports in a schema, and remove those that were written, or never will be."""
        attempts = [attempt for attempt in reports if attempt.from_queue.schema == schema]
        if not self._database.leases[schema].is_held:
            for attempt in attempts:
                del reports[attempt]  # other workers may have these tasks
            return
        attempts.sort(key=lambda attempt: attempt.id)
        for first in range(0, len(attempts), BATCH_SIZE):
            self._write_batch(schema, reports, attempts[first : first + BATCH_SIZE])

    def _write_batch(self, schema: str | None, reports: Reports, attempts: list[AnyAttempt]) -> None:
        if unmarked := [attempt for attempt in attempts if not attempt.has_parts]:
            execute(self._database.engine, mark_parts(schema), _claims_of(unmarked))
        parameters = {
            **_claims_of(attempts),
            "dones": [reports[attempt].report.done for attempt in attempts],
            "totals": [reports[attempt].report.total for attempt in attempts],
            "notes": [reports[attempt].report.note for attempt in attempts],
        }
        written = set(execute(self._database.engine, write_progress(schema), parameters))
        for attempt in attempts:
            if (attempt.id, attempt.claim_token) in written:
                self._written(attempt)
                del reports[attempt]
            elif (tries := reports[attempt].tries) < MAX_TRIES:
                reports[attempt] = replace(reports[attempt], tries=tries + 1)
            else:
                del reports[attempt]

    def _written(self, attempt: AnyAttempt) -> None:
        attempt.has_parts = True
        if not self._keeps_completed:
            self._with_rows.add(attempt)

    def _delete_rows(self) -> None:
        """Delete the rows of tasks that were deleted on their completion."""
        ended = [attempt for attempt in self._with_rows if not self._claim_log.holds(attempt.row)]
        for schema in {attempt.from_queue.schema for attempt in ended}:
            ids = array_text(attempt.id for attempt in ended if attempt.from_queue.schema == schema)
            execute(self._database.engine, delete_orphans(schema), {"ids": ids})
        self._with_rows.difference_update(ended)


def _claims_of(attempts: list[AnyAttempt]) -> dict[str, Any]:
    return {
        "ids": array_text(attempt.id for attempt in attempts),
        "tokens": array_text(attempt.claim_token for attempt in attempts),
    }


def _describe(schema: str | None) -> str:
    return "writing progress" if schema is None else f"writing progress in the schema {schema!r}"
