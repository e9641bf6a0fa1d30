"""What befalls the process that workers are embedded in: it forks, and it ends."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

from apoq.worker import logs

EXIT_WAIT_SECONDS: Final = 1.0
"""Seconds by which workers that nobody has stopped hold up the end of the program at most."""


class _Stoppable(Protocol):
    def stop(self, timeout: float | None = None) -> None: ...


class _Process:
    """The workers that live in this process."""

    def __init__(self) -> None:
        self._workers: WeakKeyDictionary[_Stoppable, Callable[[Any], None]] = WeakKeyDictionary()
        self._started: set[_Stoppable] = set()
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._farewell: threading.Thread | None = None
        self._inherited: list[object] = []

    def enter(self, worker: _Stoppable, begin_anew: Callable[[Any], None]) -> None:
        """Call `begin_anew` with this worker in each child that is forked; the worker itself may go."""
        self._workers[worker] = begin_anew

    def get_ready(self) -> None:
        """Start the thread that stops workers when the program ends; RuntimeError if it can't be started."""
        with self._lock:
            if self._farewell is None:
                # Now, because at the end no thread can be started. And a thread, because the main one
                # shouldn't wait for a database that is away.
                farewell = threading.Thread(target=self._stop_all, name="apoq-farewell", daemon=True)
                farewell.start()
                self._farewell = farewell

    def watch(self, worker: _Stoppable) -> None:
        """Stop this worker when the program ends, if nobody else does; whoever else lets go of it."""
        with self._lock:
            self._started.add(worker)

    def forget(self, worker: _Stoppable) -> None:
        """Let go of a worker that has stopped."""
        with self._lock:
            self._started.discard(worker)

    def end(self) -> None:
        """Have what is held given back, within `EXIT_WAIT_SECONDS`."""
        self._ending.set()
        if self._farewell is not None:
            self._farewell.join(EXIT_WAIT_SECONDS)

    def keep(self, *inherited: object) -> None:
        """Never let go of these, a parent's: a connection in use would be rolled back as it is collected."""
        self._inherited.append(inherited)

    def fork(self) -> None:
        """Let the workers begin anew, in a child that was forked."""
        workers = list(self._workers.items())
        # Afresh, for another thread may have held these at the fork.
        self._lock, self._ending, self._farewell = threading.Lock(), threading.Event(), None
        self._started = set()
        for worker, begin_anew in workers:
            begin_anew(worker)

    def _stop_all(self) -> None:
        self._ending.wait()
        # Half of the time for tasks to end, the other half to write what became of them.
        deadline = time.monotonic() + EXIT_WAIT_SECONDS / 2
        for worker in list(self._started):
            try:
                worker.stop(timeout=max(0.0, deadline - time.monotonic()))
            except Exception as error:  # noqa: BLE001 - others rescue what it held
                logs.not_stopped(worker, error)


PROCESS: Final = _Process()

atexit.register(PROCESS.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=PROCESS.fork)
