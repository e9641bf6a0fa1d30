"""Find the user's own lines in a stored traceback, which may come from another machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from rich.text import Text

import apoq

_FRAME: Final = re.compile(r'[\s|+-]*File "(?P<file>.*)", line (?P<line>\d+)(?:, in (?P<function>.*))?')
_CARETS: Final = re.compile(r"[\s|~^]*")
_LIBRARY: Final = re.compile(r"[/\\](site|dist)-packages[/\\]|[/\\]lib(64)?[/\\]python3[.\d]*[/\\]|^<")
_OURS: Final = str(Path(apoq.__file__).parent)


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
        if _is_own(match["file"]):
            following = lines[number + 1] if number + 1 < len(lines) else ""
            code = "" if _FRAME.match(following) or _CARETS.fullmatch(following) else following.strip("| ")
            found = Frame(match["file"], match["line"], match["function"] or "<module>", code)
    return found


def highlighted(lines: Sequence[str]) -> Text:
    """Return the lines with the frames of libraries dimmed, and without the marks below the code."""
    text = Text()
    style = ""
    for number, line in enumerate(lines):
        if match := _FRAME.match(line):
            style = "" if _is_own(match["file"]) else "dim"
        elif not line.startswith((" ", "|")):
            style = "dim"  # a heading, or the error, which is shown above
        elif _CARETS.fullmatch(line):
            continue
        text.append("\n" if number else "")
        text.append(line, style)
    return text


def _frames(lines: Sequence[str]) -> Iterator[tuple[int, re.Match[str]]]:
    for number, line in enumerate(lines):
        if match := _FRAME.match(line):
            yield number, match


def _is_own(file: str) -> bool:
    return not (_LIBRARY.search(file) or file.startswith(_OURS))
