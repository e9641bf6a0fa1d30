"""Runs the attempts of isolated tasks in child processes."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from apoq.client.queue import Queue
from apoq.core.imported import Importable
from apoq.core.outcomes import ProcessDied, Release, Snooze
from apoq.core.registry import Registry
from apoq.core.states import COMPLETED
from apoq.errors import InvalidProcessor, UnsupportedDatabase
from apoq.postgres.connections import is_away
from apoq.postgres.engine_copies import settings_of
from apoq.schema.statements.claim import CLAIM, DATA, TIMEOUT
from apoq.schema.statements.ended import ended as ended_task
from apoq.tracing import untraced, with_trace
from apoq.worker import logs
from apoq.worker.execution.attempt import LOST, IsolatedAttempt
from apoq.worker.execution.completion import Completion
from apoq.worker.execution.deadlines import Deadlines
from apoq.worker.execution.runner import AttemptResult, TaskLost, ended
from apoq.worker.execution.running_task import KNOWN, RunningTask
from apoq.worker.failures import Outage
from apoq.worker.isolation.call import Call
from apoq.worker.isolation.child_process import ChildProcess
from apoq.worker.isolation.messages import Ended, Run, Setup
from apoq.worker.isolation.outcomes import outcome_of
from apoq.worker.isolation.pool import ChildPool

CHILD_RETRY_SECONDS: Final = 5.0
"""Seconds after which a task is tried again for which no child could be started."""

LOCKED_TRIES: Final = 10
"""How often the end of a task is read that another transaction has locked; each waits for a lock_timeout."""


class IsolatedRunner:
    """Runs attempts in the children of a pool; the claim and the lease stay with the worker."""

    def __init__(
        self,
        engine: Engine | AsyncEngine,
        own_engine: Engine,
        queues: tuple[Queue, ...],
        registry: Registry,
        make_engine: Importable | None,
        outage: Outage,
    ) -> None:
        """`engine` is the one that the worker was given; `own_engine` is for its own statements."""
        self._engine = engine
        self._own_engine = own_engine
        self._queues = queues
        self._registry = registry
        self._make_engine = make_engine
        self.pool = ChildPool(self._start, outage)

    def check(self) -> None:
        """Raise `InvalidProcessor` if a child can't import one of the functions that it needs."""
        isolated = [
            processor.importable
            for queue in self._queues
            for processor in self._registry.of(queue).values()
            if processor.importable is not None
        ]
        if not isolated:
            return
        if os.name != "posix":
            raise InvalidProcessor(
                "isolated tasks need Linux, macOS or another POSIX system: remove isolated=True, or run "
                "their worker on such a system"
            )
        others = [self._make_engine] if self._make_engine else []
        for each in (*isolated, *self._registry.importable_middleware(), *others):
            each.check()

    def run(self, attempt: IsolatedAttempt, completion: Completion, _deadlines: Deadlines) -> AttemptResult:
        """Run an attempt in a child, and wait for it on this thread."""
        row: Mapping[Any, Any] | None = None
        outcome = began_at = result = None
        try:
            attempt.read()
            if attempt.signal is LOST:
                raise TaskLost  # noqa: TRY301 - after it left the line
            if (on_start := attempt.row[CLAIM].on_start) is not None:
                on_start(attempt.row)
                began_at = time.monotonic()
            end = self._run(attempt, self._request(attempt, completion))
            outcome, result = outcome_of(end), end.result
            if end.is_committed:
                row = {"id": attempt.id, "is_followed": end.is_followed}
        except (ProcessDied, TimeoutError) as error:
            outcome = error.with_traceback(None)  # the lines of this module say nothing about the task
        except BaseException as error:  # noqa: BLE001 - as in a processor on a thread
            outcome = error
        if attempt.is_completing:
            if outcome is not None and (row := self._committed(attempt, completion)):
                outcome = None  # the child was killed after the commit
            elif row is not None and completion.has_listeners:
                row = self._committed(attempt, completion) or row
        seconds = None if began_at is None else time.monotonic() - began_at
        return ended(attempt, outcome, row, seconds, result)

    def _run(self, attempt: IsolatedAttempt, request: Run) -> Ended:
        while True:
            child = self._child()
            is_new, child.has_run = not child.has_run, True
            call = Call(attempt, child)
            try:
                end = call.run(request)
            except BaseException:
                child.kill()
                child.close()
                raise
            if end is not None and call.has_begun and call.interrupted_by is None:
                self.pool.give_back(child)
                return end
            died = child.close()
            if attempt.is_cut_off:
                raise Release
            if (reason := call.interrupted_by) is not None:
                if end is not None and end.error is not None:
                    reason.add_note(f"At that time it was here:\n{end.error.report['traceback']}")
                raise reason
            if end is not None:
                return end  # the function could not be imported
            if call.has_begun or is_new:
                raise died
            # An idle child has died, before it read the request: another one runs it.

    def _child(self) -> ChildProcess:
        try:
            return self.pool.take()
        except OSError as error:
            logs.no_child(error, CHILD_RETRY_SECONDS)
            raise Snooze(CHILD_RETRY_SECONDS) from error

    def _request(self, attempt: IsolatedAttempt, completion: Completion) -> Run:
        processor, queue = attempt.processor, attempt.from_queue
        assert processor.importable is not None
        row: list[Any] = list(attempt.row[:CLAIM])
        data = row[DATA] if attempt.has_data else json.dumps(attempt.data)
        row[DATA] = row[TIMEOUT] = None
        encoder = processor.result_encoder
        return Run(
            function=processor.importable.path,
            middleware=[each.path for each in self._registry.importable_middleware()],
            max_result_size=None if encoder is None else encoder.max_size,
            row=row,
            data=data,
            schema=queue.schema,
            max_data_size=queue.max_data_size,
            keeps_completed=completion.keep,
            trace=with_trace({"task_meta": None})["task_meta"],
        )

    def _start(self) -> ChildProcess:
        settings, problem = None, ""
        if self._make_engine is None:
            try:
                settings = settings_of(self._engine)
            except UnsupportedDatabase as error:
                problem = str(error)  # raised by `task.session`, which many isolated tasks don't use
        make_engine = None if self._make_engine is None else self._make_engine.path
        return ChildProcess(Setup(settings, make_engine, problem, logging.getLogger().level))

    def _committed(self, attempt: IsolatedAttempt, completion: Completion) -> Mapping[Any, Any] | None:
        """Return the task's row if its completion was committed, and None if it wasn't, or isn't known.

        If it isn't known, the outcome is written, which has no effect on a completed task.
        """
        statement = ended_task(attempt.from_queue.schema)
        parameters = {"task_id": attempt.id, "held_under": attempt.claim_token}
        for _ in range(LOCKED_TRIES):
            try:
                with untraced(), self._own_engine.begin() as connection:
                    found = connection.execute(statement, parameters).mappings().first()
            except SQLAlchemyError as error:
                if is_away(error):
                    return None
                continue
            if found is None:
                return None if completion.keep else _known(attempt)
            return dict(found) if found["state"] == COMPLETED else None
        return None


def _known(attempt: IsolatedAttempt) -> dict[str, Any]:
    """Return the row of a task that was deleted when it completed, as far as it is known here."""
    task = RunningTask(attempt)
    # Other tasks may have waited for it: then they are looked for.
    return {name: getattr(task, name) for name in KNOWN} | {"state": COMPLETED, "is_followed": True}
