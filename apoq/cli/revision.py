"""``apoq revision``."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from apoq.cli.exits import BadUsage, Failure
from apoq.cli.history import History, Place, calls_in, explained
from apoq.cli.target import Target
from apoq.migrations import LATEST
from apoq.migrations.steps import newer

if TYPE_CHECKING:  # Alembic takes 0.2 s to import
    from alembic.config import Config
    from alembic.script import ScriptDirectory

INI: Final = Path("alembic.ini")
TOML: Final = Path("pyproject.toml")
FLASK_FOLDER: Final = Path("migrations")

UNUSABLE: Final = "your Alembic configuration can't be used"


@click.command("revision")
@click.option(
    "-c",
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Your alembic.ini or pyproject.toml. Default: the one in the current directory.",
)
@click.option(
    "-n",
    "--name",
    "section",
    default="alembic",
    help="Its section, as for `alembic -n`. Default: alembic.",
)
@click.option(
    "-d",
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Your Flask-Migrate folder. Default: migrations, if there is no alembic.ini.",
)
@click.option("--head", help="The head to follow, such as LABEL@head; base starts a new branch.")
@click.option("--branch-label", help="The label of a new branch.")
@click.option("--version-path", help="The folder for the revision, if your history has several.")
@click.option(
    "--bind",
    help="The database with apoq's tables, if your history is for several (multidb).",
)
@click.pass_context
def command(
    context: click.Context,
    /,
    config_file: Path | None,
    directory: Path | None,
    section: str,
    bind: str | None,
    **where: str | None,
) -> None:
    """Write a revision for apoq's tables into your Alembic history.

    \b
        apoq revision
        apoq revision -c development.ini

    The first revision creates the tables. After an upgrade of this library, run the command again: it writes
    another revision if the tables have changed. No branch is added to your history, so that
    `alembic upgrade head` stays one command. The database isn't used.
    """  # noqa: D301 - click's sign
    if config_file is not None and directory is not None:
        if context.get_parameter_source("directory") is ParameterSource.COMMANDLINE:
            raise BadUsage("-c and -d can't be combined: leave out one of them")
        directory = None  # Flask-Migrate's default
    with explained(UNUSABLE):
        config, program = _config(config_file, directory, section)
    config.cmd_opts = Namespace(quiet=True)  # the output is printed here
    target: Target = context.obj
    _write(config, program, Place(bind, target.schema), where)


def _config(config_file: Path | None, directory: Path | None, section: str) -> tuple[Config, str]:
    """Return the project's configuration, and the command that uses it."""
    from alembic.config import Config  # noqa: PLC0415

    if config_file is None and directory is None:
        config_file, directory = _found()
    if directory is not None:
        if not (directory / "env.py").exists():
            raise BadUsage(f"{directory} has no env.py: give your Flask-Migrate folder with -d")
        config = Config(directory / "alembic.ini", ini_section=section)
        config.set_main_option("script_location", str(directory).replace("%", "%%"))
        return config, "flask db" + ("" if directory == FLASK_FOLDER else f" -d {directory}")
    assert config_file is not None
    program = "alembic" if config_file in {INI, TOML} else f"alembic -c {config_file}"
    if section != "alembic":
        program += f" -n {section}"
    # Like Alembic itself: a project may have some of its settings in each of the two.
    if config_file.suffix == ".toml":
        ini = INI if INI.exists() else None
        return Config(ini, toml_file=config_file, ini_section=section), program
    toml = TOML if _is_alembics(TOML) else None
    return Config(config_file, toml_file=toml, ini_section=section), program


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
        "A project without Alembic needs no revision: `apoq migrate` creates the tables"
    )


def _is_alembics(project: Path) -> bool:
    return project.exists() and b"[tool.alembic" in project.read_bytes()


def _write(config: Config, program: str, place: Place, where: dict[str, str | None]) -> None:
    from alembic.util import rev_id  # noqa: PLC0415

    scripts = _scripts(config)
    history = History(scripts, place)
    if history.version > LATEST:
        raise Failure(newer(history.version))
    if history.version == LATEST:
        click.echo(f"Your history already has apoq's tables at version {LATEST}: nothing to write.")
        return
    head = history.head(where["head"], program)
    _check_version_path(scripts, history, head, where["version_path"])
    message = f"upgrade apoq tables to version {LATEST}" if history.version else "add apoq tables"
    failed = "the revision can't be written"
    if program.startswith("flask") and place.bind is None:
        failed += " (if its template needs the application, run `flask apoq revision`)"
    with _all_or_nothing(scripts), explained(failed):
        script: Any = scripts.generate_revision(
            rev_id(),
            message,
            head=head,
            branch_labels=where["branch_label"],
            version_path=where["version_path"],
            refresh=True,
            **_arguments(config, history.version, place),
        )
        path = Path(script.path)
        _check(path, place, program)
    click.echo(f"Wrote {_relative(path)}\n")
    heads = "head" if len(scripts.get_heads()) == 1 else "heads"
    _say_what_is_next(Path(scripts.dir) / "env.py", program, heads)


