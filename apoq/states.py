"""The states of a task, and how it moves between them.

.. code-block:: text

                      claim                      complete
    (add) ─▶ pending ───────▶ running ──────────────────────▶ completed
                ▲                │ ├── fail, retries used up ─▶ failed
                └────────────────┘ └── Cancel ──────────────▶ cancelled
                 retry, Snooze,
                 release, rescue

    What callers do: `Queue.cancel` takes a task from pending or running to cancelled, and `Queue.retry`
    from completed, failed or cancelled back to pending.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

PENDING: Final = "pending"
RUNNING: Final = "running"
COMPLETED: Final = "completed"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"

STATES: Final = (PENDING, RUNNING, COMPLETED, FAILED, CANCELLED)

TRANSITIONS: Final = {
    PENDING: {RUNNING},
    RUNNING: {PENDING, COMPLETED, FAILED, CANCELLED},
    COMPLETED: set[str](),
    FAILED: set[str](),
    CANCELLED: set[str](),
}
"""Where a worker may take a task from each state; from a state with no exits it never moves a task."""

FINAL: Final = tuple(state for state in STATES if not TRANSITIONS[state])
"""Where a task has ended: from here a caller may retry it."""

CANCELLABLE: Final = tuple(state for state in STATES if TRANSITIONS[state])
"""From where a caller may cancel it."""


def alternatives(states: Iterable[str]) -> str:
    """Write states as a list in SQL."""
    return f"({', '.join(map(repr, states))})"
