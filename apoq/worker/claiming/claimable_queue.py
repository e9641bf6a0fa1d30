"""A queue of the worker, and what its claims need to know."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from apoq.client.queue import Queue
from apoq.core.registry import Processor, Registry
from apoq.schema.statements.queues import at_most_text, limits_text, queue_text
from apoq.worker.claiming.cursor import ClaimCursor
from apoq.worker.lease import Lease


class ClaimableQueue:
    """The tasks of a queue, with their processors, the cursor, and the worker's lease in the schema."""

    def __init__(
        self,
        queue: Queue,
        cursor: ClaimCursor,
        lease: Lease,
        registry: Registry,
        *,
        is_keyed: bool = False,
    ) -> None:
        """`is_keyed`: these are its tasks with concurrency keys, and otherwise its tasks without."""
        self.queue = queue
        self.is_keyed = is_keyed
        self.cursor = cursor
        self.lease = lease
        self._registry = registry
        self._version: int | None = None
        self._processors: Mapping[str, Processor] = {}
        self._text = self._limits_text = ""

    def __repr__(self) -> str:
        return repr(self.queue)

    @property
    def processors(self) -> Mapping[str, Processor]:
        """The processors, by type."""
        self._look()
        return self._processors

    @property
    def needs_places(self) -> bool:
        """Whether its tasks may need places before they begin."""
        return self.is_keyed or self.cursor.is_limited

    def text(self, at_most: int, types: Collection[str] | None = None) -> tuple[str, str, str]:
        """Return the queue, its positions, and how many tasks to claim, as a statement is given them.

        Of all of its types, or only of those among `types`.
        """
        self._look()
        text = self._text
        if types is not None:
            text = queue_text(self.queue.name, [each for each in self._processors if each in types])
        return text, self.cursor.text(is_keyed=self.is_keyed), at_most_text(at_most)

    @property
    def limits_text(self) -> str:
        """The retry limits of its types, as a statement is given them."""
        self._look()
        return self._limits_text

    def _look(self) -> None:
        version = self._registry.version
        if self._version != version:
            processors = self._registry.of(self.queue)
            self._text = queue_text(self.queue.name, processors)
            self._limits_text = retry_limits(self.queue, processors)
            self._processors = processors
            self._version = version


def retry_limits(queue: Queue, processors: Mapping[str, Processor]) -> str:
    """Return the retry limits of a queue's types, as a statement is given them."""
    return limits_text(queue.name, {type_: its.policy.limit for type_, its in processors.items()})
