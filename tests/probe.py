"""What tests may see and do inside a worker.

The only module of the tests that reaches into private attributes: if one is renamed, only this changes.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.pool import PoolProxiedConnection

from apoq import AsyncRunningTask, Queue, RunningTask, Worker
from apoq.cli.stats import _figures as stats_figures  # noqa: F401
from apoq.client import shared_tasks
from apoq.client.after_commit import _notifiers
from apoq.client.notifier import Notifier
from apoq.client.session_adapters import _compiled as compiled  # noqa: F401
from apoq.core.places import Share
from apoq.dashboard.asgi_face import _body as asgi_body  # noqa: F401
from apoq.dashboard.wsgi_face import _body as wsgi_body  # noqa: F401
from apoq.embedded import PostgreSQL, _new_folder, _server_user
from apoq.events import Events
from apoq.monitor import server_checks
from apoq.postgres.fast_path import _name as statement_name  # noqa: F401
from apoq.schema.preflight import _read_only as read_only_problems  # noqa: F401
from apoq.schema.statements.levels import is_keyed, level_of, priority_of
from apoq.schema.statements.results import complete_last_with_result
from apoq.schema.statements.settle import complete_last, remove_last
from apoq.worker.claim_log import ClaimLog
from apoq.worker.claiming.claimer import Claimer
from apoq.worker.claiming.cursor import ClaimCursor
from apoq.worker.claiming.listener import Listener
from apoq.worker.claiming.scanner import QueueScanner
from apoq.worker.execution import completion
from apoq.worker.execution.attempt import AnyAttempt, Claimed, StopSignal
from apoq.worker.execution.event_loop import EventLoopThread
from apoq.worker.execution.executor import Executor
from apoq.worker.execution.runner import AttemptResult
from apoq.worker.lease import Lease
from apoq.worker.lifecycle import Lifecycle
from apoq.worker.liveness.heartbeat import Heartbeat
from apoq.worker.process import PROCESS
from apoq.worker.runtime import Runtime
from apoq.worker.service import Service
from apoq.worker.settling.result_writer import write_settlements
from apoq.worker.settling.settler import Settler
from apoq.worker.settling.unblocking import Ends, no_ends

new_folder, server_user = _new_folder, _server_user
flavour = server_checks._flavour


# A worker and its parts.


def lifecycle(worker: Worker) -> Lifecycle:
    """Return the part that registers a worker."""
    return worker._lifecycle


def runtime(worker: Worker) -> Runtime:
    """Return the object that holds all other parts."""
    return worker._lifecycle.runtime


def engine(worker: Worker) -> sa.Engine:
    """Return the engine that a worker was made with."""
    return worker._engine


def own_engine(worker: Worker) -> sa.Engine:
    """Return the engine of the worker's own connections."""
    return runtime(worker).engine


def registry(worker: Worker) -> Any:
    """Return the processors of a worker."""
    return worker._registry


def adjust(worker: Worker, **changes: Any) -> None:
    """Change a worker that hasn't started, as the command line's options do."""
    worker._adjust(**changes)


def claimer(worker: Worker) -> Claimer:
    return runtime(worker).claimer


def scanner(worker: Worker) -> QueueScanner:
    return runtime(worker).scanner


def settler(worker: Worker) -> Settler:
    return runtime(worker).settlers.plain


def listener(worker: Worker) -> Listener:
    return runtime(worker).listener


def executor(worker: Worker) -> Executor:
    return runtime(worker).executor


def is_closed(executor: Executor) -> bool:
    """Return whether no more tasks begin, because the worker stops."""
    return executor._is_closed


def event_loop(worker: Worker) -> EventLoopThread:
    return runtime(worker).event_loop


def heartbeat(worker: Worker) -> Heartbeat:
    return runtime(worker).heartbeat


def worker_id(worker: Worker) -> UUID:
    """Return the id of a worker's row."""
    return lifecycle(worker).worker_id


def claim_log(worker: Worker) -> ClaimLog:
    return runtime(worker).claim_log


def attempt_of(task: RunningTask | AsyncRunningTask) -> AnyAttempt:
    """Return the worker's part of a running task."""
    return task._attempt


# Its life.


def is_started_in_process(worker: Worker) -> bool:
    """Return whether the process has a worker on its list of those that have started."""
    return worker in PROCESS._started


