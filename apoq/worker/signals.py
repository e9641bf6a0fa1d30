"""The signals by which a program of its own is told to end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue


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
