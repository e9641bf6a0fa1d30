"""Tasks of 100 ms that leak 5 MB each, and others that free it, for the scenario `recycling`."""

from __future__ import annotations

import time
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap
from typing import Final

from apoq import Queue

SECONDS: Final = 0.1
SIZE: Final = 5 * 2**20

queue = Queue()
leaked: list[mmap] = []


@queue.task(type="leaks")
def leaks() -> None:
    leaked.append(_memory())
    time.sleep(SECONDS)


@queue.task(type="frees")
def frees() -> None:
    with _memory():
        time.sleep(SECONDS)


def _memory() -> mmap:
    """Return new memory that is resident, because each page of it has been written to."""
    memory = mmap(-1, SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    memory[::PAGESIZE] = bytes(SIZE // PAGESIZE)
    return memory
