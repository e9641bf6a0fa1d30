"""The states of a task, and the transitions between them.

.. code-block:: text

                      claim                       complete
    (add) ─▶ pending ───────▶ running ──────────────────────▶ completed ──┐
              ▲ ▲ │              │ ├── fail, retries used up ─▶ failed ───┤
              │ │ └──────────────│─┴── Cancel, cancel ────────▶ cancelled ┤
              │ └────────────────┘                                        │
              │   retry, Snooze, release, rescue                          │
              └───────────────────────────────────────────────────────────┘
                                    Queue.retry

    Workers make all transitions except two, which callers make: `Queue.cancel`, and `Queue.retry`, which is
    the only way out of a final state. An expired task is cancelled by the worker that has claimed it, or
    while it is pending.

    A `waiting` task has not ended. It can't be claimed, not even by the Node.js original, until the tasks
    that it waits for have completed: then a worker makes it pending. It can be cancelled. A task that waits
    for others is added as `waiting`, and `Queue.retry` makes it wait again if these have not completed.
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
"""States of a task that has ended: workers never change them, but a caller may retry the task."""

TRANSITIONS: Final = {
    PENDING: {RUNNING, CANCELLED},
    WAITING: {PENDING, CANCELLED},
    RUNNING: {PENDING, COMPLETED, FAILED, CANCELLED},
    **{state: {PENDING, WAITING} for state in FINAL},
}
"""The states that a task may enter from each state."""

CANCELLABLE: Final = tuple(state for state in STATES if CANCELLED in TRANSITIONS[state])
"""The states in which a caller may cancel a task."""


def alternatives(states: Iterable[str]) -> str:
    """Return states as a list in SQL."""
    return f"({', '.join(map(repr, states))})"
