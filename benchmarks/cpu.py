"""The CPU time of a server on this machine, by Linux's /proc."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import psycopg

NAME: Final = "postgres"


def server_cpu(connection: psycopg.Connection[Any]) -> float | None:
    """Return the CPU seconds that all processes of the server have used; None if it runs elsewhere.

    Backends that have ended are included, because the postmaster has waited for them.
    """
    postmaster = _parent(connection.info.backend_pid)
    if postmaster is None:
        return None
    user, system, waited_user, waited_system = _times(postmaster)
    children = sum(sum(_times(child)[:2]) for child in _children(postmaster))
    return (user + system + waited_user + waited_system + children) / os.sysconf("SC_CLK_TCK")


def _parent(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[1]) if fields and Path(f"/proc/{pid}/comm").read_text().strip() == NAME else None


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _times(pid: int) -> list[int]:
    """Return the clock ticks of a process: user, system, and both of the children that it has waited for."""
    fields = _stat(pid)
    return [int(field) for field in fields[11:15]] if fields else [0, 0, 0, 0]


def _stat(pid: int) -> list[str]:
    """Return the fields after the process's name; none if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []
