"""A worker process of a supervisor, by its number: its child, and the children before and after that one."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from apoq.cli.child import Child, ended_how
from apoq.core.recycling import StopReason
from apoq.worker.settling.counters import WorkerStats

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS: Final = 1.0
MAX_BACKOFF_SECONDS: Final = 30.0
STABLE_AFTER_SECONDS: Final = 60.0
"""Seconds that a child must have lived for its end not to count as one of a series."""

MAX_CRASHES: Final = 5
CRASHES_WITHIN_SECONDS: Final = 60.0
"""A supervisor gives up if the child with one number crashes so often within so many seconds."""

MAX_USELESS: Final = 2
"""How many children in a row are replaced that reached their limit of memory before they were of use."""

USELESS_WITHIN_SECONDS: Final = 60.0
LEAST_ATTEMPTS: Final = 10
"""A child was of use if it lived so long, or ended so many attempts and worked longer than it had started."""

SLOW_START_SECONDS: Final = 60.0
"""Seconds after which a warning says that a successor is not ready."""

Spawn = Callable[[int, bool], Child]
"""Starts a child with this number, which is or isn't a successor."""


class WorkerProcess:
    """Keeps one child running, and replaces it if it crashes or has reached a limit.

    A child that has reached a limit works on until its successor is ready. If the successor can't start, such
    as after a faulty deployment, the child goes on. A child that was replaced drains: it claims no tasks, and
    ends when its running ones have ended.
    """

    def __init__(self, number: int, spawn: Spawn) -> None:
        self.number = number
        self.child: Child | None = None
        self.successor: Child | None = None
        self.predecessors: list[Child] = []
        """The children that were replaced, and drain."""
        self.starts_at = 0.0
        """When the next child may start, by time.monotonic()."""
        self._spawn = spawn
        self._ended = WorkerStats()
        """The numbers of the children that have ended."""
        self._deaths = 0
        self._crashed_at: deque[float] = deque(maxlen=MAX_CRASHES)
        self._useless = 0
        """How many children in a row were replaced that had been of no use."""
        self._unlimited: Child | None = None
        """A child that goes on without its limit of memory."""
        self._is_slow_start_logged = False

    @property
    def children(self) -> list[Child]:
        """All its processes."""
        return [child for child in (*self.predecessors, self.child, self.successor) if child is not None]

    @property
    def stats(self) -> WorkerStats:
        """The numbers of all its processes, also of those that have ended."""
        all_stats = [self._ended, *(child.stats for child in self.children)]
        return WorkerStats(*map(sum, zip(*all_stats, strict=True)))

    def start(self) -> None:
        """Start its child, if it has none and it is time to."""
        if self.child is None and time.monotonic() >= self.starts_at:
            try:
                self.child = self._spawn(self.number, False)
            except OSError as error:
                logger.error(  # noqa: TRY400 - the message says it all
                    "worker process %d can't be started: %s; it is tried again in %g s",
                    *(self.number, error, self._back_off()),
                )

    def reap(self) -> Iterator[tuple[Child, int]]:
        """Forget the processes that have ended; yield each before that, with its exit code."""
        for child in self.children:
            if (code := child.reap()) is not None:
                yield child, code
                self._ended = WorkerStats(*map(sum, zip(self._ended, child.stats, strict=True)))
                self._forget(child)

    def replace(self, child: Child, code: int) -> bool:
        """Decide what follows a process that has ended; return False if it has crashed too often."""
        if child in self.predecessors:
            if code:
                logger.error("worker process %d, which was replaced, %s", self.number, ended_how(code))
        elif child is self.successor:
            logger.error(
                "the successor of worker process %d %s before it was ready; the process goes on, and another "
                "successor starts in %g s",
                *(self.number, ended_how(code), self._back_off(child)),
            )
        else:
            now = time.monotonic()
            self._crashed_at.append(now)
            if len(self._crashed_at) == MAX_CRASHES and now - self._crashed_at[0] < CRASHES_WITHIN_SECONDS:
                logger.error(
                    "worker process %d %s; it has crashed %d times within %.0f s, so the program ends",
                    *(self.number, ended_how(code), MAX_CRASHES, now - self._crashed_at[0]),
                )
                return False
            if self.successor is None:
                logger.error(
                    "worker process %d %s; another one starts in %g s",
                    *(self.number, ended_how(code), self._back_off(child)),
                )
            else:
                logger.error("worker process %d %s; its successor takes over", self.number, ended_how(code))
        return True

    def wants_successor_since(self) -> float | None:
        """Return when its child has reached a limit, by time.monotonic(), if a successor may start now."""
        child = self.child
        if child is None or not child.limit or time.monotonic() < self.starts_at or self._is_ignored(child):
            return None
        return child.started_at + child.reached_after

    def start_successor(self) -> None:
        """Start the process that is to replace its child."""
        assert self.child is not None
        logger.info(
            "worker process %d has reached its %s after %.0f s: its successor starts",
            *(self.number, self.child.limit, self.child.reached_after),
        )
        self._is_slow_start_logged = False
        try:
            self.successor = self._spawn(self.number, True)
        except OSError as error:
            logger.error(  # noqa: TRY400 - the message says it all
                "the successor of worker process %d can't be started: %s; it is tried again in %g s",
                *(self.number, error, self._back_off()),
            )

    def hand_over(self) -> None:
        """Replace its child by the successor, if that is ready."""
        child, successor = self.child, self.successor
        if child is None or successor is None:
            return
        if successor.is_ready:
            logger.info("worker process %d is replaced by its successor, and drains", self.number)
            self._useless = self._useless + 1 if _is_useless(child) else 0
            self._deaths = 0
            self.predecessors.append(child)
            self.child, self.successor = successor, None
            child.drain()
        elif successor.age > SLOW_START_SECONDS and not self._is_slow_start_logged:
            self._is_slow_start_logged = True
            logger.warning(
                "the successor of worker process %d is not ready after %.0f s; the process goes on",
                *(self.number, SLOW_START_SECONDS),
            )

    def _is_ignored(self, child: Child) -> bool:
        """Return whether a child goes on without the limit that it has reached, and log that once."""
        if child.limit != StopReason.MAX_MEMORY or self._useless < MAX_USELESS or not _is_useless(child):
            return False
        if child is not self._unlimited:
            self._unlimited = child
            logger.error(
                "worker process %d has reached its max_memory after %.1f s and %d attempts, and the %d "
                "processes before it were as short-lived; it goes on without that limit: raise max_memory",
                *(self.number, child.reached_after, child.attempts_then, MAX_USELESS),
            )
        return True

    def _forget(self, child: Child) -> None:
        if child is self.child:
            self.child, self.successor = self.successor, None
        elif child is self.successor:
            self.successor = None
        else:
            self.predecessors.remove(child)

    def _back_off(self, child: Child | None = None) -> float:
        """Return the seconds until the next process starts; they grow with each death in a row."""
        if child is not None and child.age > STABLE_AFTER_SECONDS:
            self._deaths = 0
        pause = min(FIRST_BACKOFF_SECONDS * 2.0**self._deaths, MAX_BACKOFF_SECONDS)
        self._deaths += 1
        self.starts_at = time.monotonic() + pause
        return pause


def _is_useless(child: Child) -> bool:
    """Return whether a child has reached its limit of memory before it was of use."""
    if child.limit != StopReason.MAX_MEMORY or child.reached_after >= USELESS_WITHIN_SECONDS:
        return False
    has_started_for_longer = child.reached_after < 2 * child.ready_after
    return child.attempts_then < LEAST_ATTEMPTS or has_started_for_longer