def is_busy_starting_or_stopping(worker: Worker) -> bool:
    """Return whether another thread starts or stops a worker."""
    lock = lifecycle(worker)._lock
    if lock.acquire(blocking=False):
        lock.release()
        return False
    return True


@contextmanager
def held_up(owner: Any, method: str = "turn") -> Iterator[threading.Event]:
    """Let the next call of a method wait until the end of the block; yield an event that is set meanwhile."""
    original, is_held_up, may_go_on = getattr(owner, method), threading.Event(), threading.Event()

    def wait(*arguments: Any) -> Any:
        is_held_up.set()
        may_go_on.wait(60)
        return original(*arguments)

    setattr(owner, method, wait)
    try:
        yield is_held_up
    finally:
        setattr(owner, method, original)
        may_go_on.set()


@contextmanager
def recorded_stop(worker: Worker) -> Iterator[list[float]]:
    """Record how long the worker waits for its tasks when it stops."""
    its: Any = lifecycle(worker)
    waits: list[float] = []
    stop = its.stop
    its.stop = lambda timeout: waits.append(timeout) or stop(timeout)
    yield waits
    its.stop = stop


def timeout_of(lifespan: Any) -> float:
    """Return how long a FastAPI application waits for its worker's tasks."""
    return lifespan._timeout


def is_entering(worker: Worker) -> bool:
    """Return whether a worker is about to be registered."""
    return lifecycle(worker)._is_registering


def stop_heartbeat(worker: Worker) -> None:
    """Stop the thread that renews the leases."""
    runtime(worker).registration.stop()


def leases(worker: Worker) -> Mapping[str | None, Lease]:
    return heartbeat(worker).leases


def lease(worker: Worker, schema: str | None = None) -> Lease:
    return heartbeat(worker).leases[schema]


def end_lease(worker: Worker, schema: str | None = None) -> None:
    """Let a lease end now, unnoticed, as if the process had been frozen."""
    lease(worker, schema).ends_at = time.monotonic()


def lose_leases(worker: Worker, schemas: list[str | None]) -> None:
    """Let the worker notice that these leases have ended."""
    runtime(worker)._lapsed(schemas)


def stop_signal(worker: Worker, schema: str | None = None) -> StopSignal:
    """Return the signal that makes `should_stop` of a schema's tasks true."""
    return runtime(worker)._signals[schema]


def prune(worker: Worker) -> None:
    """Delete or end a batch of each kind."""
    runtime(worker)._pruner.prune()


def sweep(worker: Worker) -> None:
    """Look once more for tasks that are running and that no claim has noted."""
    runtime(worker).sweep.turn()


def sweep_links(worker: Worker) -> None:
    """Let a worker that has not started look at all edges, as a pass of its sweep does."""
    unblocker = runtime(worker).unblocker
    for schema, sweep in unblocker._sweeps.items():
        ends = no_ends()
        is_over = False
        while not is_over:
            found = (set(), set(), set())
            is_over = sweep._walk(found)
            ends.update(Ends(*found))
        unblocker._schemas[schema].ends.update(ends)
    unblocker.turn()
    own_engine(worker).dispose()


def sweep_level(worker: Worker, schema: str | None = None) -> object:
    """Return how far the sweep has got; None after its last page."""
    return runtime(worker).sweep._passes[schema].level


# Its threads.


def lacks_threads(worker: Worker) -> bool:
    """Return whether threads could not be started yet."""
    return bool(runtime(worker).missing)


def end_claimers_thread(worker: Worker) -> None:
    """Let the claimer's thread end at its next turn, for which it is woken."""
    runtime_: Any = runtime(worker)
    runtime_.claimer.turn = lambda: sys.exit("enough")
    look_for_tasks(worker)


@contextmanager
def failing_settler(worker: Worker, error: Exception) -> Iterator[None]:
    """Let each turn of the settler raise this."""
    its: Any = settler(worker)
    turn = its.turn

    def fail() -> None:
        raise error

    its.turn = fail
    its.wake()
    try:
        yield
    finally:
        its.turn = turn


def settler_failures(worker: Worker) -> int:
    """Return how many turns of the settler have failed, one after the other."""
    return settler(worker)._failures.count


def is_claiming(worker: Worker) -> bool:
    """Return whether a turn of the claimer is under way, on whatever thread."""
    return claimer(worker)._turning.locked()


