"""``apoq revision``, in projects that ``alembic init`` and Flask-Migrate have made."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import flask_migrate
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from click.testing import CliRunner, Result
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

import apoq.cli.revision
from apoq.cli import main
from apoq.migrations import LATEST, differences, prepare, steps

INCLUDE = "include_object=apoq.migrations.include_object"
ADVICE = "include_object=include_object"
"""As the command advises, with an import of the function itself."""


def execute(url: sa.URL, script: str) -> None:
    engine = sa.create_engine(url, poolclass=sa.pool.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(script)


def tables(url: sa.URL) -> set[str]:
    return set(sa.inspect(sa.create_engine(url, poolclass=sa.pool.NullPool)).get_table_names())


def agree(url: sa.URL, schema: str | None = None) -> bool:
    with sa.create_engine(url, poolclass=sa.pool.NullPool).connect() as connection:
        return differences(connection, schema) == []


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    # An env.py sets up a log, and silences all others, in this process too.
    monkeypatch.setattr("logging.config.fileConfig", lambda *_, **__: None)


def revision(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["revision", *arguments])


class Project:
    """What `alembic init` makes, with a model and a database."""

    def __init__(self, url: sa.URL, template: str = "generic") -> None:
        self.url = url
        self._template = template
        command.init(self.config(), "migrations", template=template)
        ini, env = Path("alembic.ini"), Path("migrations/env.py")
        address = url.render_as_string(hide_password=False).replace("%", "%%")
        ini.write_text(
            re.sub(
                "^sqlalchemy.url = .*$", f"sqlalchemy.url = {address}", ini.read_text(), flags=re.MULTILINE
            )
        )
        Path("models_of_theirs.py").write_text(
            "import sqlalchemy as sa\nmetadata = sa.MetaData()\n"
            "sa.Table('users', metadata, sa.Column('id', sa.Integer, primary_key=True))\n"
        )
        text = env.read_text()
        text = text.replace(
            "target_metadata = None", "from models_of_theirs import metadata as target_metadata"
        )
        env.write_text(text)
        sys.path.insert(0, str(Path.cwd()))

    def include_object(self) -> None:
        """Do as the documentation says."""
        env = Path("migrations/env.py")
        text = env.read_text().replace(
            "target_metadata=target_metadata", f"target_metadata=target_metadata, {INCLUDE}"
        )
        env.write_text(f"import apoq.migrations\n{text}")

    def config(self) -> Config:
        toml = {"toml_file": "pyproject.toml"} if self._template == "pyproject" else {}
        return Config("alembic.ini", stdout=StringIO(), output_buffer=StringIO(), **toml)

    def begin_history(self) -> None:
        """Write two revisions of their own, and run them."""
        command.revision(self.config(), "users", autogenerate=True)
        command.upgrade(self.config(), "head")
        command.revision(self.config(), "nothing")

    @property
    def heads(self) -> list[str]:
        return ScriptDirectory.from_config(self.config()).get_heads()

    def files(self) -> set[Path]:
        return set(Path("migrations/versions").glob("*.py"))


@pytest.fixture
def project(empty_url) -> Project:
    project = Project(empty_url)
    yield project
    sys.modules.pop("models_of_theirs", None)


class TestAHistoryOfTheirs:
    @pytest.mark.parametrize("template", ["generic", "async", "pyproject"])
    def test_it_adopts_apoq_by_one_revision(self, empty_url, template):
        project = Project(empty_url, template)
        project.include_object()
        project.begin_history()
        before, (head,) = project.files(), project.heads

        done = revision()

        assert done.exit_code == 0, done.output
        (new,) = project.files() - before
        assert str(new) in done.output
        (script,) = map(ScriptDirectory.from_config(project.config()).get_revision, project.heads)
        assert script.down_revision == head
        command.upgrade(project.config(), "head")
        assert agree(empty_url)
        command.check(project.config())

    def test_a_fresh_one_begins_with_it(self, project):
        assert revision().exit_code == 0

        command.upgrade(project.config(), "head")
        assert agree(project.url)
        assert len(project.heads) == 1

    def test_the_script_that_it_prints_makes_the_tables(self, project):
        revision()
        config = project.config()

        command.upgrade(config, "head", sql=True)

        execute(project.url, config.output_buffer.getvalue())
        assert agree(project.url)

    def test_down_it_leaves_what_is_theirs(self, project):
        project.begin_history()
        revision()
        command.upgrade(project.config(), "head")

        command.downgrade(project.config(), "-1")

        assert tables(project.url) == {"users", "alembic_version"}

    def test_what_prepare_has_made_is_passed_over(self, project):
        engine = sa.create_engine(project.url, poolclass=sa.pool.NullPool)
        prepare(engine)
        revision()

        command.upgrade(project.config(), "head")

        assert agree(project.url)

    def test_a_schema_is_theirs_to_choose(self, project):
        revision("--schema", "jobs")

        command.upgrade(project.config(), "head")

        assert agree(project.url, "jobs")
        assert tables(project.url) == {"alembic_version"}

    def test_once_is_enough(self, project):
        revision()
        before = project.files()

        done = revision()

        assert done.exit_code == 0
        assert "already has apoq's tables at version 1: nothing to write" in done.output
        assert project.files() == before

    @pytest.mark.parametrize("call", ["upgrade(op, version=1)", "migrations.upgrade(op)"])
    def test_what_they_have_written_themselves_counts(self, project, call):
        script = command.revision(project.config(), "ours")
        path = Path(script.path)
        path.write_text(path.read_text().replace("pass", f"import apoq.migrations; apoq.{call}", 1))

        assert "nothing to write" in revision().output

    def test_several_heads_are_refused_with_the_command_that_merges_them(self, project):
        first = command.revision(project.config(), "first")
        command.revision(project.config(), "second", head=first.revision)
        command.revision(project.config(), "third", head=first.revision, splice=True)
        before = project.files()

        done = revision()

        assert done.exit_code == 1
        assert "several heads" in done.output
        assert "`alembic merge heads`" in done.output
        assert project.files() == before

    def test_a_template_without_a_place_for_it_is_refused(self, project):
        template = Path("migrations/script.py.mako")
        template.write_text(template.read_text().replace('${upgrades if upgrades else "pass"}', "pass"))

        done = revision()

        assert done.exit_code == 1
        assert "script.py.mako" in done.output
        assert project.files() == set()

    def test_what_is_next_is_said(self, project):
        output = revision().output

        assert output.index(ADVICE) < output.index("`alembic upgrade head`")

    def test_what_is_done_is_not_said_to_be_next(self, project):
        project.include_object()

        assert ADVICE not in revision().output

    def test_a_project_without_alembic_is_told_what_to_do(self):
        done = revision()

        assert done.exit_code == 2
        assert "there is no alembic.ini here" in done.output

    def test_another_folder_is_found_by_its_ini(self, project, tmp_path_factory, monkeypatch):
        there = Path.cwd()
        monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))

        done = revision("-c", str(there / "alembic.ini"))

        assert f"`alembic -c {there}/alembic.ini upgrade head`" in done.output
        assert len(list((there / "migrations" / "versions").glob("*.py"))) == 1

    def test_an_ini_that_names_no_scripts_is_said(self):
        Path("alembic.ini").write_text("[alembic]\n")

        done = revision()

        assert done.exit_code == 1
        assert "script_location" in done.output

    def test_all_of_it_from_a_shell(self, project):
        for command_line in (["apoq", "revision"], ["alembic", "upgrade", "head"]):
            subprocess.run([sys.executable, "-m", *command_line], check=True, capture_output=True)

        assert agree(project.url)


class TestALaterVersion:
    """Of the tables, which is made up here."""

    @pytest.fixture(autouse=True)
    def version_2(self, monkeypatch, request) -> None:
        def release() -> None:
            table = sa.table("apoq_tasks")
            step = SimpleNamespace(
                upgrade=lambda op, schema: op.add_column(table.name, sa.Column("tenant", sa.Text)),
                downgrade=lambda op, schema: op.drop_column(table.name, "tenant"),
            )
            monkeypatch.setitem(steps.STEPS, LATEST + 1, step)
            monkeypatch.setattr(steps, "LATEST", LATEST + 1)
            monkeypatch.setattr(apoq.cli.revision, "LATEST", LATEST + 1)

        self.release = release

    def columns(self, url: sa.URL) -> set[str]:
        inspector = sa.inspect(sa.create_engine(url, poolclass=sa.pool.NullPool))
        return {column["name"] for column in inspector.get_columns("apoq_tasks")}

    def test_it_is_one_more_revision(self, project):
        revision()
        (first,) = project.heads
        command.upgrade(project.config(), "head")

        self.release()
        revision()
        command.upgrade(project.config(), "head")

        (script,) = map(ScriptDirectory.from_config(project.config()).get_revision, project.heads)
        assert script.down_revision == first
        assert "tenant" in self.columns(project.url)

    def test_down_it_is_the_version_before(self, project):
        revision()
        self.release()
        revision()
        command.upgrade(project.config(), "head")

        command.downgrade(project.config(), "-1")

        assert "tenant" not in self.columns(project.url)
        assert "apoq_tasks" in tables(project.url)

    @pytest.mark.parametrize("offline", [False, True])
    def test_who_adopts_apoq_with_it_has_all_in_one_revision(self, project, offline):
        self.release()
        revision()

        config = project.config()
        command.upgrade(config, "head", sql=offline)
        if offline:
            execute(project.url, config.output_buffer.getvalue())

        assert len(project.files()) == 1
        assert "tenant" in self.columns(project.url)

    def test_it_goes_on_from_the_branch_that_has_the_tables(self, project):
        for label in ("shared", "tenant"):
            command.revision(project.config(), label, head="base", branch_label=label)
        revision("--head", "shared@head")
        history = ScriptDirectory.from_config(project.config())
        first = history.get_revision("shared@head").revision

        self.release()
        done = revision()

        assert done.exit_code == 0, done.output
        history = ScriptDirectory.from_config(project.config())
        assert history.get_revision("shared@head").down_revision == first

    def test_a_library_that_is_older_than_the_history_is_told_so(self, project, monkeypatch):
        self.release()
        revision()
        monkeypatch.setattr(apoq.cli.revision, "LATEST", LATEST)

        done = revision()

        assert done.exit_code == 1
        assert "pip install --upgrade apoq" in done.output


class TestBranches:
    """Of a history that has several on purpose, perhaps each in its folder."""

    @pytest.fixture
    def folders(self, project) -> None:
        ini = Path("alembic.ini")
        where = "version_locations = %(here)s/migrations/shared:%(here)s/migrations/tenant"
        ini.write_text(ini.read_text().replace("[alembic]\n", f"[alembic]\n{where}\n", 1))

    @pytest.fixture
    def branches(self, project, folders) -> None:
        for label in ("shared", "tenant"):
            path = f"migrations/{label}"
            command.revision(project.config(), label, head="base", branch_label=label, version_path=path)

    @pytest.mark.parametrize("arguments", [(), ("--head", "base")])
    def test_several_folders_are_named(self, folders, arguments):
        done = revision(*arguments)

        assert done.exit_code == 2
        assert "--version-path (migrations/shared, migrations/tenant)" in done.output

    def test_it_is_written_into_the_one_that_is_given(self, project, folders):
        done = revision("--version-path", "migrations/shared")

        assert done.exit_code == 0, done.output
        assert len(list(Path("migrations/shared").glob("*.py"))) == 1
        command.upgrade(project.config(), "head")
        assert agree(project.url)

    def test_heads_are_named_by_their_labels(self, branches):
        done = revision()

        assert done.exit_code == 1
        assert "several heads (shared@head, tenant@head)" in done.output
        assert "give it with --head" in done.output

    def test_it_goes_on_from_the_head_that_is_given(self, project, branches):
        done = revision("--head", "shared@head")

        assert done.exit_code == 0, done.output
        assert len(list(Path("migrations/shared").glob("*.py"))) == 2
        assert "Run `alembic upgrade heads`." in done.output
        command.upgrade(project.config(), "heads")
        assert agree(project.url)
        assert "nothing to write" in revision().output

    def test_it_begins_a_branch(self, project, branches):
        done = revision("--head=base", "--branch-label=apoq", "--version-path=migrations/shared")

        assert done.exit_code == 0, done.output
        command.upgrade(project.config(), "apoq@head")
        assert agree(project.url)

    def test_what_is_no_head_is_refused_with_those_that_are(self, project, branches):
        first = ScriptDirectory.from_config(project.config()).get_revision("shared@head").revision
        command.revision(project.config(), "second", head="shared@head")

        done = revision("--head", first)

        assert done.exit_code == 1
        assert "must be a head of your history (shared@head, tenant@head)" in done.output

    def test_a_label_that_is_taken_leaves_nothing_behind(self, branches):
        before = set(Path("migrations").rglob("*.py"))

        done = revision("--head=base", "--branch-label=tenant", "--version-path=migrations/shared")

        assert (done.exit_code, "tenant" in done.output) == (1, True)
        assert set(Path("migrations").rglob("*.py")) == before

    def test_another_section_is_named(self, project):
        ini = Path("alembic.ini")
        ini.write_text(ini.read_text().replace("[alembic]", "[main]"))

        refused, done = revision(), revision("-n", "main")

        assert (refused.exit_code, "with -n (main)" in refused.output) == (2, True)
        assert "Run `alembic -n main upgrade head`." in done.output


class TestSeveralPlaces:
    def test_each_schema_has_its_own_revision(self, project):
        for schema in ([], ["--schema", "jobs"]):
            assert "Wrote" in revision(*schema).output
            assert "nothing to write" in revision(*schema).output

        command.upgrade(project.config(), "head")
        assert agree(project.url)
        assert agree(project.url, "jobs")

    def test_a_schema_that_is_computed_may_be_any(self, project):
        path = Path(command.revision(project.config(), "ours").path)
        call = "import apoq.migrations; apoq.migrations.upgrade(op, version=1, schema=op.get_context())"
        path.write_text(path.read_text().replace("pass", call, 1))

        assert "nothing to write" in revision("--schema", "jobs").output

    def test_of_several_databases_one_is_given(self, empty_url):
        project = Project(empty_url, "multidb")

        refused, done = revision(), revision("--bind", "engine2")

        assert (refused.exit_code, "--bind (engine1, engine2)" in refused.output) == (1, True)
        assert done.exit_code == 0, done.output
        (path,) = project.files()
        first, second = path.read_text().split("def upgrade_engine2")
        assert "apoq.migrations.upgrade" not in first
        assert "apoq.migrations.upgrade(op, version=1)" in second
        assert "nothing to write" in revision("--bind", "engine2").output
        assert "Wrote" in revision("--bind", "engine1").output


def lose_the_parent(project: Project) -> None:
    first = command.revision(project.config(), "first")
    command.revision(project.config(), "second")
    Path(first.path).unlink()


def break_a_revision(project: Project) -> None:
    Path(command.revision(project.config(), "first").path).write_text("def upgrade(:")


def forget_an_import(project: Project) -> None:
    path = Path(command.revision(project.config(), "first").path)
    path.write_text(f"import not_installed\n{path.read_text()}")


def forget_a_variable(project: Project) -> None:
    path = Path(command.revision(project.config(), "first").path)
    path.write_text(f"import os\nos.environ['NOT_SET']\n{path.read_text()}")


def break_the_ini(project: Project) -> None:
    Path("alembic.ini").write_text("script_location = migrations")


def break_the_encoding(project: Project) -> None:
    Path("alembic.ini").write_bytes(b"[alembic]\nscript_location = \xff")


def break_the_template(project: Project) -> None:
    Path("migrations/script.py.mako").write_text("${nothing_of_that_name.attribute}")


def lose_the_template(project: Project) -> None:
    Path("migrations/script.py.mako").unlink()


def lose_the_folder(project: Project) -> None:
    Path("migrations").rename("elsewhere")


def break_a_hook(project: Project) -> None:
    ini = Path("alembic.ini")
    hook = "[post_write_hooks]\nhooks = a\na.type = exec\na.executable = /nowhere/ruff\n"
    ini.write_text(ini.read_text().replace("[post_write_hooks]", hook))


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (lose_the_parent, "is missing, but another one follows it"),
        (break_a_revision, "history can't be read: SyntaxError"),
        (forget_an_import, "No module named 'not_installed'"),
        (forget_a_variable, "KeyError: 'NOT_SET'"),
        (break_the_ini, "configuration can't be used: MissingSectionHeaderError"),
        (break_the_encoding, "configuration can't be used: UnicodeDecodeError"),
        (break_the_template, "Template rendering failed"),
        (lose_the_template, "script.py.mako"),
        (lose_the_folder, "migrations"),
        (break_a_hook, "the revision can't be written"),
    ],
)
def test_what_is_wrong_in_a_project_is_one_line_and_nothing_is_written(project, breaks, said):
    breaks(project)
    before = set(Path().rglob("*.py"))

    done = revision()

    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert set(Path().rglob("*.py")) == before


def test_an_env_in_another_encoding_is_read(project):
    env = Path("migrations/env.py")
    env.write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n" + env.read_bytes())

    assert revision().exit_code == 0


@pytest.mark.filterwarnings("ignore:'get_engine' is deprecated")  # by the env.py that Flask-Migrate makes
class TestFlaskMigrate:
    @pytest.fixture
    def make(self, empty_url) -> Callable[..., Flask]:
        """Make an application of theirs, with its migrations folder."""

        def make(*, multidb: bool = False) -> Flask:
            app = Flask("app_of_theirs")
            app.config["SQLALCHEMY_DATABASE_URI"] = empty_url
            if multidb:
                app.config["SQLALCHEMY_BINDS"] = {"other": empty_url}
            db = SQLAlchemy(app)

            class User(db.Model):
                id = sa.Column(sa.Integer, primary_key=True)

            flask_migrate.Migrate(app, db, include_object=apoq.migrations.include_object)
            context = app.app_context()
            context.push()
            contexts.append((db, context))
            flask_migrate.init("migrations", multidb=multidb)
            return app

        contexts = []
        yield make
        for db, context in contexts:
            for engine in db.engines.values():
                engine.dispose()
            context.pop()

    def test_it_adopts_apoq_by_one_revision(self, make, empty_url):
        make()
        flask_migrate.migrate(message="users")
        flask_migrate.upgrade()

        done = revision()

        assert done.exit_code == 0, done.output
        flask_migrate.upgrade()
        assert agree(empty_url)
        assert tables(empty_url) >= {"user", "apoq_tasks"}
        flask_migrate.migrate(message="nothing")
        assert len(list(Path("migrations/versions").glob("*.py"))) == 2

    def test_its_script_makes_the_tables(self, make, empty_url, capsys):
        make()
        revision()
        capsys.readouterr()

        flask_migrate.upgrade(sql=True)

        execute(empty_url, capsys.readouterr().out)
        assert agree(empty_url)

    def test_with_several_binds_they_are_in_the_default_one(self, make):
        make(multidb=True)

        done = revision()

        assert done.exit_code == 0, done.output
        (written,) = Path("migrations/versions").glob("*.py")
        default, other = written.read_text().split("def upgrade_other")
        assert "apoq.migrations.upgrade(op, version=1)" in default
        assert "apoq.migrations.upgrade" not in other

    def test_what_is_next_is_said_in_its_words(self, make):
        make()

        output = revision().output

        assert f"Migrate(app, db, {ADVICE})" in output
        assert "Run `flask db upgrade`." in output

    def test_a_configuration_that_is_given_is_used_instead_of_its_folder(self, make):
        make()
        command.init(Config("tasks.ini"), "tasks")

        # As `flask apoq revision` does it.
        done = CliRunner().invoke(
            main, ["revision", "-c", "tasks.ini"], default_map={"revision": {"directory": "migrations"}}
        )

        assert done.exit_code == 0, done.output
        assert len(list(Path("tasks/versions").glob("*.py"))) == 1
        assert list(Path("migrations/versions").glob("*.py")) == []

    def test_a_configuration_and_a_folder_can_not_be_combined(self, make):
        make()

        done = revision("-c", "migrations/alembic.ini", "-d", "migrations")

        assert done.exit_code == 2
        assert done.output == "Error: -c and -d can't be combined: leave out one of them\n"

    def test_its_configuration_can_not_be_read(self, make):
        make()
        Path("migrations/alembic.ini").write_text("no section\n")

        done = revision()

        assert done.exit_code == 1
        assert "your Alembic configuration can't be used: MissingSectionHeaderError" in done.output

    def test_a_folder_of_another_name_is_said(self):
        Path("database").mkdir()

        done = revision("-d", "database")

        assert done.exit_code == 2
        assert "no env.py" in done.output
