"""``apoq revision``."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from apoq.cli.exits import BadUsage, Failure
from apoq.cli.target import Target
from apoq.migrations import LATEST
from apoq.migrations.steps import newer

if TYPE_CHECKING:  # Alembic takes 0.2 s to import
    from alembic.config import Config
    from alembic.script import ScriptDirectory

INI: Final = Path("alembic.ini")
TOML: Final = Path("pyproject.toml")
FLASK_FOLDER: Final = Path("migrations")

_CALL: Final = re.compile(r"\bupgrade\(\s*op\b(?:[^)]*?\bversion\s*=\s*(\d+))?")
"""The call in a revision; what names no version is taken for the first, which it is at least."""


@click.command("revision")
@click.option(
    "-c",
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Your alembic.ini or pyproject.toml. Default: the one in this folder.",
)
@click.option(
    "-d",
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Your Flask-Migrate folder. Default: migrations, where there is no alembic.ini.",
)
@click.pass_obj
def command(target: Target, /, config_file: Path | None, directory: Path | None) -> None:
    """Write a revision for apoq's tables into your own Alembic history.

    The first one creates the tables, and after an upgrade of this library another one brings them to its
    version. Your history keeps one head, and `alembic upgrade head` stays one command. The database isn't
    asked.
    """
    from alembic.util import CommandError  # noqa: PLC0415

    try:
        config, program = _config(config_file, directory)
        config.cmd_opts = Namespace(quiet=True)  # what was written is said here
        _write(config, program, target.schema)
    except CommandError as error:
        raise Failure(str(error)) from error


def _config(config_file: Path | None, directory: Path | None) -> tuple[Config, str]:
    """Answer their configuration, and the command that works with it."""
    from alembic.config import Config  # noqa: PLC0415

    if config_file is None and directory is None:
        config_file, directory = _found()
    if directory is not None:
        if not (directory / "env.py").exists():
            raise BadUsage(f"{directory} is no Flask-Migrate folder: there is no env.py in it")
        config = Config(directory / "alembic.ini")
        config.set_main_option("script_location", str(directory).replace("%", "%%"))
        return config, "flask db" + ("" if directory == FLASK_FOLDER else f" -d {directory}")
    assert config_file is not None
    program = "alembic" if config_file in {INI, TOML} else f"alembic -c {config_file}"
    # As Alembic itself: a project may have half of its settings in each of the two.
    if config_file.suffix == ".toml":
        return Config(INI if INI.exists() else None, toml_file=config_file), program
    return Config(config_file, toml_file=TOML if _is_alembics(TOML) else None), program


def _found() -> tuple[Path | None, Path | None]:
    given = os.environ.get("ALEMBIC_CONFIG")
    for config_file in (Path(given) if given else INI, INI):
        if config_file.exists():
            return config_file, None
    if (FLASK_FOLDER / "alembic.ini").exists():
        return None, FLASK_FOLDER
    if _is_alembics(TOML):
        return TOML, None
    raise BadUsage(
        "there is no alembic.ini here: give yours with -c, or your Flask-Migrate folder with -d. "
        "A project without Alembic needs no revision: `apoq migrate` makes the tables"
    )


def _is_alembics(project: Path) -> bool:
    return project.exists() and "[tool.alembic" in project.read_text(encoding="utf-8")


def _write(config: Config, program: str, schema: str | None) -> None:
    from alembic.script import ScriptDirectory  # noqa: PLC0415
    from alembic.util import rev_id  # noqa: PLC0415

    history = ScriptDirectory.from_config(config)
    heads = history.get_heads()
    if len(heads) > 1:
        raise Failure(
            f"your history has several heads ({', '.join(heads)}), and apoq's tables belong after one: run "
            f"`{program} merge heads` first"
        )
    reached = _version(history)
    if reached > LATEST:
        raise Failure(newer(reached))
    if reached == LATEST:
        click.echo(f"Your history has apoq's tables at version {LATEST} already: nothing to write.")
        return
    message = "add apoq tables" if reached == 0 else f"upgrade apoq tables to version {LATEST}"
    script: Any = history.generate_revision(
        rev_id(), message, refresh=True, **_arguments(config, reached, schema)
    )
    path = Path(script.path)
    _check(path)
    click.echo(f"Wrote {_relative(path)}\n")
    _say_what_is_next(Path(history.dir) / "env.py", program)


def _version(history: ScriptDirectory) -> int:
    """Answer the version of apoq's tables that a history leads to, as its revisions say."""
    found = [0]
    for revision in history.walk_revisions():
        text = Path(revision.path).read_text(encoding="utf-8")
        if "apoq" in text:
            found += [int(number or 1) for number in _CALL.findall(text)]
    return max(found)


def _arguments(config: Config, reached: int, schema: str | None) -> dict[str, Any]:
    """Answer what the template wants: a line a version, for with --sql each begins at the one before."""
    option = "" if schema is None else f", schema={schema!r}"
    up = [f"apoq.migrations.upgrade(op, version={step}{option})" for step in range(reached + 1, LATEST + 1)]
    down = [
        f"apoq.migrations.downgrade(op, version={step}{option})"
        for step in range(LATEST - 1, reached - 1, -1)
    ]
    upgrades, downgrades = "\n    ".join(up), "\n    ".join(down)
    return {
        "config": config,
        "imports": "import apoq.migrations",
        "upgrades": upgrades,
        "downgrades": downgrades,
        # Flask-Migrate's template for several binds: of the default one.
        "_upgrades": upgrades,
        "_downgrades": downgrades,
    }


def _check(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if "import apoq.migrations" not in text or "apoq.migrations.upgrade(op" not in text:
        path.unlink()
        raise Failure(
            "your script.py.mako has no place for what apoq would write (${imports}, ${upgrades}): make an "
            "empty revision, and write `apoq.migrations.upgrade(op, version=…)` into its upgrade function"
        )


def _say_what_is_next(env: Path, program: str) -> None:
    text = env.read_text(encoding="utf-8") if env.exists() else ""
    is_flask = program.startswith("flask")
    steps = [f"Run `{program} upgrade`." if is_flask else f"Run `{program} upgrade head`."]
    if "apoq.migrations" not in text:
        first, call = f"In {_relative(env)}", "context.configure"
        if is_flask:
            first, call = "Unless you have done so, where your Migrate is made", "Migrate"
        arguments = "app, db" if is_flask else "..."
        steps.insert(
            0,
            f"{first}, keep autogenerate from dropping apoq's tables:\n"
            "         import apoq.migrations\n"
            f"         {call}({arguments}, include_object=apoq.migrations.include_object)",
        )
    click.echo("What is next:")
    for number, step in enumerate(steps, 1):
        click.echo(f"  {number}. {step}")


def _relative(path: Path) -> Path:
    path, here = path.resolve(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
