"""Which databases apoq works on, and the URLs that lead to them."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta
from urllib.parse import quote

import click
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from apoq import InvalidURL, Queue, UnsupportedDatabase, Worker, database_url, prepare
from apoq.cli import main
from apoq.cli.group import Commands
from apoq.cli.target import Target
from apoq.pyramid import Misconfigured, load_worker

SOON = 10.0
SECRETS = ("Tr0ub4dor", "S3cret99")
"""The two parts of a password, between which stands what isn't written with per cent signs."""

UNESCAPED = [
    "{}@{}@127.0.0.1:5432/app",
    "{}@x:{}@127.0.0.1:5432/app",
    "{}@x/{}@127.0.0.1:5432/app",
    "{}@x?{}@127.0.0.1:5432/app",
    "{}@x?a={}@127.0.0.1/app",
    "@{}@{}",
]


def readable(url: sa.URL) -> str:
    return url.render_as_string(hide_password=False)


@pytest.mark.parametrize(
    "scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg_async"]
)
def test_every_usual_spelling_means_psycopg_3(scheme):
    url = database_url(f" {scheme}://me:secret@host:5433/app?sslmode=require\n")

    assert readable(url) == "postgresql+psycopg://me:secret@host:5433/app?sslmode=require"


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "postgresql+asyncpg://host/app",
        "postgresql+psycopg2://host/app",
        "mysql://u:p@h1:1,h2:2/a",
    ],
)
@pytest.mark.parametrize("given", [str, sa.make_url])
def test_another_database_or_driver_is_refused(url, given):
    if given is sa.make_url and "," in url:
        pytest.skip("SQLAlchemy can't read it")
    with pytest.raises(UnsupportedDatabase, match="postgresql://"):
        database_url(given(url))


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("h/d", {"host": "h", "dbname": "d"}),
        ("me:@h", {"user": "me", "host": "h"}),
        ("me@server:pw@h", {"user": "me@server", "password": "pw", "host": "h"}),
        ("me:p%40%2Fw@h", {"user": "me", "password": "p@/w", "host": "h"}),
        ("me:p/w@h", {"user": "me", "password": "p/w", "host": "h"}),
        ("/d", {"dbname": "d"}),
        ("", {}),
        ("[::1]:5433/d", {"host": "::1", "port": 5433, "dbname": "d"}),
        ("h1:5432,h2:5433/d", {"host": "h1,h2", "port": "5432,5433", "dbname": "d"}),
        ("h1,h2:5433/d", {"host": "h1,h2", "port": ",5433", "dbname": "d"}),
        ("h1,h2/d?port=5433", {"host": "h1,h2", "port": "5433", "dbname": "d"}),
        ("[::1]:5432,[::2]/d", {"host": "::1,::2", "port": "5432,", "dbname": "d"}),
        ("me:pw@h1:1,h2:2", {"user": "me", "password": "pw", "host": "h1,h2", "port": "1,2"}),
        ("/d?host=h1:5432&host=h2:5433", {"host": "h1,h2", "port": "5432,5433", "dbname": "d"}),
        ("/d?host=h1,h2&port=1,2", {"host": "h1,h2", "port": "1,2", "dbname": "d"}),
        ("h/d?dbname=e", {"host": "h", "dbname": "e"}),
        ("h?dbname=d&dbname=e", {"host": "h", "dbname": "e"}),
        ("h1:1,h2:2/d?host=h3", {"host": "h3", "dbname": "d"}),
        ("%2Frun%2Fpg/d", {"host": "/run/pg", "dbname": "d"}),
        ("me@%2Frun%2Fpg:5433/d", {"user": "me", "host": "/run/pg", "port": "5433", "dbname": "d"}),
        ("%2Frun%2Fpg:1,h2:2", {"host": "/run/pg,h2", "port": "1,2"}),
        ("h?application_name=a%40b", {"host": "h", "application_name": "a@b"}),
    ],
)
def test_what_psycopg_gets_by_a_url(url, options):
    found = database_url(f"postgresql://{url}")
    engine = sa.create_engine(found)

    _, given = engine.dialect.create_connect_args(engine.url)
    given.pop("context", None)
    assert given == options
    assert database_url(readable(found)) == found


@pytest.fixture
def hosts(url) -> str:
    """The test's database as libpq's URL of two hosts, of which the first is down."""
    host = quote(str(url.host or url.query["host"]), safe="")
    port = url.port or url.query["port"]
    user = f"{url.username}:{quote(url.password, safe='')}@" if url.password else f"{url.username}@"
    return f"postgresql://{user}127.0.0.1:1,{host}:{port}/{url.database}?target_session_attrs=read-write"


@pytest.mark.parametrize("create", [sa.create_engine, create_async_engine])
def test_a_worker_works_on_several_hosts_and_is_notified_there(hosts, queue, create):
    engine = create(database_url(hosts))
    ran = threading.Semaphore(0)
    worker = Worker(engine, queue, poll_interval=timedelta(hours=1), listen_url=hosts)
    worker.use("t", lambda task: task.session.execute(sa.text("SELECT 1")) and ran.release())
    worker.start()
    adding = sa.create_engine(database_url(hosts))

    for _ in range(2):
        with Session(adding) as session, session.begin():
            queue.add(session, "t")
        assert ran.acquire(timeout=SOON)

    worker.stop()
    adding.dispose()
    getattr(engine, "sync_engine", engine).dispose()


def test_the_command_line_works_on_several_hosts(hosts):
    done = CliRunner().invoke(main, ["check", "--database-url", hosts])

    assert done.exit_code == 0
    assert "127.0.0.1," in done.output


