"""The child processes of a worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from apoq.worker.failures import Outage
from apoq.worker.isolation.child_process import ChildProcess
from apoq.worker.service import Service

IDLE_SECONDS: Final = 60.0
"""Seconds after which a child without a task is ended."""


class ChildPool(Service):
    """Starts a child when one is needed and none is idle; its thread ends those that are idle for long.

    So there are never more children than slots of the worker.
    """

    def __init__(self, make_child: Callable[[], ChildProcess], outage: Outage) -> None:
        super().__init__("apoq-children", outage)
        self._make_child = make_child
        self._idle: list[tuple[ChildProcess, float]] = []
        """Each with the time since which it is idle; the last one is used next."""
        self._is_open = True
        self._lock = threading.Lock()

    def take(self) -> ChildProcess:
        """Return a child without a task; OSError if none can be started."""
        dead = []
        try:
            with self._lock:
                while self._idle:
                    child, _ = self._idle.pop()
                    if child.is_alive:
                        return child
                    dead.append(child)
        finally:
            for child in dead:
                child.close()
        return self._make_child()

    def give_back(self, child: ChildProcess) -> None:
        """Keep a child for the next task, or end it if the worker has stopped meanwhile."""
        with self._lock:
            if is_kept := self._is_open:
                self._idle.append((child, time.monotonic()))
                with suppress(RuntimeError):  # without a thread, it is ended when the worker stops
                    self.start()
        if not is_kept:
            child.close()

    def open(self) -> None:
        """Keep children from now on."""
        self._is_open = True

    def close(self) -> None:
        """End all children without a task now, and the others after their tasks."""
        with self._lock:
            self._is_open = False
        self.end()
        self._end_idle_for(0.0)
        self.stop()

    def turn(self) -> float:
        """End the children that are idle for too long; return when to look again."""
        self._end_idle_for(IDLE_SECONDS)
        return IDLE_SECONDS

    def _end_idle_for(self, seconds: float) -> None:
        until = time.monotonic() - seconds
        with self._lock:
            ended = [child for child, since in self._idle if since <= until]
            self._idle = [(child, since) for child, since in self._idle if since > until]
        for child in ended:
            child.hang_up()
        for child in ended:
            child.close()
