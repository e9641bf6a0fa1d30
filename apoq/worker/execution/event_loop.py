"""The event loop on which coroutine processors run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final

from apoq.worker import logs
from apoq.worker.execution.daemon_threads import DaemonExecutor

CANCELLATION_SECONDS: Final = 2.0
"""Seconds that a coroutine has to end after it was cancelled."""

BLOCKED_AFTER_SECONDS: Final = 0.25
"""Seconds after which a loop that doesn't respond counts as blocked by a coroutine."""


class EventLoopThread:
    """The application's event loop if `start` was given one; otherwise a loop on a thread of the worker's."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_blocked = False
        """Whether a coroutine has kept the loop from responding, as `cancel` has found out."""

    def use(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Run on the application's loop; None: on a loop of its own, started with the first coroutine."""
        self._loop = loop

    @property
    def is_applications(self) -> bool:
        """Whether coroutines run on the application's loop."""
        return self._loop is not None and self._thread is None

    def spawn(self, function: Callable[[Any], Coroutine[Any, Any, None]], argument: object) -> None:
        """Run a coroutine function, from any thread."""
        self._running_loop().call_soon_threadsafe(self._spawn, function, argument)

    def open(self) -> None:
        """Start the worker's own loop if there is none; raise RuntimeError if that isn't possible."""
        self._running_loop()

    @property
    def is_closed(self) -> bool:
        """Whether the loop is closed, so that no coroutine can run."""
        loop = self._loop
        return loop is not None and loop.is_closed()

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
        """Run a coroutine from another thread, and return its result; raise TimeoutError after `timeout`."""
        try:
            loop = self._running_loop()
        except BaseException:
            coroutine.close()
            raise
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(timeout)

    def cancel(self, timeout: float) -> None:
        """Cancel all running coroutines, and wait `timeout` seconds for them to end."""
        if self._loop is not None and self._loop.is_running():
            try:
                self.run(self._cancel(timeout), timeout + BLOCKED_AFTER_SECONDS)
            except TimeoutError:
                self.is_blocked = True  # until that coroutine ends, or with the process

    def is_current(self) -> bool:
        """Return whether the caller is on this loop, which it would block by waiting."""
        if self._thread is not None:
            # Not the running loop: with gevent, all threads are greenlets of one, and see the same loop run.
            return threading.current_thread() is self._thread
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def stop(self, timeout: float) -> None:
        """End the loop, if it is the worker's own, and wait so many seconds for it."""
        self.is_blocked = False
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            with suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(loop.stop)
            # If a coroutine blocks it, it ends after that coroutine.
            thread.join(timeout)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:  # several slots may ask for it at the same time
            if self._loop is None:
                try:
                    loop = asyncio.new_event_loop()
                    loop.set_default_executor(DaemonExecutor())
                except OSError as error:  # too many open files
                    raise RuntimeError(f"no event loop can be made: {error}") from error
                thread = threading.Thread(target=self._run, args=(loop,), name="apoq-loop", daemon=True)
                try:
                    thread.start()
                except BaseException:
                    loop.close()
                    raise
                self._thread, self._loop = thread, loop
            if self._loop.is_closed():
                raise RuntimeError("the event loop on which this worker's coroutines run is closed")
            return self._loop

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(RuntimeError):  # there is none
            asyncio.get_running_loop()
            logs.loop_taken()
            loop.close()
            return
        asyncio.set_event_loop(loop)
        try:
            self._run_until_stopped(loop)
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def _run_until_stopped(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            try:
                loop.run_forever()
            except (SystemExit, KeyboardInterrupt) as error:
                # asyncio ends its loop if a task of its own raises these, such as one of `asyncio.gather`.
                # They also reach the processor that awaits that task.
                logs.exit_in_subtask(error)
            else:
                return

    async def _cancel(self, timeout: float) -> None:  # noqa: ASYNC109 - coroutines that still run go on
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)

    def _spawn(self, function: Callable[[Any], Coroutine[Any, Any, None]], argument: object) -> None:
        # The loop itself holds tasks only weakly.
        task = asyncio.ensure_future(function(argument))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
