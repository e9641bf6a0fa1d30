"""Says which option of `apoq grants` gives a caller's role the right that it lacks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from apoq.errors import command
from apoq.schema.grants import LIMITS, LINKS, PAUSES, PROGRESS, SCHEDULES, TASKS, THROTTLES

_SCHEDULING: Final = "--may-schedule to schedule tasks, and to pause and limit queues"

_OPTIONS: Final[Mapping[str, str]] = {
    TASKS: (
        "--may-cancel to cancel and retry tasks, and for unique keys; --may-link for `after`, chains and "
        "groups; --may-wait to read results"
    ),
    LINKS: "--may-link for `after`, chains and groups; --may-cancel to cancel and retry their tasks",
    THROTTLES: "--may-cancel for throttled tasks",
    PROGRESS: "--may-wait to read progress",
    **dict.fromkeys((SCHEDULES, PAUSES, LIMITS), _SCHEDULING),
}
"""The options of producers that give rights on a table."""


def what_to_grant(error: Any) -> str:
    """Return what a role needs to which the server has denied something; `error` is psycopg's."""
    denied = re.search(r"\bapoq_\w+", error.diag.message_primary or "")
    options = _OPTIONS.get(denied[0]) if denied else None
    more = f", with {options}" if options else ""
    return (
        f"The role needs what `{command('grants')} --producer ROLE` prints{more}. `{command('doctor')} "
        "--producer ROLE` with the same options names what it lacks."
    )
