"""Data as people may see it: without secrets, and not longer than a page can be."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NamedTuple, TypeAlias

from apoq.core.payload import canonical
from apoq.monitor.formatting import is_printable

logger = logging.getLogger("apoq.dashboard")

Redact: TypeAlias = Callable[[str, Any], Any]
"""A function that takes the type and the data of a task, and returns the data that may be seen."""

SECRET_KEYS: Final = re.compile(
    r"passw|token|secret|authorization|card|api[-_ ]?key|credential", re.IGNORECASE
)
"""Keys whose values are hidden, wherever they are in the data."""

HIDDEN: Final = "[hidden]"

MAX_SHOWN: Final = 10_000
"""Characters of data, or of an error, that are shown."""


class Shown(NamedTuple):
    """A text for a page."""

    text: str
    is_cut: bool = False
    is_note: bool = False
    """Whether it is not the data, but says why that isn't shown."""


class Redactor:
    """Hides values before they leave the process."""

    def __init__(self, redact: Redact | None = None) -> None:
        self._redact = redact

    def data(self, type_: str, stored: str | None, size: int | None) -> Shown:
        """Return the data of a task, from its JSON; None stands for data that are too large to read."""
        return self._shown(type_, stored, size, self._redact, indent=2)

    def excerpt(self, type_: str, stored: str | None, size: int | None, at_most: int = 160) -> Shown:
        """Return the beginning of the data in one line; nothing if they are empty."""
        if stored == "{}":
            return Shown("")
        shown = self._shown(type_, stored, size, self._redact, indent=None)
        if len(shown.text) <= at_most:
            return shown
        return Shown(f"{shown.text[:at_most]}…", is_cut=True, is_note=shown.is_note)

    def key(self, key: str) -> str:
        """Return a unique key; apoq makes those of typed tasks of the type and the JSON of the arguments."""
        type_, separator, arguments = key.partition(":{")
        if not separator:
            return printable(key)
        shown = HIDDEN
        if self._redact is None:
            with suppress(ValueError, RecursionError):  # such as of a long key, which ends within the JSON
                shown = canonical(_without_secrets(json.loads(f"{{{arguments}")))
        return printable(f"{type_}:{shown}")

    def plain(self, stored: str | None, size: int | None) -> Shown:
        """Return other JSON of a task, such as its `meta`."""
        return self._shown("", stored, size, None, indent=2)

    def _shown(
        self, type_: str, stored: str | None, size: int | None, redact: Redact | None, indent: int | None
    ) -> Shown:
        if stored is None:
            return Shown(f"{(size or 0) / 1024:,.0f} kB, not shown here", is_note=True)
        try:
            value = json.loads(stored)
            if redact is not None:
                value = self._redacted(redact, type_, value)
            text = json.dumps(_without_secrets(value), ensure_ascii=False, indent=indent, default=repr)
        except _Failed:
            return Shown("not shown, because redact= failed", is_note=True)
        except (ValueError, RecursionError):
            return Shown("not shown, because Python can't read it", is_note=True)
        return cut(text)

    def _redacted(self, redact: Redact, type_: str, value: Any) -> Any:
        try:
            return redact(type_, value)
        except Exception as error:
            logger.exception(
                "redact raised an exception for a task of type %r: its data are not shown", type_
            )
            raise _Failed from error


class _Failed(Exception):
    """The application's function has raised an exception."""


def cut(text: str) -> Shown:
    """Return the beginning of a text."""
    text = printable(text)
    return Shown(text) if len(text) <= MAX_SHOWN else Shown(text[:MAX_SHOWN], is_cut=True)


def printable(text: str) -> str:
    """Replace characters that can't be seen, such as those that change the direction of a text."""
    return "".join(c if is_printable(c) or c in "\n\t" else "�" for c in text)


def _without_secrets(value: Any) -> Any:
    match value:
        case dict():
            return {
                str(key): HIDDEN if SECRET_KEYS.search(str(key)) else _without_secrets(item)
                for key, item in value.items()
            }
        case list() | tuple():
            return [_without_secrets(item) for item in value]
    return value
