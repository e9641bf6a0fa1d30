"""The database of a worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Engine

from apoq.client.queue import Queue
from apoq.worker.failures import Outage
from apoq.worker.lease import Lease


@dataclass(frozen=True)
class WorkerDatabase:
    """The engine, queues and leases that the services of a worker share for statements of their own."""

    engine: Engine
    """The worker's own, not that of ``task.session``."""
    queues: tuple[Queue, ...]
    leases: Mapping[str | None, Lease]
    """The lease in each of the schemas of these queues."""
    outage: Outage
    sharded: set[str | None]
    """The schemas that Citus shards, as far as it is known.

    There, no statement waits for a locked task, because no timeout would end that.
    """

    @property
    def schemas(self) -> tuple[str | None, ...]:
        """The schemas of the queues."""
        return tuple(self.leases)

    def leased_schemas(self) -> list[str | None]:
        """Return the schemas in which the worker holds its lease now."""
        return [schema for schema, lease in self.leases.items() if lease.is_held]

    def queues_of(self, schema: str | None) -> list[Queue]:
        """Return the queues in a schema."""
        return [queue for queue in self.queues if queue.schema == schema]
