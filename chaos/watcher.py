"""Watches a scenario: whether tasks are completed at the offered rate, and since when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import psycopg

from chaos.server import Server

WORKERS = 3

MAX_OF_KEY = 2
"""Tasks of a concurrency key that may run at once."""

FULL_SHARE = 0.8
"""Share of the tasks offered in a second that must be completed in it, to count as full speed."""

MIN_OFFERED_SHARE = 0.25
"""Share of the rate that must have been offered; on a busy machine, not all of it is."""

SAMPLE = """
    SELECT
        (SELECT sum(last_value)::bigint FROM pg_sequences WHERE sequencename = 'apoq_tasks_id_seq'),
        (SELECT count(*) FROM tasks WHERE queue = 'default' AND indexed_state = 'completed'
            AND completed_at > now() - interval '1 s'),
        (SELECT count(DISTINCT worker_id) FROM tasks WHERE queue = 'default' AND indexed_state = 'completed'
            AND completed_at > now() - interval '2 s'),
        (SELECT coalesce(extract(epoch FROM now() - min(process_at)), 0) FROM tasks
            WHERE indexed_state IS NULL AND state = 'pending' AND process_at <= now()),
        (SELECT coalesce(max(number), 0) FROM (
            SELECT count(*) AS number FROM apoq_tasks WHERE held_key IS NOT NULL GROUP BY queue, held_key
        ) AS of_keys)
"""
"""Read by the partial indexes, so that it stays cheap when there are millions of rows."""

LEFT = """
    SELECT id FROM apoq_tasks JOIN unnest(%s::bigint[], %s::bigint[]) AS held (id, token) USING (id)
    WHERE state <> 'completed' AND (state = 'pending' OR apoq_tasks.claim_token = held.token)
"""
"""The tasks of a victim that have neither started again nor been completed."""


@dataclass
class Victim:
    """The tasks that a worker held at the time of a fault, and the seconds until they ran again."""

    since: float
    ids: list[int]
    tokens: list[int]
    seconds: float | None = None


class Sample(NamedTuple):
    """The state at a point in time."""

    when: float
    is_full: bool
    """Whether the offered tasks are completed immediately."""
    all_work: bool
    """Whether, in addition, each worker completes some of them."""


class Watcher:
    """Reads ten times per second how many tasks were offered and completed, and checks the victims' tasks."""

    def __init__(self, database: str, rate: float, server: Callable[[], Server]) -> None:
        self.victims: list[Victim] = []
        self.most_of_key = 0
        """The most tasks of a concurrency key that were running at once."""
        self._database = database
        self._rate = rate
        self._server = server
        self._samples: list[Sample] = []
        self._is_watching = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._is_watching = False
        self._thread.join()

    @property
    def left(self) -> list[Victim]:
        """The victims with tasks that have not started again."""
        return [victim for victim in self.victims if victim.seconds is None]

    def since(self, moment: float, lasting: float, is_so: Callable[[Sample], bool]) -> float | None:
        """Return how long after a moment a condition became true, if it has lasted; else None."""
        began = None
        for sample in self._samples:
            if sample.when >= moment:
                if not is_so(sample):
                    began = None
                elif began is None:
                    began = sample.when
                elif sample.when - began >= lasting:
                    return began - moment
        return None

    def _watch(self) -> None:
        known: list[tuple[float, int]] = []
        while self._is_watching:
            server = self._server()
            with suppress(psycopg.Error), server.admin(self._database) as admin:
                admin.execute("SET statement_timeout = '2s'; SET enable_seqscan = off")
                while self._is_watching and self._server() is server:
                    row = admin.execute(SAMPLE).fetchone() or (0, 0, 0, 0, 0)
                    last, completed, workers, age, of_key = row
                    self.most_of_key = max(self.most_of_key, of_key)
                    now = time.monotonic()
                    known = [(when, id_) for when, id_ in known if now - when <= 1] + [(now, last)]
                    offered = last - known[0][1]
                    is_flowing = (
                        offered > MIN_OFFERED_SHARE * self._rate and completed >= FULL_SHARE * offered
                    )
                    is_full = is_flowing and age < 1
                    self._samples.append(Sample(now, is_full, is_full and workers >= WORKERS))
                    for victim in self.left:
                        if not admin.execute(LEFT, (victim.ids, victim.tokens)).fetchone():
                            victim.seconds = time.monotonic() - victim.since
                    time.sleep(0.1)
            self._samples.append(Sample(time.monotonic(), is_full=False, all_work=False))
            time.sleep(0.1)
