"""Show the user's own lines in a traceback."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from apoq.monitor.tracebacks import CARETS, FRAME, is_own


def highlighted(lines: Sequence[str]) -> Text:
    """Return the lines with the frames of libraries dimmed, and without the marks below the code."""
    text = Text()
    style = ""
    for number, line in enumerate(lines):
        if match := FRAME.match(line):
            style = "" if is_own(match["file"]) else "dim"
        elif not line.startswith((" ", "|")):
            style = "dim"  # a heading, or the error, which is shown above
        elif CARETS.fullmatch(line):
            continue
        text.append("\n" if number else "")
        text.append(line, style)
    return text
