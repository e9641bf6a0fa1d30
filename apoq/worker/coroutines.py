"""The event loop on which coroutine processors run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any


class Coroutines:
    """The application's event loop, where it gave one; else a loop of the worker's own, on a thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def use(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Run on the application's loop; None: on one of its own, begun when the first coroutine comes."""
        self._loop = loop

    @property
    def is_applications(self) -> bool:
        """Tell whether they run on the application's loop."""
        return self._loop is not None and self._thread is None

    def spawn(self, function: Callable[[Any], Coroutine[Any, Any, None]], argument: object) -> None:
        """Run a coroutine function, from any thread."""
        self._running_loop().call_soon_threadsafe(self._spawn, function, argument)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine from another thread, and wait for its answer."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._running_loop()).result()

    def cancel(self) -> None:
        """Cancel what runs."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._tasks])

    def is_current(self) -> bool:
        """Tell whether the caller is on this loop, which it would block by waiting."""
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def stop(self) -> None:
        """End the loop, if it is the worker's own."""
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=self._run, args=(self._loop,), name="apoq-loop", daemon=True
            )
            self._thread.start()
        return self._loop

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def _spawn(self, function: Callable[[Any], Coroutine[Any, Any, None]], argument: object) -> None:
        # The loop itself holds tasks only weakly.
        task = asyncio.ensure_future(function(argument))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
