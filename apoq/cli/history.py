"""What apoq needs to know of a user's Alembic history: how far it has come, and after which head to go on."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from apoq.cli.exits import Failure

if TYPE_CHECKING:  # Alembic takes 0.2 s to import
    from alembic.script import ScriptDirectory

ANY: Final = object()
"""A schema that isn't written in a revision as a string, so it may be each of them."""


class Place(NamedTuple):
    """Where in a history tables are: which of the project's databases, and which schema there."""

    bind: str | None
    """By which the template names the functions of a revision: "" is Flask-Migrate's default. None: any."""
    schema: str | None

    def has(self, call: Call) -> bool:
        """Return whether a call of a revision is for these tables."""
        prefix, is_for_one, bind = call.function.partition("upgrade_")
        is_elsewhere = self.bind is not None and is_for_one and not prefix and bind != self.bind
        return not is_elsewhere and call.schema in {self.schema, ANY}


class Call(NamedTuple):
    """A call of `apoq.migrations.upgrade` in a revision."""

    function: str
    """In which it is."""
    version: int
    """What names no version is taken for the first, which it is at least."""
    schema: Any


class History:
    """A history, read by its files alone."""

    def __init__(self, scripts: ScriptDirectory, place: Place) -> None:
        """Read it: Alembic imports every revision for that."""
        self._scripts = scripts
        with explained("your Alembic history can't be read"):
            self.heads: list[str] = scripts.get_heads()
            self._reached = {
                script.revision: max(call.version for call in calls)
                for script in scripts.walk_revisions()
                if (calls := [call for call in calls_in(Path(script.path)) if place.has(call)])
            }

    @property
    def version(self) -> int:
        """The version to which it brings apoq's tables; 0 if it doesn't make them."""
        return max(self._reached.values(), default=0)

    def head(self, given: str | None, program: str) -> str:
        """Return the head to go on from: of the branch that apoq's tables are in, unless another is `given`.

        Raises `Failure`, with what to do, if it can't be told.
        """
        if given == "base" or (given and self._is_head(given)):
            return given
        if given:
            named = ", ".join(map(self.named, self.heads))
            raise Failure(
                f"{given} is not a head of your history: its heads are {named}; base begins a branch"
            )
        if len(self.heads) <= 1:
            return "head"
        heads = [head for head in self.heads if self._reached.keys() & self._ancestors(head)]
        if len(heads) == 1:
            return heads[0]
        raise Failure(
            f"your history has several heads ({', '.join(map(self.named, self.heads))}), and apoq's tables "
            "belong after one of them: give it with --head. Or begin a branch for them, with --head base "
            f"--branch-label apoq; or merge yours, with `{program} merge heads`"
        )

    def _is_head(self, given: str) -> bool:
        with explained("--head names no revision"):
            return all(script.is_head for script in self._scripts.get_revisions(given))

    def named(self, head: str) -> str:
        """Return a head as it may be given by --head: by the label of its branch, if it has one."""
        script: Any = self._scripts.get_revision(head)
        labels = sorted(script.branch_labels)
        return f"{labels[0]}@head" if labels else head

    def _ancestors(self, head: str) -> set[str]:
        return {script.revision for script in self._scripts.iterate_revisions(head, "base")}


def calls_in(path: Path) -> list[Call]:
    """Return the calls by which a revision upgrades apoq's tables."""
    source = path.read_bytes() if path.suffix == ".py" else b""
    if b"apoq" not in source:
        return []
    return [
        Call(getattr(statement, "name", ""), _version(node), _schema(node))
        for statement in ast.parse(source).body
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and node.args and _name(node.func) == "upgrade"
    ]


def _name(function: ast.expr) -> str | None:
    return getattr(function, "attr", None) or getattr(function, "id", None)


def _version(call: ast.Call) -> int:
    value = _keyword(call, "version")
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, int) else 1


def _schema(call: ast.Call) -> Any:
    value = _keyword(call, "schema")
    if value is None:
        return None
    return value.value if isinstance(value, ast.Constant) else ANY


def _keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn an error of Alembic's, or of the project's files that it runs, into a `Failure` after `what`."""
    from alembic.util import CommandError  # noqa: PLC0415

    try:
        with warnings.catch_warnings(action="ignore"):  # such as that of a missing parent, which is said here
            yield
    except click.ClickException:
        raise
    except CommandError as error:
        raise Failure(f"{what}: {_line(error)}") from error
    except Exception as error:
        if isinstance(error, KeyError) and _is_raised_by(error, "alembic.script.revision"):
            raise Failure(
                f"{what}: there is no revision {error}, and another one goes on from it. Is its file on "
                "another branch of your repository?"
            ) from error
        raise Failure(f"{what}: {type(error).__name__}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_raised_by(error: Exception, module: str) -> bool:
    *_, (frame, _) = walk_tb(error.__traceback__)
    return bool(frame.f_globals.get("__name__") == module)
