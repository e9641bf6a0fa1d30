"""Encodes what a processor returns, so that it can be stored with the task."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any, Final

from apoq.core.options import integer
from apoq.core.payload import encode
from apoq.errors import InvalidData, InvalidProcessor, InvalidTask, glimpse

MAX_RESULT_SIZE: Final = 64 * 1024
"""Maximum size of a result in bytes of JSON, unless its processor has another limit."""

HIGHEST_RESULT_SIZE: Final = 1024 * 1024
"""The highest such limit: results are read and written with the tasks of a whole batch."""

NAME: Final = "result"
"""How a message names the value, as in ``result['rows']``."""


@dataclass(frozen=True, slots=True)
class ResultEncoder:
    """Encodes the results of one processor."""

    max_size: int

    def encode(self, value: Any) -> str:
        """Return a result as JSON text for jsonb; `InvalidData` if it can't be stored or is too large."""
        text = encode(value, sys.maxsize, NAME)
        size = len(text.encode())
        if size > self.max_size:
            raise InvalidData(
                NAME,
                f"{size:,} bytes of JSON exceed max_result_size, {self.max_size:,}: write large results to "
                "a table of your own with task.session, and return their key",
            )
        # In ASCII: a character that the database's encoding lacks is then an error, and isn't replaced.
        return text if text.isascii() else json.dumps(value, separators=(",", ":"))


def result_encoder(keep_result: object, max_result_size: object) -> ResultEncoder | None:
    """Return the encoder for the options of a processor; None if its results aren't kept.

    Raises `InvalidProcessor` if an option is invalid.
    """
    if not isinstance(keep_result, bool):
        raise InvalidProcessor(f"keep_result must be True or False, got {glimpse(keep_result)}")
    if max_result_size is None:
        return ResultEncoder(MAX_RESULT_SIZE) if keep_result else None
    if not keep_result:
        raise InvalidProcessor("max_result_size must be given together with keep_result=True")
    try:
        return ResultEncoder(integer("max_result_size", max_result_size, 1, HIGHEST_RESULT_SIZE))
    except InvalidTask as error:
        raise InvalidProcessor(str(error)) from None
