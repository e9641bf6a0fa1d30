"""The signals by which a program of its own is told to end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Final

LOOK: Final = 1.0
"""Seconds between two looks for a signal that has woken nobody."""


@contextmanager
def caught() -> Iterator[SimpleQueue[int]]:
    """Put the first SIGINT or SIGTERM into a queue; a second one does what it did before."""
    # Not an Event: a handler that sets it while the main thread begins to wait for it blocks for ever.
    signals: SimpleQueue[int] = SimpleQueue()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def first(number: int, _frame: object) -> None:
        restore()  # here, so that it is so even while the worker starts
        signals.put(number)

    for number in before:
        signal.signal(number, first)
    try:
        yield signals
    finally:
        restore()


def wait(signals: SimpleQueue[int]) -> None:
    """Wait for one of them, on the main thread."""
    while True:
        try:
            signals.get(timeout=LOOK)
        except Empty:
            # Python calls a handler between two steps of the main thread. A signal that comes when it has
            # begun to wait, and isn't asleep yet, doesn't wake it: a few of a hundred that come at the start.
            continue
        return