def knows_of_pause(worker: Worker) -> bool:
    """Return whether the worker was notified that one of its queues is paused."""
    return bool(runtime(worker).intake._paused_at)


def event_loop_thread(worker: Worker) -> threading.Thread | None:
    return event_loop(worker)._thread


def asyncio_loop(worker: Worker) -> asyncio.AbstractEventLoop | None:
    return event_loop(worker)._loop


# Claiming.


def look_for_tasks(worker: Worker) -> None:
    runtime(worker).look_for_tasks()


def claim(worker: Worker, limit: int, free: int) -> list[Claimed]:
    """Claim from all queues of a worker."""
    its = claimer(worker)
    its.look_for_tasks()
    return its.claim(limit, free)


def has_split_claims(worker: Worker) -> bool:
    """Return whether the worker claims with several statements, because Citus refused a single one."""
    return None in claimer(worker)._schemas[None]._statement._sharded


def has_looked(worker: Worker) -> bool:
    """Return whether the claimer has nothing more to look for."""
    return not claimer(worker)._rotation


def rests_until(worker: Worker) -> float:
    """Return the end of the claimer's pause after its last claim, by time.monotonic(); 0 before the first."""
    return claimer(worker)._rested_at


def is_scanner_asleep(worker: Worker, seconds: float = 60.0) -> bool:
    """Return whether the scanner looks into no queue for so long."""
    return scanner(worker)._looks.next_look > time.monotonic() + seconds


def scanner_rests_until(scanner: QueueScanner, *, known: bool = False) -> float:
    """Return the end of a scanner's pause after its last survey, by time.monotonic().

    `known`: after one that need not have been of all priorities.
    """
    return scanner._rests[known].until


def is_idle(worker: Worker) -> bool:
    """Return whether neither claimer nor scanner looks for tasks for a minute, unless they are woken."""
    return has_looked(worker) and is_scanner_asleep(worker)


def cursors(worker: Worker) -> list[ClaimCursor]:
    """Return the cursors of the queues, in their order."""
    return [queue.cursor for queue in claimer(worker)._queues.values()]


def levels(cursor: ClaimCursor) -> dict[int, tuple[float, int]]:
    """Return how far a cursor is in each priority."""
    return {priority_of(level): position for level, position in cursor._levels.items() if not is_keyed(level)}


def move(cursor: ClaimCursor, levels: Mapping[int, tuple[float, int]]) -> None:
    """Move a cursor to these places."""
    cursor._be_at({level_of(priority, is_keyed=False): position for priority, position in levels.items()})


def deferred(worker: Worker) -> list[Any]:
    """Return what the claimer has yet to do after its claims."""
    return claimer(worker)._deferred


def declare_limits(worker: Worker) -> None:
    """Write the limits that a worker's code declares, as before its first claim."""
    runtime(worker).claimer._declared_limits.forget()
    runtime(worker).claimer._declared_limits.write()


def claim_placed(worker: Worker, limit: int) -> None:
    """Claim due tasks under limits, with keys and without, for so many free slots."""
    its = runtime(worker)
    its.scanner.survey()
    for lines in (its.claimer._keyed, its.claimer._queues):
        for line in lines.values():
            if line.needs_places:
                placed = its.claimer._schemas[None]._placed.claim(line, limit, limit)
                line.cursor.move_to(placed.ends, is_all=False)


def claims_of_free_places(worker: Worker) -> Any:
    """Return the object whose method `hand_over` is a transaction that hands over places."""
    return runtime(worker).hand_over._claims[None]


def fails_to_hand_over(worker: Worker, queue: Queue) -> bool:
    """Return whether places of a queue could not be handed over the last time."""
    return runtime(worker).hand_over._breaker.is_failing(queue)


def waits_for_room(worker: Worker) -> bool:
    """Return whether the claimer has found no free slot, though there may be due tasks."""
    its = claimer(worker)
    return its._waits_for_room and bool(its._rotation) and its._room()[0] == 0


def hand_over(worker: Worker, freed: Mapping[Share, int], room: int) -> None:
    """Give free places to the tasks that wait for them, up to `room` of them to this worker."""
    its = runtime(worker)
    for line in its.hand_over._queues.values():
        its.hand_over._claims[None].hand_over(line, freed, room, room)


