"""Forks and the exit of the process in which workers run."""

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
"""Seconds by which workers that were not stopped delay the end of the program, at most."""


class _Stoppable(Protocol):
    def stop(self, timeout: float | None = None) -> None: ...


class _Process:
    """The workers that live in this process."""

    def __init__(self) -> None:
        self._workers: WeakKeyDictionary[_Stoppable, Callable[[Any], None]] = WeakKeyDictionary()
        self._started: set[_Stoppable] = set()
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._stopper: threading.Thread | None = None
        self._inherited: list[object] = []
        self.is_child = False
        """Whether this is a child process of a worker, which runs isolated tasks."""

    def refuse_workers(self) -> None:
        """Raise RuntimeError if no worker may start in this process."""
        if self.is_child:
            raise RuntimeError(
                "a worker must not start in the process of an isolated task, which has imported this module "
                'to find a function: start the worker under `if __name__ == "__main__":`, or in a function'
            )

    def enter(self, worker: _Stoppable, restart: Callable[[Any], None]) -> None:
        """Call `restart` with this worker in each forked child, if the worker still exists then."""
        self._workers[worker] = restart

    def get_ready(self) -> None:
        """Start the thread that stops workers at the program's end; raise RuntimeError if that fails."""
        with self._lock:
            if self._stopper is None:
                # Now, because no thread can be started at the end. And on a thread, because the main one
                # must not wait for a database that is away.
                stopper = threading.Thread(target=self._stop_all, name="apoq-exit", daemon=True)
                stopper.start()
                self._stopper = stopper

    def watch(self, worker: _Stoppable) -> None:
        """Stop this worker when the program ends, unless `forget` is called before."""
        with self._lock:
            self._started.add(worker)

    def forget(self, worker: _Stoppable) -> None:
        """Forget a worker that has stopped."""
        with self._lock:
            self._started.discard(worker)

    def end(self) -> None:
        """Stop the workers, within `EXIT_WAIT_SECONDS`."""
        self._ending.set()
        if self._stopper is not None:
            self._stopper.join(EXIT_WAIT_SECONDS)

    def keep(self, *inherited: object) -> None:
        """Keep these objects of a parent process: collecting a connection in use would roll it back."""
        self._inherited.append(inherited)

    def fork(self) -> None:
        """Restart the workers in a forked child."""
        workers = list(self._workers.items())
        # New ones, because another thread may have held these at the fork.
        self._lock, self._ending, self._stopper = threading.Lock(), threading.Event(), None
        self._started = set()
        for worker, restart in workers:
            restart(worker)

    def _stop_all(self) -> None:
        self._ending.wait()
        # Half of the time for tasks to end, the other half to write their results.
        deadline = time.monotonic() + EXIT_WAIT_SECONDS / 2
        for worker in list(self._started):
            try:
                worker.stop(timeout=max(0.0, deadline - time.monotonic()))
            except Exception as error:  # noqa: BLE001 - other workers rescue its tasks
                logs.not_stopped(worker, error)


PROCESS: Final = _Process()

atexit.register(PROCESS.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=PROCESS.fork)
