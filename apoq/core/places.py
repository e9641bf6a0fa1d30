"""Decides which tasks may begin under limits: pure functions, without a database.

A task has up to two places: one of its key, and one of its type or queue (its pool). A place is a number
below the limit. A unique index forbids that two running tasks have the same place. So no more tasks can run
than there are places, even if this module decided wrongly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

KEY: Final = "key"
POOL: Final = "pool"

WHOLE_QUEUE: Final = ""
"""The pool of a queue with a limit; the pool of a type with a limit is the type."""


Order = tuple[int, float, int]
"""The place of a task in a line: its priority, negative, when it is due, and its id."""


class Candidate(NamedTuple):
    """A task that is due."""

    id: int
    type: str
    key: str | None
    priority: int
    process_at: float
    """In seconds since 1970."""
    may_run: bool = True
    """Whether this worker may run tasks of this type now."""
    waits_for: str | None = None
    """For a waiting task, the kind of place that it waits for."""

    @property
    def order(self) -> Order:
        """Its place in the line."""
        return -self.priority, self.process_at, self.id

    @property
    def awaited(self) -> Share:
        """For a waiting task, the key or pool that it waits for."""
        name = self.key if self.waits_for == KEY else self.type
        return Share(self.waits_for or "", name or "")


class Share(NamedTuple):
    """The places of a key or a pool."""

    kind: str
    """`KEY` or `POOL`."""
    name: str


class Rule(NamedTuple):
    """A limit that is in force."""

    at_most: int
    is_strict: bool = False
    holds: bool = False
    """Whether a failed task of a strict key holds up the others."""


class Rules:
    """The limits of a queue, as far as they concern some tasks."""

    def __init__(
        self,
        types: Mapping[str, Rule] | None = None,
        keyed_types: Mapping[str, Rule] | None = None,
        keys: Mapping[str, Rule] | None = None,
        whole: Rule | None = None,
    ) -> None:
        """`types`: limits of types; `keyed_types`: of the keys of types; `keys`: of single keys."""
        self._types = types or {}
        self._keyed_types = keyed_types or {}
        self._keys = keys or {}
        self._whole = whole

    @property
    def limited_types(self) -> frozenset[str]:
        """The types that have limits of their own, so that they don't count towards that of the queue."""
        return frozenset(self._types)

    def of_key(self, task: Candidate) -> Rule | None:
        """Return the limit of a task's key; that of the key itself wins over that of its type."""
        if task.key is None:
            return None
        of_type = self._keyed_types.get(task.type)
        own = self._keys.get(task.key)
        if own is None or of_type is None:
            return own or of_type
        return of_type._replace(at_most=own.at_most)

    def pool_of(self, task: Candidate) -> tuple[str, Rule] | None:
        """Return the pool of a task and its limit; a type's own limit wins over that of the queue."""
        if (of_type := self._types.get(task.type)) is not None:
            return task.type, of_type
        return None if self._whole is None else (WHOLE_QUEUE, self._whole)

    def shares_of(self, task: Candidate) -> list[tuple[Share, Rule]]:
        """Return the places that a task needs, each with its limit."""
        shares: list[tuple[Share, Rule]] = []
        if task.key is not None and (rule := self.of_key(task)) is not None:
            shares.append((Share(KEY, task.key), rule))
        if (pool := self.pool_of(task)) is not None:
            shares.append((Share(POOL, pool[0]), pool[1]))
        return shares


class Placed(NamedTuple):
    """A task that may begin, with its places."""

    task: Candidate
    slot: int | None
    pool: str | None
    pool_slot: int | None


class Blocked(NamedTuple):
    """A task that has to wait for a place."""

    task: Candidate
    share: Share


class Decision(NamedTuple):
    """The tasks that may begin, and those that may not."""

    placed: list[Placed]
    blocked: list[Blocked]
    left: list[Candidate]
    """Tasks that remain as they are, because of the worker and not because of a limit."""
    full: set[Share]
    """The shares of which no place is free."""


class State(NamedTuple):
    """The places that are held, and those that may be given away."""

    held: Mapping[Share, Iterable[int]]
    """The places that running tasks hold, read after the locks were taken."""
    locked: frozenset[Share]
    """The shares whose places this transaction may give away."""
    awaited: Mapping[Share, Order] = {}
    """For each share that tasks wait for, the first of them."""
    first_ids: Mapping[str, int] = {}
    """For each strict key, the id of the first of its tasks that has not ended."""


def decide(candidates: Iterable[Candidate], rules: Rules, state: State, room: int) -> Decision:
    """Give places to tasks in their order, up to `room` of them.

    Tasks whose key or pool is full are blocked. No task is blocked by the limit of a whole queue: claims take
    fewer tasks of such a queue instead. And as long as a queue is full, none of its tasks is blocked by its
    key, whose place may be free.
    """
    free = _FreePlaces(state.held)
    placed: list[Placed] = []
    blocked: list[Blocked] = []
    left: list[Candidate] = []
    full: set[Share] = set()
    for task in candidates:
        shares = rules.shares_of(task)
        if not task.may_run or any(not _is_known(task, share, rule, state) for share, rule in shares):
            left.append(task)
            continue
        if task.waits_for is None:  # otherwise it waits for its key, and keeps its place in that line
            shares.sort(key=lambda each: each[0].name != WHOLE_QUEUE)
        slots: dict[Share, int] = {}
        missing: Share | None = None
        for share, rule in shares:
            slot = free.first(share, rule)
            if slot is None or not _is_next(task, share, rule, state):
                missing = share
                break
            slots[share] = slot
        if missing is None and len(placed) < room:
            free.take(slots)
            placed.append(_placed(task, slots))
        elif missing is None or missing == Share(POOL, WHOLE_QUEUE):
            left.append(task)
        else:
            blocked.append(Blocked(task, missing))
        if missing is not None:
            full.add(missing)
    return Decision(placed, blocked, left, full)


def _placed(task: Candidate, slots: Mapping[Share, int]) -> Placed:
    of_key = of_pool = pool = None
    for share, slot in slots.items():
        if share.kind == KEY:
            of_key = slot
        else:
            of_pool, pool = slot, share.name
    return Placed(task, of_key, pool, of_pool)


def _is_known(task: Candidate, share: Share, rule: Rule, state: State) -> bool:
    """Return whether a task can be placed or blocked.

    A task that comes after others that wait needs no lock to be blocked, unless the order is strict.
    """
    return share in state.locked or not (rule.is_strict or _comes_first(task, share, state))


def _is_next(task: Candidate, share: Share, rule: Rule, state: State) -> bool:
    """Return whether no other task comes before this one."""
    if rule.is_strict and share.kind == KEY:
        return state.first_ids.get(share.name, task.id) >= task.id
    return _comes_first(task, share, state)


def _comes_first(task: Candidate, share: Share, state: State) -> bool:
    first = state.awaited.get(share)
    return first is None or task.order < first


class _FreePlaces:
    """The free places, from those that are held."""

    def __init__(self, held: Mapping[Share, Iterable[int]]) -> None:
        self._held = {share: set(slots) for share, slots in held.items()}

    def first(self, share: Share, rule: Rule) -> int | None:
        """Return the lowest free place, if there is one.

        After a limit was lowered, no place is free as long as a task runs in one that is too high.
        """
        held = self._held.get(share)
        if not held:
            return 0 if rule.at_most else None
        if max(held) >= rule.at_most:
            return None
        return next((slot for slot in range(rule.at_most) if slot not in held), None)

    def take(self, slots: Mapping[Share, int]) -> None:
        for share, slot in slots.items():
            self._held.setdefault(share, set()).add(slot)
