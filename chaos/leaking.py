"""Tasks of 100 ms that leak 5 MB each, and others that free it, for the scenario `recycling`."""

from __future__ import annotations

import time
from typing import Final

from apoq import Queue

SECONDS: Final = 0.1
MEGABYTES: Final = 5

queue = Queue()
leaked: list[bytes] = []


@queue.task(type="leaks")
def leaks() -> None:
    leaked.append(_memory())
    time.sleep(SECONDS)


@queue.task(type="frees")
def frees() -> None:
    _memory()
    time.sleep(SECONDS)


def _memory() -> bytes:
    """Return memory that is written to, so that it is resident."""
    return b"x" * (MEGABYTES * 2**20)
