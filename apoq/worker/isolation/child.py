"""The program of a child process: runs one attempt after the other, as a thread of the worker would."""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Final

from apoq.client.queue import Queue
from apoq.client.typed_task import TypedTask
from apoq.core.imported import imported
from apoq.core.processing import run_processors
from apoq.core.progress import Report
from apoq.core.registry import Processor, Registry
from apoq.core.results import ResultEncoder
from apoq.core.retry import RetryPolicy
from apoq.errors import UnsupportedDatabase
from apoq.events import Events
from apoq.postgres.engine_copies import engine_from
from apoq.postgres.loaders import read_json
from apoq.schema.statements.claim import QUEUE, TYPE, ClaimedTask
from apoq.tracing import in_trace
from apoq.worker.execution.attempt import Attempt, Claim, StopSignal
from apoq.worker.execution.completion import Completion
from apoq.worker.execution.deadlines import Deadlines
from apoq.worker.execution.event_loop import EventLoopThread
from apoq.worker.execution.runner import run
from apoq.worker.execution.task_sessions import TaskSession, TaskSessions
from apoq.worker.failures import Outage
from apoq.worker.isolation import messages
from apoq.worker.isolation.lifeline import end_with
from apoq.worker.isolation.log_records import forward
from apoq.worker.isolation.messages import (
    Begun,
    Completing,
    End,
    FromChild,
    MayComplete,
    Progress,
    Run,
    Setup,
    Stop,
)
from apoq.worker.isolation.outcomes import failure_message, result_message
from apoq.worker.lease import Lease
from apoq.worker.process import PROCESS
from apoq.worker.threads import MissingThreads

PARENT_CHECK_SECONDS: Final = 0.5
"""Seconds between two checks whether the worker is still the parent process.

A process that the worker has forked may hold the other end of the connection open.
"""

EXIT_SECONDS: Final = 1.0
"""Seconds in which a child without a task ends by itself, before it is ended by force."""


class Interrupted(KeyboardInterrupt):
    """The worker ends this process, because the time of its task is up or the task is no longer its own.

    As at Ctrl-C, psycopg cancels the statement that it waits for.
    """


def main(connection: Connection, lifeline: int) -> None:
    """Run attempts until the worker closes the connection."""
    for fd in (connection.fileno(), lifeline):
        os.set_inheritable(fd, False)  # processes that a task starts
    end_with(lifeline)
    with suppress(RuntimeError, ValueError, OSError):  # there is no standard error
        faulthandler.enable()
    PROCESS.is_child = True
    Child(connection).serve()


