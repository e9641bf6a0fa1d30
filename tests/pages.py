"""The pages of the documentation, and the code in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]

_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block of code, and the number of its first line on the page."""

    language: str
    line: int
    code: str


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    """Find the blocks of a page that are in one of these languages; without one, all."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        indent, language, code = match.groups()
        if not languages or language in languages:
            line = text.count("\n", 0, match.start()) + 2
            yield Block(language, line, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE))


def prose(page: Path) -> str:
    """Answer a page without its blocks of code."""
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


def run(page: Path, module: ModuleType) -> None:
    """Run the ```python blocks of a page, one after the other, in this module."""
    for block in blocks(page, "python"):
        # So that a traceback names the page and its line.
        code = "\n" * (block.line - 1) + block.code
        exec(compile(code, str(page), "exec", dont_inherit=True), vars(module))
