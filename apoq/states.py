"""The states of a task, and how it moves between them.

.. code-block:: text

                      claim                      complete
    (add) ─▶ pending ───────▶ running ──────────────────────▶ completed
                ▲                │ ├── fail, retries used up ─▶ failed
                └────────────────┘ └── Cancel ──────────────▶ cancelled
                 retry, Snooze,
                 release, rescue
"""

from __future__ import annotations

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