def dispose(worker: Worker) -> None:
    """Close the connections of a worker that has not started."""
    runtime(worker).engine.dispose()


def next_claim_number(worker: Worker) -> int:
    """Take the number that the next claim would have."""
    return next(claim_log(worker)._numbers)


def has_settled_claims(worker: Worker) -> bool:
    """Return whether there are notes of claims to be removed, or tasks in the claims that are noted."""
    return bool(claim_log(worker)._left)


def doubt(worker: Worker, seconds: float = 0.0) -> None:
    """Let a worker suspect, for so long, that a claim has committed whose result it never got."""
    runtime(worker).strays._expected_until = time.monotonic() + seconds


def is_in_doubt(worker: Worker) -> bool:
    return runtime(worker).strays.are_expected


def looked_for_strays_at(worker: Worker) -> float:
    """Return when a worker looked for such a claim, by time.monotonic()."""
    return runtime(worker).strays.looked_at


# Execution and settling.


def make_attempt(worker: Worker, row: Claimed) -> AnyAttempt:
    return executor(worker).attempt_of(row)


def put_ended(worker: Worker, end: AttemptResult) -> None:
    """Give the result of an attempt to the settler."""
    settler(worker).put(end)


def is_executor_closed(worker: Worker) -> bool:
    return executor(worker)._is_closed


def limited_attempts(worker: Worker) -> tuple[Any, Any]:
    """Return the attempts that may meet their time limit, and those that have."""
    deadlines = runtime(worker).deadlines
    return deadlines._until, deadlines._over


def deadlines_thread(worker: Worker) -> threading.Thread | None:
    return runtime(worker).deadlines._thread


def put_off_count(worker: Worker) -> int:
    """Return how many results could not be written because rows are locked."""
    return sum(len(unsettled.ended) for unsettled in settler(worker)._put_off)


def has_in_process_worker(app: Any) -> bool:
    """Return whether a Flask application has started its in-process worker."""
    return app.extensions["apoq"]._in_process._began_in != 0


def forget_bind(app: Any) -> None:
    """Let a Flask application use the database that has no bind key."""
    app.extensions["apoq"].database._bind = None


def locked_schemas(worker: Worker) -> Mapping[str | None, Any]:
    """Return the schemas whose table is locked, with the pauses until it is tried again."""
    return settler(worker)._closed


# Listening.


def listening_connection(worker: Worker) -> Any:
    """Return the connection that a worker listens on, or None."""
    return listener(worker)._connection


def listening_session(worker: Worker) -> int:
    """Return the server's session that gives a started worker its notifications."""
    return listening_connection(worker).pooled.dbapi_connection.info.backend_pid


def is_listening(worker: Worker) -> bool:
    """Return whether the listener has a connection, on its thread."""
    return listener(worker).is_alive and listening_connection(worker) is not None


def awaited(worker: Worker) -> set[tuple[bytes, bytes]] | None:
    """Return what the listener waits for on its connection, or None without one."""
    connection = listening_connection(worker)
    return None if connection is None else set(connection._awaited)


def is_connection_closed(connection: Any) -> bool:
    """Return whether a connection that a worker listened on is closed."""
    return connection._driver.closed


def after_notification(worker: Worker, call: Callable[[], object]) -> None:
    """Call this after each notification."""
    its: Any = claimer(worker)
    notified = its.notified

    def notified_and_call(queues: Iterable[Queue], connection: PoolProxiedConnection | None) -> None:
        notified(queues, connection)
        call()

    its.notified = notified_and_call


def after_listening(worker: Worker, call: Callable[[], object]) -> None:
    """Call this each time that notifications have been found to arrive."""
    its: Any = listener(worker)
    cancelled = its._on_cancelled

    def cancelled_and_call(ids: set[int] | None) -> None:
        cancelled(ids)
        if ids is None:
            call()

    its._on_cancelled = cancelled_and_call


def before_listening(worker: Worker, call: Callable[[], object]) -> None:
    """Call this when a notification has arrived that was sent as a trial, and nobody knows that yet."""
    listener_: Any = listener(worker)
    hears = listener_._receives

    def hears_later(connection: Any) -> bool:
        heard: bool = hears(connection)
        call()
        return heard

    listener_._receives = hears_later


# Lost tasks.


