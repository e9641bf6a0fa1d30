"""Docstrings, messages, comments and docs are in plain English: without the words in `words.py`."""

from __future__ import annotations

import pytest
import words

FILES = list(words.files(words.ROOT))


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
