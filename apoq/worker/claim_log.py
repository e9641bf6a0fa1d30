"""The tasks that the worker holds, and the notes of its claims in the database."""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count, repeat
from operator import itemgetter
from typing import Final

from apoq.schema.statements.claim import CLAIM
from apoq.worker.execution.attempt import Claimed
from apoq.worker.places import Places

MIN_FORGOTTEN: Final = 16
"""Notes that one statement deletes, at least: to delete each by itself would double the statements."""


@dataclass
class _Left:
    schema: str | None
    size: int


class ClaimLog:
    """Knows which tasks the worker holds, and which notes of its claims are no longer needed.

    Each claim writes a note with the ids of its tasks, by which other workers find them if this one dies.
    """

    def __init__(self, places: Places) -> None:
        """`places` hands over the places of tasks that are no longer held."""
        self._places = places
        self._held: dict[int, Claimed] = {}
        # By the `id()` of the row: a task may be claimed again while its last attempt still runs, and tasks
        # of different schemas may have the same id.
        self._lock = threading.Lock()
        # Not from 1: no other program should be able to guess the number of the next claim, and take it.
        self._numbers = count(secrets.randbits(48))
        self.latest = 0
        """The number of the claim that has begun last."""
        self._under_way: dict[int, str | None] = {}
        self._left: dict[int, _Left] = {}
        self._done: dict[str | None, list[int]] = {}

    def begin(self, schema: str | None) -> int:
        """Return the number of the next claim, which is under way until `claimed` or `failed` is called."""
        with self._lock:
            number = self.latest = next(self._numbers)
            self._under_way[number] = schema
        return number

    def known(self, schema: str | None) -> list[int]:
        """Return the claims whose notes may be there, as far as the worker knows."""
        with self._lock:
            known = [number for number, its in self._under_way.items() if its == schema]
            known += [number for number, left in self._left.items() if left.schema == schema]
            return known + self._done.get(schema, [])

    def done(self, schema: str | None) -> list[int]:
        """Return the claims whose tasks are all settled, and whose notes can be deleted: none, or many."""
        with self._lock:
            done = self._done.get(schema, ())
            return list(done) if len(done) >= MIN_FORGOTTEN else []

    def leftover(self, schema: str | None) -> list[int]:
        """Return the claims of `done`, however few, if the worker holds and claims nothing in the schema."""
        with self._lock:
            is_used = schema in self._under_way.values() or any(
                left.schema == schema for left in self._left.values()
            )
            return [] if is_used else list(self._done.get(schema, ()))

    def claimed(self, number: int, size: int) -> None:
        """Remember how many tasks a claim has taken."""
        with self._lock:
            schema = self._under_way.pop(number)
            if size:
                self._left[number] = _Left(schema, size)
            else:
                # There may be a note all the same, of tasks that another session has just changed.
                self._done.setdefault(schema, []).append(number)

    def failed(self, number: int) -> None:
        """Forget a claim that has failed; if it commits nevertheless, its tasks are strays."""
        with self._lock:
            del self._under_way[number]

    def hold(self, tasks: list[Claimed]) -> None:
        """Remember tasks that were claimed, until they are settled."""
        self._held.update(zip(map(id, tasks), tasks, strict=True))

    def held(self) -> list[Claimed]:
        """Return the tasks that were claimed and aren't settled yet."""
        return list(self._held.values())

    def holds(self, task: Claimed) -> bool:
        """Return whether a task isn't settled yet."""
        return id(task) in self._held

    def settled(self, tasks: list[Claimed]) -> None:
        """Forget tasks whose results have been written."""
        self._places.settled(tasks)
        # Without a loop in Python, which would be a part of each task's time.
        known = filter(None, map(self._held.pop, map(id, tasks), repeat(None)))
        claims = Counter(map(itemgetter(CLAIM), known))
        with self._lock:
            for claim, size in claims.items():
                number = claim.number
                left = self._left[number]
                left.size -= size
                if left.size == 0:
                    del self._left[number]
                    self._done.setdefault(left.schema, []).append(number)

    def given_up(self, task: Claimed) -> None:
        """Forget a task whose result can't be written: its note leads other workers to it later."""
        self._held.pop(id(task), None)

    def forgotten(self, schema: str | None, numbers: Iterable[int]) -> None:
        """Remember that the notes of these claims are gone."""
        with self._lock:
            self._done[schema] = [number for number in self._done.get(schema, ()) if number not in numbers]
