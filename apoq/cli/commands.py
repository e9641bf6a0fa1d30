"""The names of the commands, for all that imports nothing else."""

from __future__ import annotations

from typing import Final

COMMANDS: Final = {
    "worker": "Work tasks: run a worker until it is told to stop.",
    "migrate": "Bring apoq's tables up to date.",
    "revision": "Write a revision for apoq's tables into your own Alembic history.",
    "check": "Tell whether database, library and model agree.",
    "doctor": "Examine server, tables and workers, and say what to mend.",
    "add": "Add a task.",
    "list": "List tasks, the newest first.",
    "show": "Show all that is known of a task.",
    "retry": "Run tasks again that have ended.",
    "cancel": "Cancel tasks that are pending or running.",
    "prune": "Delete tasks that ended long ago.",
    "stats": "Show queues and workers: how much waits, runs and has ended.",
    "demo": "Show what apoq does, on a private PostgreSQL.",
}
"""What each command does, in the order of the help. The module ``apoq.cli.<name>`` has it as `command`."""

EXITS: Final = "Exit codes: 0 done, 1 no or failed, 2 usage, 3 database unreachable, 4 tables not up to date."
"""Those of every command, for its help."""