def _scripts(config: Config) -> ScriptDirectory:
    from alembic.script import ScriptDirectory  # noqa: PLC0415

    with explained(UNUSABLE):
        others = [
            name
            for name in config.file_config.sections()
            if config.file_config.has_option(name, "script_location")
        ]
        section = config.config_ini_section
        if others and section not in others and not config.get_alembic_option("script_location"):
            raise BadUsage(
                f"{config.config_file_name} has no script_location in [{section}]: give a section with -n "
                f"({', '.join(others)})"
            )
        return ScriptDirectory.from_config(config)


def _check_version_path(scripts: ScriptDirectory, history: History, head: str, given: str | None) -> None:
    """Fail if a folder has to be given; the message lists them."""
    folders = scripts.version_locations or []
    if not given and len(folders) > 1 and (head == "base" or not history.heads):
        names = ", ".join(str(_relative(Path(folder))) for folder in folders)
        raise BadUsage(f"your history has several folders: give one of them with --version-path ({names})")


@contextmanager
def _all_or_nothing(scripts: ScriptDirectory) -> Iterator[None]:
    """Remove the new files if an error follows, such as in a hook, or because a label exists already."""
    folders = [Path(folder) for folder in scripts.version_locations or [f"{scripts.dir}/versions"]]

    def files() -> set[Path]:
        return {path for folder in folders for path in folder.rglob("*.py")}

    before = files()
    try:
        yield
    except BaseException:
        for path in files() - before:
            path.unlink()
        raise


def _arguments(config: Config, reached: int, place: Place) -> dict[str, Any]:
    """Return the template's arguments: one line per version, because --sql may start at any of them."""
    option = "" if place.schema is None else f", schema={place.schema!r}"
    up = [f"apoq.migrations.upgrade(op, version={step}{option})" for step in range(reached + 1, LATEST + 1)]
    down = [
        f"apoq.migrations.downgrade(op, version={step}{option})"
        for step in range(LATEST - 1, reached - 1, -1)
    ]
    upgrades, downgrades = "\n    ".join(up), "\n    ".join(down)
    # A template for several databases has two functions for each; Flask-Migrate's default one has no name.
    prefixes = [f"{place.bind}_"] if place.bind else ["", "_"]
    arguments: dict[str, Any] = {"config": config, "imports": "import apoq.migrations"}
    for prefix in prefixes:
        arguments |= {f"{prefix}upgrades": upgrades, f"{prefix}downgrades": downgrades}
    return arguments


def _check(path: Path, place: Place, program: str) -> None:
    """Fail if the revision has no call for these tables; the message says what to do instead."""
    wanted = {f"upgrade_{place.bind}"} if place.bind else {"upgrade", "upgrade_"}
    text = path.read_text(encoding="utf-8")
    if "import apoq.migrations" in text and any(call.function in wanted for call in calls_in(path)):
        return
    binds = re.findall(r"^def upgrade_(\w+)\(", text, re.MULTILINE)
    if binds:
        given = f", and has no {place.bind!r}" if place.bind else ""
        raise Failure(
            f"this history is for several databases{given}: give that of apoq's tables with --bind "
            f"({', '.join(binds)})"
        )
    if place.bind and "def upgrade(" in text:
        raise Failure(
            f"apoq's tables are in the bind {place.bind!r}, but this history is for a single database: start "
            "one for several (`flask db init --multidb`), or create the tables there with `flask apoq "
            "migrate`, or give --bind '' if this env.py uses that bind"
        )
    raise Failure(
        "your script.py.mako lacks ${imports} or ${upgrades}, where apoq would write: create an empty "
        f"revision (`{program} revision`), and write `apoq.migrations.upgrade(op, version={LATEST})` into "
        "its upgrade function"
    )


def _say_what_is_next(env: Path, program: str, heads: str) -> None:
    text = env.read_text(encoding="utf-8", errors="replace") if env.exists() else ""
    is_flask = program.startswith("flask")
    steps = [
        f"Run `{program} upgrade`." if is_flask and heads == "head" else f"Run `{program} upgrade {heads}`."
    ]
    if "apoq.migrations" not in text:
        first, call = f"In {_relative(env)}", "context.configure"
        if is_flask:
            first, call = "Unless you have done so, where you create your Migrate", "Migrate"
        arguments = "app, db" if is_flask else "..."
        steps.insert(
            0,
            f"{first}, prevent autogenerate from dropping apoq's tables:\n"
            "         from apoq.migrations import include_object\n"
            f"         {call}({arguments}, include_object=include_object)",
        )
    click.echo("Next steps:")
    for number, step in enumerate(steps, 1):
        click.echo(f"  {number}. {step}")


def _relative(path: Path) -> Path:
    path, here = path.resolve(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
