"""Words that have a plain replacement, and the texts in which they are looked for.

``python tests/words.py [ROOT]`` prints the words in a checkout, and the share of public docstrings with one.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import griffe

ROOT = Path(__file__).parent.parent

WORDS: dict[str, str] = {
    r"\banswer(s|ed|ing)?\b": "return(s); of a server: respond(s), the response",
    r"\btells? whether\b": "return whether",
    r"\b(be|been|is|are|was|were) told\b|\btold (of|to)\b|\btells? of\b": "is notified, reported, signalled",
    r"\b(any|every|some)body\b|(?<!user )\bnobody\b|\bwho(m)?ever\b": "another session, the caller",
    r"\bwhatever\b": "say which: its result, any value",
    r"(?<!there )\b(is|are|was|were) no (?!longer\b|more\b)": "is not a …, must be a …",
    r"\bhear(s|d|ing)?\b": "is notified, receives, has listeners; of a server: responds",
    r"\bin vain\b": "without a result",
    r"\blest\b": "so that … not",
    r"\banew\b": "again",
    r"\bmend(s|ed|ing)?\b": "fix, repair",
    r"\bmaim(s|ed)?\b": "stopped; name what doesn't work",
    r"\bbefall(s|en)?\b": "happens to",
    r"\bheed(s|ed)?\b": "used, respected",
    r"\bfarewell\b": "shutdown",
    r", for (it|they|this|that|there|what|one|the \w+ (is|are|was|has|have))\b": "because",
    r"\bbesides?\b": "in addition to, next to, at the same time as",
    r"\bwhat (it|they|this) comes? to\b|\bcomes? short\b": "its result; is not enough",
    r"\bone and the same\b": "the same",
    r"(\b(raises?|raised|error|None|False|True)|`) where\b": "if",
    r"\bwhere (it|they|that|one|there|none|no|an?) (is|are|isn't|aren't|has|have|was|can|can't)\b": "if",
    r"\b(of|from|with|by|to|for|and|but|or) what (is|are|was|were|has|have|had|runs?|waits?|it|they)\b": (
        "name the thing: the running tasks, the result"
    ),
    r"(?m)^What (?!.*\?)": "begin with a noun or a verb",
    r"\b(is|are|was|were) (not )?to be\b": "must (not) be, will be",
    r"\b(to|can|could|can't) be had\b": "is available",
    r"\b(make|makes|made) no sense\b": "is invalid",
    r"\bas it stands\b|\bstands? (before|beside)\b": "as it is; overrides",
    r"\bbe it\b": "whether",
    r"\bfinds? out\b": "detects, learns",
}
"""Regular expressions, without regard to case, and what to write instead."""

_WORDS = [(re.compile(pattern, re.IGNORECASE), instead) for pattern, instead in WORDS.items()]

PLACES = (
    *("apoq", "apoq_program.py", "apoq_pytest.py", "examples", "docs"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
)
"""Folders and files with texts for users and contributors."""

CODE = re.compile(r"``.+?``|`[^`\n]+`|<[^>\s]+>|\]\([^)]*\)")
"""Code and links in prose, whose words are names."""

Found = tuple[int, str, str]
"""The line, the word, and what to write instead."""


class Text(NamedTuple):
    """A docstring, comment, message or paragraph."""

    line: int
    words: str


def files(root: Path) -> list[Path]:
    """Return the files that have texts."""
    places = [root / place for place in PLACES]
    found = [path for place in places for path in ([place] if place.is_file() else place.rglob("*"))]
    return sorted(path for path in found if path.suffix in {".py", ".md"} and "__pycache__" not in path.parts)


def texts(path: Path) -> list[Text]:
    """Return the texts of a Python or Markdown file."""
    source = path.read_text(encoding="utf-8")
    return list(_prose(source) if path.suffix == ".md" else _of_python(source))


def find(text: Text) -> Iterator[Found]:
    """Yield the words in a text that have a replacement."""
    plain = CODE.sub(lambda code: "`" + " " * (len(code[0]) - 2) + "`", text.words)
    for pattern, instead in _WORDS:
        for found in pattern.finditer(plain):
            yield text.line + plain.count("\n", 0, found.start()), found[0], instead


def _of_python(source: str) -> Iterator[Text]:
    nodes = list(ast.walk(ast.parse(source)))
    parts = {part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            yield Text(node.lineno, "".join(map(_shown, node.values)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts:
            yield Text(node.lineno, node.value if " " in node.value.strip() else "")  # otherwise it is a name
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Text(token.start[0], token.string.lstrip("# "))


def _shown(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else "…"


def _prose(source: str) -> Iterator[Text]:
    """Blank the code blocks; the numbers of the lines stay."""
    lines, is_code = [], False
    for line in source.splitlines():
        is_fence = line.lstrip().startswith("```")
        lines.append("" if is_code or is_fence else line)
        is_code ^= is_fence
    yield Text(1, "\n".join(lines))


def public_docstrings(root: Path) -> dict[str, str]:
    """Return the docstrings of all that a checkout's docs/reference.md shows, by name."""
    package = griffe.load("apoq", search_paths=[root], allow_inspection=False, try_relative_path=False)
    page = (root / "docs" / "reference.md").read_text(encoding="utf-8")
    docstrings: dict[str, str] = {}
    for name in re.findall(r"^::: apoq\.([\w.]+)$", page, re.MULTILINE):
        shown = package[name]
        members = shown.all_members if shown.is_class else shown.members if shown.is_module else {}
        names = [key for key in members if not key.startswith("_") or key == "__init__"]
        for member in [shown, *(members[key] for key in names)]:
            if member.is_alias and not member.target_path.startswith("apoq."):
                continue
            if member.docstring:
                docstrings[member.canonical_path] = member.docstring.value
            for attribute in member.members.values() if member.is_class and shown.is_module else ():
                if attribute.docstring:
                    docstrings[attribute.path] = attribute.docstring.value
    return docstrings


def share(root: Path) -> tuple[int, int]:
    """Return how many public docstrings have such a word, and how many there are."""
    docstrings = public_docstrings(root)
    return sum(any(find(Text(1, text))) for text in docstrings.values()), len(docstrings)


if __name__ == "__main__":
    checkout = Path(sys.argv[1] if sys.argv[1:] else ROOT).resolve()
    for path in files(checkout):
        for line, word, instead in (found for text in texts(path) for found in find(text)):
            print(f"{path.relative_to(checkout)}:{line}: {word!r}: {instead}")
    with_one, total = share(checkout)
    print(f"public docstrings with such a word: {with_one} of {total} ({100 * with_one / total:.0f} %)")
