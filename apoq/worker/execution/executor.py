"""Runs claimed tasks in a number of slots, on threads and on an event loop."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, Final

from apoq.client.queue import Queue
from apoq.core.outcomes import Release
from apoq.core.processing import run_processors, running_processor
from apoq.schema.statements.claim import CLAIM
from apoq.worker.execution.attempt import AnyAttempt, AsyncAttempt, Attempt, Claimed, attempt_of
from apoq.worker.execution.completion import Completion
from apoq.worker.execution.deadlines import Deadlines
from apoq.worker.execution.event_loop import EventLoopThread
from apoq.worker.execution.runner import AttemptResult, ended
from apoq.worker.execution.runners import Runner
from apoq.worker.execution.task_sessions import TaskSessions
from apoq.worker.observer import Observer
from apoq.worker.threads import MissingThreads

YIELD_SECONDS: Final = 0.0001
"""Seconds in which the thread of a slot wakes up and takes the interpreter's lock.

If the thread that handed it a task went on without this pause, the slot would have to wait for the lock.
"""


OBSERVATION_INTERVAL_SECONDS: Final = 0.002
"""Seconds between two attempts that are observed, if there are more; each stands for those before it."""


class Executor:
    """At most `concurrency` tasks at once: plain functions on threads, coroutine functions on an event loop.

    A task that finds no free slot waits in line. A slot that has ended a task takes the next one from the
    line by itself, whichever of the two kinds it is, so busy slots never wait for another thread.
    """

    def __init__(
        self,
        concurrency: int,
        event_loop: EventLoopThread,
        sessions: TaskSessions,
        runner: Runner,
        completion: Completion,
        deadlines: Deadlines,
        missing: MissingThreads,
        *,
        on_ended: Callable[[AttemptResult], None],
        on_low: Callable[[], None],
        observer: Observer | None = None,
    ) -> None:
        self.concurrency = concurrency
        self.low_water = 0
        """`on_low` is called when no more tasks than this are in line."""
        self.run_time: float | None = None
        """Seconds that a task takes: an average of about the last few dozen."""
        self._event_loop = event_loop
        self._sessions = sessions
        self._runs, self._run_coroutine = runner
        self._completion = completion
        self._deadlines = deadlines
        self._missing = missing
        self._on_ended = on_ended
        self._on_low = on_low
        self._first: deque[Claimed] = deque()
        """Tasks with places, which begin before those in line."""
        self._observer = observer
        self._observes_at = 0.0
        """When the next attempt is observed, by time.monotonic()."""
        self._line: deque[Claimed] = deque()
        self._free = concurrency
        self._reserved = 0
        """Free slots for which claims are under way."""
        self._is_closed = False
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._threads: list[threading.Thread] = []
        self._on_threads = 0
        """How many slots have a task on a thread."""
        self._for_threads: SimpleQueue[Attempt | None] = SimpleQueue()
        # Attempts, not ids: a task that was released may run here again before its first attempt has ended.
        self._running: set[AnyAttempt] = set()
        self._in_no_slot: set[AnyAttempt] = set()

    @property
    def load(self) -> int:
        """How many tasks run or are in line, or will be when the claims under way have ended."""
        return self.concurrency - self._free + self._reserved + len(self._first) + len(self._line)

    @property
    def free(self) -> int:
        """How many slots have nothing to do, and are not reserved."""
        return max(0, self._free - self._reserved)

    @property
    def waiting_since(self) -> float | None:
        """When the first in line was claimed, by time.monotonic()."""
        return _claimed_at(self._line)

    @property
    def placed_since(self) -> float | None:
        """When the first task with a place was claimed that has not begun."""
        return _claimed_at(self._first)

    def room_for_places(self, seconds: float) -> int:
        """Return how many tasks with places, in addition to those that wait, would begin within so long."""
        soon = 0 if self.run_time is None else int(self.concurrency * seconds / max(self.run_time, 1e-6))
        return max(0, self.free + soon - len(self._first))

    @property
    def is_reserved(self) -> bool:
        """Whether a claim under way may take tasks for free slots."""
        return self._reserved > 0

    @contextmanager
    def reserve(self, slots: int) -> Iterator[None]:
        """Reserve free slots for a claim, so that another one takes no tasks for them at the same time."""
        with self._lock:
            self._reserved += slots
        try:
            yield
        finally:
            with self._lock:
                self._reserved -= slots

    def is_current(self) -> bool:
        """Return whether the caller is on a thread of one of the slots."""
        return threading.current_thread() in self._threads

    def attempt_of(self, row: Claimed) -> AnyAttempt:
        """Return an attempt of a claimed task, which has not begun yet."""
        return attempt_of(row, self._sessions)

    def run(self, attempt: AnyAttempt) -> AttemptResult:
        """Run an attempt on the caller's thread, in no slot, and return its result."""
        self._in_no_slot.add(attempt)
        try:
            with running_processor():
                if isinstance(attempt, AsyncAttempt):
                    end: AttemptResult = self._event_loop.run(
                        self._run_coroutine(attempt, self._completion, self._deadlines)
                    )
                    return end
                return self._runs[type(attempt)](attempt, self._completion, self._deadlines)
        finally:
            self._in_no_slot.discard(attempt)

    def put(self, tasks: Iterable[Claimed], *, placed: bool = False, more_follow: bool = False) -> None:
        """Run these tasks when slots are free; those with places (`placed`) before all others.

        `more_follow`: the caller is about to claim more tasks. If a slot's thread can't be started, its task
        stays first in line and the slot stays free. If the executor is closed, the tasks are released.
        """
        has_begun = False
        refused: list[Claimed] = []
        with self._lock:
            if self._is_closed:
                for row in tasks:
                    self._on_ended(released(self.attempt_of(row)))
                return
            (self._first if placed else self._line).extend(tasks)
            for _ in range(self._free):
                attempt = self._pop()
                if attempt is None:
                    break
                self._free -= 1
                self._running.add(attempt)
                if self._begin(attempt):
                    has_begun = True
                else:
                    self._free += 1
                    self._running.discard(attempt)
                    refused.append(attempt.row)
            for row in reversed(refused):
                (self._first if row[CLAIM].is_placed else self._line).appendleft(row)
        # If this thread is about to claim more, and there is enough to do until then, it keeps the lock. To
        # get it back from busy slots, it would wait for up to 5 ms, while no claim is on its way.
        if has_begun and not (more_follow and self._line):
            time.sleep(YIELD_SECONDS)

    def open(self) -> None:
        """Let tasks begin."""
        self._is_closed = False

    def close(self) -> None:
        """Let no more tasks begin; those that run go on."""
        with self._lock:  # no `put` is under way then
            self._is_closed = True

    def take_back(self, queues: Container[Queue] | None = None) -> list[AnyAttempt]:
        """Return the tasks in line, and forget them: all of them, or those of these queues."""
        with self._lock:
            taken = [*self._take_back(self._first, queues), *self._take_back(self._line, queues)]
        return [self.attempt_of(row) for row in taken]

    def take_back_placed(self) -> list[AnyAttempt]:
        """Return the tasks with places that have not begun, and forget them."""
        with self._lock:
            taken = self._take_back(self._first, None)
        return [self.attempt_of(row) for row in taken]

    def _take_back(self, line: deque[Claimed], queues: Container[Queue] | None) -> list[Claimed]:
        taken: list[Claimed] = []
        others: list[Claimed] = []
        with suppress(IndexError):
            while True:
                # One by one, because slots take tasks from the line meanwhile.
                row = line.popleft()
                is_meant = queues is None or row[CLAIM].from_queue in queues
                (taken if is_meant else others).append(row)
        line.extendleft(reversed(others))
        return taken

    def recall(self, tasks: list[Claimed]) -> list[Claimed]:
        """Tell running ones to stop, because they are no longer owned; forget and return those in line."""
        waiting = []
        for row in tasks:
            for line in (self._first, self._line):
                with suppress(ValueError):  # it has begun, or is in the other one
                    line.remove(row)
                    waiting.append(row)
        recalled = {id(row) for row in tasks}
        for attempt in self.running():
            if id(attempt.row) in recalled:
                attempt.recall()
        return waiting

    def running(self) -> list[AnyAttempt]:
        """Return the attempts that run now."""
        return [*self._running, *self._in_no_slot]

    def unfinished(self) -> set[int]:
        """Return the `id()` of each claimed row that is in line, or runs and has not begun to complete."""
        running = {id(attempt.row) for attempt in self.running() if not attempt.is_completing}
        return running | {id(row) for row in (*list(self._first), *list(self._line))}

    def abandon(self) -> list[AnyAttempt]:
        """Return the attempts that run in slots now, and forget them: their results are ignored."""
        running = []
        while self._running:
            with suppress(KeyError):  # the last one has just ended
                running.append(self._running.pop())
        return running

    def wait_until_idle(self, timeout: float | None) -> bool:
        """Wait until all slots are free; return whether they are."""
        with self._idle:
            return self._idle.wait_for(lambda: self._free == self.concurrency, timeout)

    def stop(self) -> None:
        """End the threads; those that still run a task end after it."""
        for _ in self._threads:
            self._for_threads.put(None)
        self._threads.clear()
        # A new one, because the rest of the old one is meant for those threads.
        self._for_threads = SimpleQueue()

    def _pop(self) -> AnyAttempt | None:
        if self._is_closed:
            return None
        if self._first:
            with suppress(IndexError):  # another slot has just taken the last one
                return attempt_of(self._first.popleft(), self._sessions)
        try:
            row = self._line.popleft()
        except IndexError:
            return None
        return attempt_of(row, self._sessions)

    def _begin(self, attempt: AnyAttempt) -> bool:
        """Hand an attempt to its thread or to the loop; return False if that could not be started."""
        if isinstance(attempt, AsyncAttempt):
            try:
                self._event_loop.spawn(self._coroutine_slot, attempt)
            except RuntimeError as error:
                self._missing.add(self._retry_loop, error)
                return False
            return True
        if len(self._threads) <= self._on_threads:  # none of them is idle
            try:
                self._add_thread()
            except RuntimeError as error:
                self._missing.add(self._retry_thread, error)
                return False
        self._on_threads += 1
        self._for_threads.put(attempt)
        return True

    def _add_thread(self) -> None:
        with self._lock:
            if len(self._threads) < self.concurrency:
                thread = threading.Thread(
                    target=self._thread_slots,
                    args=(self._for_threads,),
                    name=f"apoq-slot-{len(self._threads) + 1}",
                    daemon=True,
                )
                thread.start()
                self._threads.append(thread)

    def _retry_loop(self) -> None:
        self._event_loop.open()
        self.put(())  # the tasks that wait for it

    def _retry_thread(self) -> None:
        self._add_thread()
        self.put(())

    def _begin_elsewhere(self, attempt: AnyAttempt, *, on_thread: bool) -> None:
        """Run an attempt of the other kind, in the slot of one that has ended."""
        with self._lock:
            self._on_threads -= on_thread
            has_begun = self._begin(attempt)
        if not has_begun:
            self._ended(released(attempt), time.monotonic())
            with self._lock:
                self._free += 1
                self._idle.notify_all()

    def _thread_slots(self, attempts: SimpleQueue[Attempt | None]) -> None:
        observer, runs = self._observer, self._runs
        run_processors()
        while (begun := attempts.get()) is not None:
            attempt: Any = begun
            row, took, unobserved = begun.row, 0.0, 0
            while run := runs.get(type(attempt)):  # not if it is a coroutine's, or if there is none
                started = time.monotonic()
                row = attempt.row
                is_held = row[CLAIM].lease.ends_at > started
                try:
                    end = run(attempt, self._completion, self._deadlines) if is_held else released(attempt)
                except BaseException as error:  # noqa: BLE001 - a slot must not be lost
                    end = ended(attempt, error)
                took = self._ended(end, started)
                if observer is not None:
                    unobserved += 1
                    if started >= self._observes_at:
                        unobserved = self._observe(observer, row, took, unobserved)
                attempt = self._next(on_thread=True)
            if observer is not None and unobserved:
                self._observe(observer, row, took, unobserved)
            if attempt is not None:
                self._begin_elsewhere(attempt, on_thread=True)

    async def _coroutine_slot(self, begun: AsyncAttempt) -> None:
        observer = self._observer
        run_processors()
        attempt: AnyAttempt | None = begun
        row, took, unobserved = begun.row, 0.0, 0
        while isinstance(attempt, AsyncAttempt):
            started = time.monotonic()
            row = attempt.row
            is_held = row[CLAIM].lease.ends_at > started
            if is_held:
                end = await self._run_coroutine(attempt, self._completion, self._deadlines)
            else:
                end = released(attempt)
            took = self._ended(end, started)
            if observer is not None:
                unobserved += 1
                if started >= self._observes_at:
                    unobserved = self._observe(observer, row, took, unobserved)
            attempt = self._next(on_thread=False)
        if observer is not None and unobserved:
            self._observe(observer, row, took, unobserved)
        if attempt is not None:
            self._begin_elsewhere(attempt, on_thread=False)

    def _observe(self, observer: Observer, row: Claimed, took: float, unobserved: int) -> int:
        """Report an attempt, for itself and the unobserved ones before it; return how many are left: none.

        The histograms of thousands of tasks per second are those of a sample, because a method call for each
        task would slow them down by a tenth.
        """
        # Threads may overwrite each other's time, so that a few more are observed.
        self._observes_at = time.monotonic() + OBSERVATION_INTERVAL_SECONDS
        observer.ran(row, took, unobserved)
        return 0

    def _ended(self, end: AttemptResult, started: float) -> float:
        """Hand the result on; return the seconds that the attempt took."""
        took = time.monotonic() - started
        # Threads may overwrite each other's sample, which an average tolerates.
        self.run_time = took if self.run_time is None else self.run_time + (took - self.run_time) / 16
        try:
            self._running.remove(end.attempt)
        except KeyError:
            # It was released meanwhile. If its transaction had committed before, it is completed.
            if end.row is None:
                return took
        self._on_ended(end)
        return took

    def _next(self, *, on_thread: bool) -> AnyAttempt | None:
        """Return the next in line, to run in the same slot; free the slot if there is none."""
        attempt = self._pop()
        if attempt is None:
            with self._lock:
                attempt = self._pop()
                if attempt is None:
                    self._free += 1
                    self._on_threads -= on_thread
                    self._idle.notify_all()
        if attempt is not None:
            self._running.add(attempt)
        if len(self._first) + len(self._line) <= self.low_water:
            self._on_low()
        return attempt


def _claimed_at(line: deque[Claimed]) -> float | None:
    try:
        batch = line[0][CLAIM]
    except IndexError:
        return None
    return batch.claimed_at


def released(attempt: AnyAttempt) -> AttemptResult:
    """Return the result that gives a task back, with no attempt used up."""
    return ended(attempt, Release())
