"""Find the user's own lines in a stored traceback, which may come from another machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

FRAME: Final = re.compile(r'[\s|+-]*File "(?P<file>.*)", line (?P<line>\d+)(?:, in (?P<function>.*))?')
CARETS: Final = re.compile(r"[\s|~^]*")
_LIBRARY: Final = re.compile(r"[/\\](site|dist)-packages[/\\]|[/\\]lib(64)?[/\\]python3[.\d]*[/\\]|^<")
_OURS: Final = str(Path(__file__).parent.parent)


class Frame(NamedTuple):
    """A frame of a traceback."""

    file: str
    line: str
    function: str
    code: str


def own_frame(lines: Sequence[str]) -> Frame | None:
    """Return the innermost frame of the user's own code in the last traceback of these lines, if any."""
    found = None
    for number, match in _frames(lines):
        if is_own(match["file"]):
            following = lines[number + 1] if number + 1 < len(lines) else ""
            code = "" if FRAME.match(following) or CARETS.fullmatch(following) else following.strip("| ")
            found = Frame(match["file"], match["line"], match["function"] or "<module>", code)
    return found


def _frames(lines: Sequence[str]) -> Iterator[tuple[int, re.Match[str]]]:
    for number, line in enumerate(lines):
        if match := FRAME.match(line):
            yield number, match


def is_own(file: str) -> bool:
    """Return whether a file has code of the user's, not of a library or of apoq."""
    return not (_LIBRARY.search(file) or file.startswith(_OURS))