def after_look_for_lost_tasks(worker: Worker, call: Callable[[], object]) -> None:
    """Call this each time that it was looked whether the worker has lost running tasks."""
    monitor: Any = runtime(worker).lost_task_monitor
    look = monitor._look

    def look_and_call(*given: Any) -> Any:
        found = look(*given)
        call()
        return found

    monitor._look = look_and_call


def on_lost_tasks(worker: Worker, call: Callable[[list[Claimed]], object]) -> None:
    """Call this each time, with the tasks that the worker has lost."""
    its: Any = executor(worker)
    recall = its.recall

    def recall_and_call(tasks: list[Claimed]) -> list[Claimed]:
        call(tasks)
        forgotten: list[Claimed] = recall(tasks)
        return forgotten

    its.recall = recall_and_call


# Notifications of workers, after a commit.


def notifier(engine: sa.Engine) -> Notifier:
    """Return the object that sends the notifications of an engine's commits."""
    return _notifiers[engine.pool]


def notifiers() -> Mapping[Any, Notifier]:
    """Return all of them, by their pools."""
    return _notifiers


def pending(engine: sa.Engine) -> bool:
    """Return whether notifications wait for the thread that sends them."""
    return bool(notifier(engine)._pending)


def line(engine: sa.Engine) -> Any:
    """Return the connection on which notifications are sent at once."""
    return notifier(engine)._connection


def line_connection(line: Any) -> Any:
    """Return the pooled connection of such a line, or None while it is closed."""
    return line._pooled


def line_engine(line: Any) -> sa.Engine:
    return line._engine


# The embedded server.


def keeper(server: PostgreSQL) -> Any:
    """Return the process that stops the server when its owner is gone."""
    return server._keeper


# The whole process.


def forget_shared_tasks() -> None:
    """Forget the typed tasks of all queues."""
    shared_tasks._by_queue.clear()


# Its statements.


def settling_statements() -> dict[str, list[sa.Executable]]:
    """Return the statements that write the ends of tasks, with what they return for listeners."""
    both = (False, True)
    return {
        "completion.statement": [
            completion.Completion(Events(), keep=keep).statement(
                None, full=full, alike=alike, skips_locked=skips_locked
            )
            for keep in both
            for full in both
            for alike in both
            for skips_locked in both
        ],
        "completion.statement_with_results": [
            completion.Completion(Events(), keep=True).statement_with_results(
                None, full=full, skips_locked=skips_locked
            )
            for full in both
            for skips_locked in both
        ],
        "completion.write": [
            completion._returning(write(None), None, full=True, is_ours=False)
            for write in (complete_last, remove_last, complete_last_with_result)
        ],
        "completion.with_edges": [
            *(
                completion.Completion(Events(), keep=keep).statement(
                    None, full=full, alike=alike, skips_locked=skips_locked, linked=True
                )
                for keep in both
                for full in both
                for alike in both
                for skips_locked in both
            ),
            *(
                completion._returning(write(None, linked=True), None, full=full, is_ours=False, linked=True)
                for write in (complete_last, remove_last)
                for full in both
            ),
        ],
        "result_writer.write_settlements": [
            write_settlements(None, full=full, skips_locked=skips_locked)
            for full in both
            for skips_locked in both
        ],
    }


# Its ticks.


def has_declared(worker: Worker) -> bool:
    """Return whether a started worker has written all schedules of its code."""
    every = runtime(worker).ticker._schemas.values()
    return all(its.declarations._written for its in every)


def looks_for_ticks(worker: Worker) -> int:
    """Return how often a worker has looked when the next tick is, in all its schemas."""
    return sum(its.looks for its in runtime(worker).ticker._schemas.values())


# Its schemas.


def shard(worker: Worker, schema: str | None = None) -> None:
    """Let a worker's settler believe that Citus shards a schema."""
    settler(worker)._database.sharded.add(schema)


# Its services.


def count_turns(service: Service) -> Callable[[], int]:
    """Return a function that returns how many turns a service has taken since then."""
    turn, seen = service.turn, 0

    def counted() -> float | None:
        nonlocal seen
        seen += 1
        return turn()

    service.turn = counted  # type: ignore[method-assign]
    return lambda: seen


def is_taking(worker: Worker) -> bool:
    """Return whether the slots of a worker take tasks."""
    return not runtime(worker).executor._is_closed
