"""A project's Alembic history, as `apoq revision` reads it: apoq's version there, and the heads."""

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
"""A schema that isn't a literal in the revision, so that it may be any."""


class Place(NamedTuple):
    """Which tables a revision is for: in which of the project's databases, and in which schema."""

    bind: str | None
    """The name in the functions of a revision: "" is Flask-Migrate's default, None is any."""
    schema: str | None

    def has(self, call: Call) -> bool:
        """Return whether a call of a revision is for these tables."""
        prefix, is_for_one, bind = call.function.partition("upgrade_")
        is_elsewhere = self.bind is not None and is_for_one and not prefix and bind != self.bind
        return not is_elsewhere and call.schema in {self.schema, ANY}


class Call(NamedTuple):
    """A call of `apoq.migrations.upgrade` in a revision."""

    function: str
    """The function of the revision that contains the call."""
    version: int
    """The version; 1 if the call doesn't say."""
    schema: Any


class History:
    """A history, read from its files; the database isn't asked."""

    def __init__(self, scripts: ScriptDirectory, place: Place) -> None:
        """Read the history; Alembic imports every revision for that."""
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
        """The version of apoq's tables after all revisions; 0 if none creates them."""
        return max(self._reached.values(), default=0)

    def head(self, given: str | None, program: str) -> str:
        """Return the head that the new revision follows: `given`, or that of the branch with apoq's tables.

        Raises `Failure`, with what to do, if there are several candidates.
        """
        if given == "base" or (given and self._is_head(given)):
            return given
        if given:
            named = ", ".join(map(self.named, self.heads))
            raise Failure(
                f"--head must be a head of your history ({named}), or base for a new branch, got {given}"
            )
        if len(self.heads) <= 1:
            return "head"
        heads = [head for head in self.heads if self._reached.keys() & self._ancestors(head)]
        if len(heads) == 1:
            return heads[0]
        raise Failure(
            f"your history has several heads ({', '.join(map(self.named, self.heads))}), and apoq's tables "
            "must follow one of them: give it with --head. Or start a branch for them, with --head base "
            f"--branch-label apoq; or merge yours, with `{program} merge heads`"
        )

    def _is_head(self, given: str) -> bool:
        with explained("--head names no revision"):
            return all(script.is_head for script in self._scripts.get_revisions(given))

    def named(self, head: str) -> str:
        """Return a head as it can be given by --head: by the label of its branch, if it has one."""
        script: Any = self._scripts.get_revision(head)
        labels = sorted(script.branch_labels)
        return f"{labels[0]}@head" if labels else head

    def _ancestors(self, head: str) -> set[str]:
        return {script.revision for script in self._scripts.iterate_revisions(head, "base")}


def calls_in(path: Path) -> list[Call]:
    """Return the calls in a revision that upgrade apoq's tables."""
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
    """Turn an error of Alembic or of the project's files into a `Failure` that begins with `what`."""
    from alembic.util import CommandError  # noqa: PLC0415

    try:
        with warnings.catch_warnings(action="ignore"):  # a missing parent is an error here
            yield
    except click.ClickException:
        raise
    except CommandError as error:
        raise Failure(f"{what}: {_line(error)}") from error
    except Exception as error:
        if isinstance(error, KeyError) and _is_raised_by(error, "alembic.script.revision"):
            raise Failure(
                f"{what}: the revision {error} is missing, but another one follows it. Is its file on "
                "another branch of your repository?"
            ) from error
        raise Failure(f"{what}: {type(error).__name__}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_raised_by(error: Exception, module: str) -> bool:
    *_, (frame, _) = walk_tb(error.__traceback__)
    return bool(frame.f_globals.get("__name__") == module)