@pytest.mark.parametrize("option", ["pgbouncer=true", "schema=public", "ssl=true", "connection_limit=5"])
def test_an_option_that_libpq_does_not_know_is_named(option):
    name = option.partition("=")[0]
    for given in (str, sa.make_url):
        with pytest.raises(InvalidURL, match=f"than libpq's, got '{name}': remove"):
            database_url(given(f"postgresql://host/app?{option}&sslmode=require"))


def test_what_to_do_instead_of_prismas_options_is_said():
    with pytest.raises(InvalidURL, match=r"got 'pgbouncer', 'schema': .*Queue\(schema=…\), or use --schema"):
        database_url("postgresql://host/app?pgbouncer=true&schema=public")


def test_options_are_a_plugins_where_one_is_named():
    url = database_url("postgresql://host/app?plugin=mine&speed=fast")

    assert url.query["speed"] == "fast"


class TestPasswords:
    """No part of one is in a message."""

    @pytest.mark.parametrize("shape", UNESCAPED)
    def test_one_with_an_unescaped_character(self, shape):
        with pytest.raises(InvalidURL) as raised:
            database_url("postgresql://app:" + shape.format(*SECRETS))

        assert not any(secret in str(raised.value) for secret in SECRETS)
        assert "%40 for @" in str(raised.value)
        assert raised.value.__context__ is None

    @pytest.mark.parametrize(
        "url", ["Tr0ub4dor", "", "Tr0ub4dor@host", "postgresql:Tr0ub4dor@h/d", "postgresql://h:Tr0ub4dor/d"]
    )
    def test_what_is_no_url(self, url):
        with pytest.raises(InvalidURL) as raised:
            database_url(url)

        assert "Tr0ub4dor" not in str(raised.value)
        assert raised.value.__context__ is None

    @pytest.mark.parametrize("url", [None, b"postgresql://h/Tr0ub4dor", 5])
    def test_what_is_no_text(self, url):
        with pytest.raises(TypeError, match=rf"must be a str or a sqlalchemy.URL, got {type(url).__name__}$"):
            database_url(url)

    def test_one_of_a_url_that_sqlalchemy_has_read(self):
        url = sa.make_url("postgresql://app:Tr0ub4dor@S3cret99@h/d")

        with pytest.raises(InvalidURL, match="%40 for @"):
            database_url(url)

    @pytest.mark.parametrize("shape", UNESCAPED)
    @pytest.mark.parametrize("command", ["check", "migrate", "list", "doctor", "stats"])
    def test_the_command_line_prints_none(self, command, shape):
        url = "postgresql://app:" + shape.format(*SECRETS)

        done = CliRunner().invoke(main, [command], env={"DATABASE_URL": url, "APOQ_DATABASE_URL": ""})

        assert done.exit_code == 2
        assert not any(secret in done.output for secret in SECRETS)

    @pytest.mark.parametrize("create", [sa.create_engine, create_async_engine])
    def test_one_of_an_engine(self, create):
        engine = create("postgresql+psycopg://app:Tr0ub4dor@S3cret99@127.0.0.1/app")

        with pytest.raises(InvalidURL, match="%40 for @"):
            Worker(engine, Queue())
        with pytest.raises(InvalidURL, match="%40 for @"):
            asyncio.run(prepare(engine))

    def test_one_of_an_applications_engine_on_its_command_line(self):
        done = self.run_theirs("postgresql+psycopg://app:Tr0ub4dor@S3cret99@127.0.0.1/app")

        assert done.exit_code == 2
        assert "%40 for @" in done.output
        assert not any(secret in done.output for secret in SECRETS)

    def test_an_unknown_option_of_an_applications_engine_is_said_in_one_line(self):
        done = self.run_theirs("postgresql+psycopg://app:Tr0ub4dor@127.0.0.1/app?pgbouncer=true")

        assert done.exit_code == 2
        assert 'invalid connection option "pgbouncer"' in done.output
        assert (done.output.count("\n"), "Tr0ub4dor" in done.output) == (1, False)

    def run_theirs(self, url: str):
        @click.group(cls=Commands)
        @click.pass_context
        def theirs(ctx):
            ctx.obj = Target(engine=sa.create_engine(url))

        return CliRunner().invoke(theirs, ["check"])

    @pytest.mark.parametrize(
        "url",
        [
            "postgresql+psycopg://app:Tr0ub4dor@x:S3cret99@127.0.0.1:5432/app",
            "postgresql+psycopg://app:Tr0ub4dor@S3cret99@nowhere.invalid/app",
            "Tr0ub4dor",
        ],
    )
    def test_one_in_an_application_that_can_not_be_imported(self, url, tmp_path, monkeypatch):
        (tmp_path / "app_of_a_url.py").write_text(
            f"import sqlalchemy as sa\nsa.create_engine({url!r}).connect()\n", encoding="utf-8"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)

        done = CliRunner().invoke(main, ["worker", "app_of_a_url:worker"])

        assert "can't be imported" in done.output
        assert not any(secret in done.output for secret in SECRETS)

    @pytest.mark.parametrize("value", ["Tr0ub4dor%40S3cret99", "%(name)s:Tr0ub4dorS3cret99"])
    def test_one_in_an_ini_file(self, tmp_path, value):
        ini = tmp_path / "site.ini"
        ini.write_text(f"[app:main]\nuse = egg:site\nsqlalchemy.url = postgresql://app:{value}@host/app\n")

        with pytest.raises(Misconfigured, match=r"sqlalchemy.url in \[app:main\] .*write % as %%") as raised:
            load_worker(str(ini))

        assert not any(secret in str(raised.value) for secret in SECRETS)
        assert raised.value.__cause__ is None
