"""The states of a task, and how it moves between them.

.. code-block:: text

                      claim                       complete
    (add) ─▶ pending ───────▶ running ──────────────────────▶ completed ──┐
              ▲ ▲ │              │ ├── fail, retries used up ─▶ failed ───┤
              │ │ └──────────────│─┴── Cancel, cancel ────────▶ cancelled ┤
              │ └────────────────┘                                        │
              │   retry, Snooze, release, rescue                          │
              └───────────────────────────────────────────────────────────┘
                                    Queue.retry

    `Queue.cancel` is the one way on that is not a worker's, and `Queue.retry` the one way back.

    A `waiting` task has not ended, and can't be claimed, not even by the Node.js original, until something
    else makes it pending. It can be cancelled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

PENDING: Final = "pending"
WAITING: Final = "waiting"
RUNNING: Final = "running"
COMPLETED: Final = "completed"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"

STATES: Final = (PENDING, WAITING, RUNNING, COMPLETED, FAILED, CANCELLED)

FINAL: Final = (COMPLETED, FAILED, CANCELLED)
"""Where a task has ended: a worker never moves it from here, and a caller may retry it."""

TRANSITIONS: Final = {
    PENDING: {RUNNING, CANCELLED},
    WAITING: {PENDING, CANCELLED},
    RUNNING: {PENDING, COMPLETED, FAILED, CANCELLED},
    **{state: {PENDING} for state in FINAL},
}
"""Where a task may go from each state."""

CANCELLABLE: Final = tuple(state for state in STATES if CANCELLED in TRANSITIONS[state])
"""From where a caller may cancel it."""


def alternatives(states: Iterable[str]) -> str:
    """Write states as a list in SQL."""
    return f"({', '.join(map(repr, states))})"
