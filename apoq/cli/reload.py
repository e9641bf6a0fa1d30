"""``apoq worker --reload``: restart the worker when a Python file changes, for development."""

from __future__ import annotations

import logging
import os
import threading
import time
from importlib import import_module
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from apoq.cli.child import ended_how
from apoq.cli.exits import BadUsage
from apoq.cli.stopping import StopNotice
from apoq.cli.supervisor import KILL_MARGIN_SECONDS, Supervisor

logger = logging.getLogger(__name__)


class Reloader(Supervisor):
    """Runs the worker as a child process, and starts it again when a Python file has changed.

    The old process stops first, as at a signal: its running tasks get the usual time. If the worker can't
    start, such as after a syntax error, the next change starts it again.
    """

    def __init__(self, command: list[str], folder: Path, *, timeout: float) -> None:
        super().__init__(command, 1, timeout=timeout)
        self._folder = folder
        self._changes: SimpleQueue[set[str]] = SimpleQueue()
        self._starts_again = True
        self._kill_at: float | None = None

    def watch(self) -> None:
        """Begin to watch the files; fail if the library for that is missing."""
        try:
            watchfiles: Any = import_module("watchfiles")
        except ImportError:
            raise BadUsage(
                '--reload needs the package watchfiles, which is not installed: pip install "apoq[reload]"'
            ) from None
        logging.getLogger("watchfiles").setLevel(logging.WARNING)  # the changes are logged here
        threading.Thread(target=self._watch, args=(watchfiles,), name="apoq-reload", daemon=True).start()
        logger.info("watching the Python files in %s", self._folder)

    def _watch(self, watchfiles: Any) -> None:
        only_python = watchfiles.PythonFilter()
        for changes in watchfiles.watch(self._folder, watch_filter=only_python, raise_interrupt=False):
            self._changes.put({path for _, path in changes})
            self.wake()

    def _turn(self) -> int | None:
        self._obey()
        (worker,) = self._workers
        codes = [code for _, code in worker.reap()]
        child = worker.child
        if self._stops_at is not None:
            return self._stopping(self._stops_at)
        if changed := self._take_changes():
            self._announce(changed)
            if child is not None and not self._starts_again:
                child.stop()
                self._kill_at = time.monotonic() + self._timeout + KILL_MARGIN_SECONDS
            self._starts_again = True
        if codes and not self._starts_again:
            logger.error("the worker %s; it starts again when a Python file changes", ended_how(codes[0]))
        if child is None and self._starts_again:
            worker.start()
            self._starts_again, self._kill_at = worker.child is None, None
        elif child is not None and self._kill_at is not None and time.monotonic() > self._kill_at:
            logger.error("the worker didn't stop in time, and is killed")
            child.process.kill()
        self._report()
        return None

    def _take_changes(self) -> set[str]:
        changed: set[str] = set()
        while True:
            try:
                changed |= self._changes.get_nowait()
            except Empty:
                return changed

    def _announce(self, changed: set[str]) -> None:
        if self._starts_again:
            return
        first, *others = sorted(os.path.relpath(path, self._folder) for path in changed)
        names = f"{first} and {len(others):,} more files" if others else first
        logger.info("%s changed: the worker restarts", names)
        self._notice = StopNotice(self._timeout, self._running)
        self._notice.begin()
