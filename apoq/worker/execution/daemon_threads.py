"""The threads on which coroutines call plain functions, such as by `asyncio.to_thread`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

MOST_THREADS: Final = 32
"""As many as asyncio's own executor has at most."""


class DaemonExecutor(ThreadPoolExecutor):
    """Calls functions on threads that don't hold up the end of the program.

    Python joins the threads of a `ThreadPoolExecutor` when it ends, however long they still take. An event
    loop takes no other class, so this one inherits from it; nothing else of it is used.
    """

    def __init__(self) -> None:
        super().__init__(max_workers=1)
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._started = 0
        self._starting = threading.Lock()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call a function on a thread as soon as one is free."""
        future: Future[T] = Future()
        self._start()
        self._calls.put(lambda: _call(future, fn, *args, **kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """Let the threads end, each when it has nothing to do; wait for none of them."""
        for _ in range(self._started):
            self._calls.put(None)

    def _start(self) -> None:
        with self._starting:
            if not self._idle.acquire(blocking=False) and self._started < MOST_THREADS:
                name = f"apoq-executor-{self._started + 1}"
                threading.Thread(target=self._run, name=name, daemon=True).start()
                self._started += 1

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # its objects must not live until the next call
            self._idle.release()


def _call(future: Future[Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function(*args, **kwargs)
    except BaseException as error:  # noqa: BLE001 - the future raises it
        future.set_exception(error)
    else:
        future.set_result(result)