class Child:
    """Runs the attempts that the worker sends, on the main thread; another thread reads the messages."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        # Reentrant, because the garbage collector may run code that logs something.
        self._sending = threading.RLock()
        self._parent = os.getppid()
        self._runs: SimpleQueue[Run | None] = SimpleQueue()
        self._replies: SimpleQueue[bool] = SimpleQueue()
        self._signal = StopSignal()
        self._attempt: Attempt | None = None
        """The attempt whose function is being called."""
        self._is_busy = False
        self._is_ending = False
        self._setup: Setup | None = None
        self._sessions: TaskSessions | None = None
        self._completions = {kept: Completion(Events(), keep=kept) for kept in (False, True)}
        outage = Outage()
        # Not used: the worker ends this process when the time of a task is up.
        self._deadlines = Deadlines(lambda _attempt, _thread: None, outage, MissingThreads(outage))
        self._processors: dict[tuple[object, ...], Processor] = {}

    def serve(self) -> None:
        """Run attempts until there are no more."""
        run_processors()
        signal.signal(signal.SIGTERM, self._interrupt)
        threading.Thread(target=self._listen, name="apoq-parent", daemon=True).start()
        while not self._is_ending and (request := self._runs.get()) is not None:
            self._is_busy = True
            with suppress(Interrupted, OSError):  # the worker has died
                self._run(request)
            with suppress(Exception):
                sys.stdout.flush()
            self._is_busy = False
        if self._is_ending:
            os._exit(1)  # also if the task has started threads that still run

    def send(self, message: FromChild) -> None:
        """Send a message to the worker, from any thread."""
        with self._sending:
            messages.send(self._connection, message)

    def may_complete(self) -> bool:
        """Ask the worker whether it still owns the task; from then on, it doesn't interrupt it."""
        self.send(Completing())
        return self._replies.get()

    def _run(self, request: Run) -> None:
        type_ = request.row[TYPE]
        try:
            processor = self._processor(type_, request)
            claim = self._claim(request, type_, processor)
            attempt = _ChildAttempt((*request.row, claim), processor, self._open_session)
            attempt.data = read_json(request.data)
        except BaseException as error:  # noqa: BLE001 - the attempt fails, as when the function raises
            self.send(failure_message(error))
            return
        self.send(Begun())
        self._attempt = attempt
        with in_trace(request.trace):
            end = run(attempt, self._completions[request.keeps_completed], self._deadlines)
        with self._sending:
            self._attempt = None
            messages.send(self._connection, result_message(end))

    def _claim(self, request: Run, type_: str, processor: Processor) -> Claim:
        now = time.monotonic()
        queue = Queue(request.row[QUEUE], schema=request.schema, max_data_size=request.max_data_size)
        return Claim(
            *(queue, {type_: processor}, now, now, _ParentsLease(self.may_complete), self._signal, _nothing),
            on_progress=self._report,
        )

    def _report(self, attempt: object, report: Report) -> None:
        with self._sending:
            if attempt is self._attempt:  # and not a thread that an earlier one has left behind
                messages.send(self._connection, Progress(*report))

    def _processor(self, type_: str, request: Run) -> Processor:
        key = (type_, request.function, *request.middleware, request.max_result_size)
        if (known := self._processors.get(key)) is not None:
            return known
        found = imported(request.function)
        function = found.processor.function if isinstance(found, TypedTask) else found
        size = request.max_result_size
        encoder = None if size is None else ResultEncoder(size)
        # How it is retried is the worker's to decide.
        processor = Processor(function, RetryPolicy(0, 0), is_coroutine=False, result_encoder=encoder)
        registry = Registry(imported(path) for path in request.middleware)
        registry.use(type_, processor)
        self._processors[key] = made = registry.of(None)[type_]
        return made

    def _open_session(self) -> TaskSession:
        if self._sessions is None:
            setup = self._setup
            assert setup is not None
            if setup.problem:
                raise UnsupportedDatabase(setup.problem)
            if setup.make_engine is not None:
                engine = imported(setup.make_engine)()
            else:
                engine = engine_from(setup.engine or {})
            self._sessions = TaskSessions(engine, EventLoopThread())
        return self._sessions.open()

    def _listen(self) -> None:
        try:
            while True:
                while not self._connection.poll(PARENT_CHECK_SECONDS):
                    if os.getppid() != self._parent:
                        os._exit(1)
                self._obey(messages.receive_in_child(self._connection))
        except (EOFError, OSError):
            self._end()
        except BaseException:  # noqa: BLE001 - such as a message of a worker with another version of apoq
            traceback.print_exc()
            os._exit(1)

    def _obey(self, message: messages.ToChild) -> None:
        match message:
            case Setup():
                self._setup = message
                forward(self.send, message.log_level)
            case Run():
                self._signal = StopSignal()  # here, because the order to stop may be the next message
                self._runs.put(message)
            case MayComplete(is_allowed=is_allowed):
                self._replies.put(is_allowed)
            case Stop():
                self._signal.is_given = True
            case End():
                self._signal.is_given = self._is_ending = True
                main = threading.main_thread().ident
                assert main is not None
                signal.pthread_kill(main, signal.SIGTERM)

    def _interrupt(self, _number: int, _frame: object) -> None:
        """Interrupt the task if the worker says so: init systems send SIGTERM to all of a service."""
        if self._is_ending and self._is_busy:
            raise Interrupted

    def _end(self) -> None:
        """Exit, because the worker has closed the connection or has died."""
        if not self._is_busy:
            self._runs.put(None)
            time.sleep(EXIT_SECONDS)
        os._exit(1)


class _ChildAttempt(Attempt):
    """An attempt whose data has come with it."""

    __slots__ = ()

    def read(self) -> None:
        """Do nothing: the worker has read the data."""


class _ParentsLease(Lease):
    """The lease of the worker, which the child asks for before it completes a task."""

    def __init__(self, ask: Callable[[], bool]) -> None:
        super().__init__(math.inf, math.inf)
        self._ask = ask

    @property
    def is_held(self) -> bool:
        """Whether the worker lets the task be completed."""
        return self._ask()


def _nothing(_attempt: object) -> list[ClaimedTask[Any]]:
    return []
