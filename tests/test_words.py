"""Docstrings, messages, comments and docs are in plain English: without the words in `words.py`."""

from __future__ import annotations

import pytest
import words

<<<<<<< HEAD
FILES = list(words.files(words.ROOT))
=======
CLEAN = (
    *("apoq/*.py", "apoq/client/*.py", "apoq/flask/*.py", "apoq/pyramid/*.py", "apoq/testing/*.py"),
    *("apoq/worker/worker.py", "apoq/worker/options.py"),
    *("apoq/worker/execution/running_task.py", "apoq/worker/settling/counters.py"),
    *("apoq/cli/*.py", "apoq/monitor/*.py", "docs/command-line.md", "docs/images/draw.py"),
    *("apoq/core/*.py", "apoq/migrations/*.py", "apoq/postgres/*.py", "apoq/schema/**/*.py"),
    *("docs/reference.md", "examples/**/*", "apoq_*.py", "CONTRIBUTING.md"),
)
"""Where they are not used; ``("**/*",)`` is everywhere."""

UNCLEAN = ("apoq/testing/clock.py",)
"""Exceptions, while there are some."""

UNCLEAN_NAMES = ("apoq.testing.clock",)
"""Modules whose public docstrings are exceptions."""


def is_clean(path: Path) -> bool:
    place = path.relative_to(words.ROOT)
    return any(path in words.ROOT.glob(pattern) for pattern in CLEAN) and str(place) not in UNCLEAN


FILES = [path for path in words.files(words.ROOT) if is_clean(path)]
>>>>>>> 864e1c22e248d3d416723516089060af5c89e0ed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(words.ROOT)))
def test_it_is_in_plain_english(path):
    found = [
        f"{path.relative_to(words.ROOT)}:{line}: {word!r}: {instead}"
        for text in words.texts(path)
        for line, word, instead in words.find(text)
    ]

    assert not found, "\n" + "\n".join(found)


def test_public_docstrings_are_in_plain_english():
    found = [
        f"{name}: {word!r}: {instead}"
        for name, text in words.public_docstrings(words.ROOT).items()
        for _, word, instead in words.find(words.Text(1, text))
    ]

    assert not found, "\n" + "\n".join(found)


WRONG = {
    "Answer the task.": "Answer",
    "Tell whether it runs.": "Tell whether",
    "It is told to stop.": "is told",
    "Nobody reads it.": "Nobody",
    "5 is no duration": "is no ",
    "It waits, for the server is away.": ", for the server is",
    "Raises `InvalidTask` where the data is wrong.": "` where",
    "What waits is released.": "What ",
}
RIGHT = [
    "Return the task.",
    "Return whether there is no task, or it is no longer there.",
    "Wait for the task, for up to 5 s.",
    "The folder where it lies. What is it?",
    "See `answer`, ``nobody`` and [that](#what-runs).",
]


@pytest.mark.parametrize(("text", "word"), WRONG.items(), ids=WRONG)
def test_a_word_is_found(text, word):
    assert word in [found for _, found, _ in words.find(words.Text(1, text))] or any(
        word.strip("` ") in found for _, found, _ in words.find(words.Text(1, text))
    )


@pytest.mark.parametrize("text", RIGHT)
def test_other_words_are_not_found(text):
    assert list(words.find(words.Text(1, text))) == []


def test_the_line_is_that_of_the_word(tmp_path):
    module = tmp_path / "module.py"
    lines = [
        '"""A module.',
        "",
        "Answers nothing.",
        '"""',
        'answer = "answer"  # lest',
        'print(f"{answer} is no task")',
    ]
    module.write_text("\n".join(lines), encoding="utf-8")

    found = [(line, word) for text in words.texts(module) for line, word, _ in words.find(text)]

    assert sorted(found) == [(3, "Answers"), (5, "lest"), (6, "is no ")]
