"""The names of the commands, in a module that imports nothing else."""

from __future__ import annotations

from typing import Final

COMMANDS: Final = {
    "worker": "Run a worker until SIGINT (Ctrl-C) or SIGTERM.",
    "migrate": "Create apoq's tables, or upgrade them.",
    "revision": "Write a revision for apoq's tables into your Alembic history.",
    "check": "Check that the tables match this version of apoq.",
    "doctor": "Check the server, the tables and the workers, and say what to do.",
    "add": "Add a task.",
    "list": "List tasks, the newest first.",
    "show": "Show everything that is known about a task.",
    "failures": "Group the failed tasks by type, error and place, the largest group first.",
    "retry": "Run tasks again that failed, were cancelled or completed.",
    "cancel": "Cancel tasks that have not ended.",
    "pause": "Pause a queue: no worker claims its tasks until `apoq resume`.",
    "resume": "End a pause: workers claim the tasks of the queue again.",
    "keys": "List the concurrency keys, types and queues with limits of which tasks run or wait.",
    "limits": "List the limits, or set or remove one.",
    "prune": "Delete tasks that ended some time ago.",
    "schedules": "List the schedules, or pause, resume, run or remove one of them.",
    "groups": "List groups of tasks, with the states of their tasks, the newest first.",
    "stats": "Show the tasks of each queue by their state, and the workers.",
    "grants": "Print the GRANT statements for roles that add, run, read or manage tasks.",
    "metrics": "Serve metrics of the queues and workers for Prometheus.",
    "health": "Check that a worker on this machine works; for the health checks of containers.",
    "dashboard": "See and steer the queue in a browser.",
    "demo": "Watch apoq work on a private PostgreSQL server.",
}
"""The commands, in the order of the help. The module ``apoq.cli.<name>`` has the `command`."""

EXITS: Final = "Exit codes: 0 success, 1 failure, 2 usage error, 3 database unreachable, 4 tables outdated."
"""The exit codes of every command, for the help."""
