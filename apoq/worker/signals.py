"""The signals that end a worker's own program."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Final

STARTED, STOP, DRAIN = -1, 0, -2
"""In the queue of signals: the worker has started, must stop, or must drain and then stop."""

SIGNAL_POLL_SECONDS: Final = 1.0
"""Seconds between two looks for a signal that has not woken the main thread."""

DRAIN_POLL_SECONDS: Final = 0.05
"""Seconds between two looks whether the tasks of a worker that drains have ended."""


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
        end_as_pid_1()
        signals.put(number)

    for number in before:
        signal.signal(number, first)
    try:
        yield signals
    finally:
        restore()


def end_as_pid_1() -> None:
    """Let signals end this process if it is PID 1, as that of a container is.

    They end any other by default, and the kernel drops them for this one.
    """
    if os.getpid() == 1:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, _end)


def _end(number: int, _frame: object) -> None:
    os._exit(128 + number)


def wait(signals: SimpleQueue[int]) -> int:
    """Wait for one of them, on the main thread, and return it."""
    while True:
        try:
            return signals.get(timeout=SIGNAL_POLL_SECONDS)
        except Empty:
            # Python calls a handler between two steps of the main thread. A signal that comes when it has
            # begun to wait, and isn't asleep yet, doesn't wake it: a few of a hundred that come at the start.
            continue


def wait_for_start(signals: SimpleQueue[int]) -> int:
    """Wait for one of them other than `DRAIN`, which stays in the queue: the worker must start before."""
    order = wait(signals)
    if order == DRAIN:
        order = wait_for_start(signals)
        signals.put(DRAIN)
    return order


def wait_unless(is_over: Callable[[], bool], signals: SimpleQueue[int]) -> int:
    """Wait for one of them other than `DRAIN`, on the main thread; return `DRAIN` if it is over before."""
    while not is_over():
        try:
            order = signals.get(timeout=DRAIN_POLL_SECONDS)
        except Empty:
            continue
        if order != DRAIN:
            return order
    return DRAIN
