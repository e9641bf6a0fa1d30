"""What the documentation says is so: its code runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent

import click
import pages
import pytest
from pages import DOCS, PAGES, README, ROOT

import apoq
from apoq.cli import main

ELSEWHERE = {
    "coming-from.md": "test_coming_from.py",
    "README.md": "test_readme.py",
    "dashboard.md": "test_dashboard_mounts.py",
    "django.md": "test_psycopg.py",
    "fastapi.md": "test_fastapi.py",
    "monitoring.md": "test_monitoring.py",
    "flask.md": "test_flask.py",
    "periodic-tasks.md": "test_testing_schedules.py",
    "pyramid.md": "test_pyramid.py",
    "recipes.md": "test_recipes.py",
    "testing.md": "test_testing_docs.py",
    "tutorial.md": "test_tutorial.py",
    "typed-tasks.md": "test_typed.py",
}
"""Pages that want more than `engine` and the like, or after which something is to be looked at."""

TEXTS = [
    *PAGES,
    *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/NOTES.md", "chaos/NOTES.md")),
    *ROOT.glob("examples/*/README.md"),
]
"""The pages, and what else there is to read."""

HERE = [page for page in PAGES if page.name not in ELSEWHERE and any(pages.blocks(page, "python"))]
DURATIONS = {"every", "delay", "timeout", "since", "completed_before", "max_age"}
"""The options of commands that are durations, or may be."""


@pytest.mark.parametrize("page", HERE, ids=lambda page: page.name)
def test_its_python_runs(page, engine, session, queue, worker, run_page):
    run_page(page.name, engine=engine, session=session, queue=queue, worker=worker)


def test_the_other_pages_are_run_where_more_is_known_of_them():
    for name, test in ELSEWHERE.items():
        assert re.search(rf"\b{re.escape(name)}\b", (ROOT / "tests" / test).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fragments_are_python(page):
    for block in pages.blocks(page, "py"):
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST
        compile("\n" * (block.line - 1) + block.code, str(page), "exec", flags, dont_inherit=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_block_says_what_is_in_it(page):
    known = {"python", "py", "sh", "console", "text", "json", "sql", "ini", "yaml", "dockerfile", "toml"}

    assert {block.language for block in pages.blocks(page)} <= known


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_its_commands_exist_and_have_these_options(page):
    for arguments in commands(page):
        command, rest = named(arguments)
        _, left, _ = command.make_parser(click.Context(command)).parse_args(list(rest))
        assert not left, f"apoq {shlex.join(arguments)}: {left}"


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_durations_of_its_commands_can_be_read(page):
    for arguments in commands(page):
        command, rest = named(arguments)
        context = click.Context(command)
        given, _, _ = command.make_parser(context).parse_args(list(rest))
        for option in command.params:
            if option.name in DURATIONS and isinstance(text := given.get(option.name), str):
                option.type.convert(text, option, context)


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_its_links_lead_somewhere(page):
    for target in links(page):
        file, _, anchor = target.partition("#")
        to = (page.parent / file) if file else page
        assert to.exists(), target
        if anchor:
            assert anchor in anchors(to), target


@pytest.mark.parametrize("page", [page for page in PAGES if page != README], ids=lambda page: page.name)
def test_it_links_to_nothing_outside_of_the_docs(page):
    # Of which they would be part where they are built.
    assert [target for target in links(page) if target.startswith("..")] == []


def test_the_reference_has_all_that_is_public():
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: apoq\.(?:.+\.)?(\w+)$", text, re.MULTILINE))

    assert set(apoq.__all__) <= shown


def test_the_reference_draws_the_tree_of_errors_as_it_is():
    (tree,) = pages.blocks(DOCS / "reference.md", "text")

    assert indent(tree.code, "    ") in apoq.errors.__doc__


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)

    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path, monkeypatch):
    pytest.importorskip("zensical")
    monkeypatch.chdir(tmp_path)
    for name in ("mkdocs.yml", "docs", "apoq"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]

    built = subprocess.run(command, capture_output=True, text=True, check=False)

    assert built.returncode == 0, built.stdout + built.stderr
    assert [link for html in (tmp_path / "site").rglob("*.html") for link in dead(html)] == []


def commands(page: Path) -> Iterator[list[str]]:
    """Find the arguments of each `apoq …` that a page has: in shells, and in its sentences."""
    for block in pages.blocks(page, "sh", "console"):
        for line in block.code.replace("\\\n", " ").splitlines():
            if block.language == "console" and not line.startswith("$ "):
                continue
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
            lexer.wordchars += "{}[]:,@…$"
            yield from _calls(list(lexer))
    for code in re.findall(r"`((?:flask |python -m )?apoq [a-z-].*?)`", pages.prose(page)):
        yield from _calls(shlex.split(code))


def _calls(words: list[str]) -> Iterator[list[str]]:
    call: list[str] | None = None
    for word, before in zip(words, [";", *words], strict=False):
        if set(word) <= set("|&;<>"):
            if call is not None:
                yield call
            call = None
        elif call is not None:
            call.append(word)
        elif word == "apoq" and (before in (";", "|", "&&", "flask", "-m") or "=" in before):
            call = []
    if call is not None:
        yield call


def named(arguments: list[str]) -> tuple[click.Command, list[str]]:
    """Find the command that these arguments call, and what is left for it."""
    context = click.Context(main)
    _, left, _ = main.make_parser(context).parse_args(list(arguments))
    if not left:
        return main, arguments
    command = main.get_command(context, left[0])
    assert command is not None, f"there is no command {left[0]!r}"
    return command, left[1:]


def links(page: Path) -> list[str]:
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", pages.prose(page)))
    return [target for target in targets if not re.match(r"https?://", target)]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", pages.prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead(html: Path) -> Iterator[str]:
    """Find the links of a built page that lead to no file, or to no place in it."""
    for target in re.findall(r'(?:href|src)="?([^"\s>]+)', html.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:|/", target):
            continue
        file, _, anchor = target.partition("#")
        to = (html.parent / file.partition("?")[0]).resolve() if file else html
        to = to / "index.html" if to.is_dir() else to
        place = re.compile(rf'(?:id|name)="?{re.escape(anchor)}["\s>]')
        if not to.exists() or (anchor and not place.search(to.read_text(encoding="utf-8"))):
            yield f"{html.parent.name}: {target}"
