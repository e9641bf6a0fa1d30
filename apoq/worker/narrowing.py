"""How many rows a statement may write at once, if the server refuses to write one of them."""

from __future__ import annotations

from typing import Any


class Narrowing:
    """Halves the batch after each refusal until the bad row stands alone, and passes over that one.

    A pass ends with a batch that wasn't full. The next one begins with the rows that were passed over.
    """

    def __init__(self, most: int) -> None:
        """Begin with batches of `most` rows."""
        self._most = self._at_most = most
        self.passed_over = 0
        """How many rows this pass has passed over."""
        self.kept = 0
        """How many rows the last pass has passed over."""

    @property
    def parameters(self) -> dict[str, Any]:
        """The next batch, as statements take it."""
        return {"at_most": self._at_most, "passed_over": self.passed_over}

    def refused(self) -> bool:
        """Note that a batch was refused; return whether it was a single row, which is now passed over."""
        if self._at_most > 1:
            self._at_most //= 2
            return False
        self.passed_over += 1
        return True

    def written(self, count: int) -> bool:
        """Note that a batch was written; return whether there may be more."""
        has_more = count == self._at_most
        if not has_more:
            self.kept, self.passed_over = self.passed_over, 0
        self._at_most = min(self._most, self._at_most * 2)
        return has_more
