"""Pyramid applications from ini files: served by real servers, and worked by `apoq worker --pyramid`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pyramid_site
import pytest
import sqlalchemy as sa
from applications.harness import Process, free_port, until
from click.testing import CliRunner
from pyramid_site import Base, Note
from sqlalchemy.orm import Session
from webtest import TestApp

from apoq import Queue
from apoq.cli import main
from apoq.pyramid import Misconfigured, load_worker
from apoq.pyramid.application import Application

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent

INI = """
[app:main]
use = call:pyramid_site:main
sqlalchemy.url = {url}
{settings}

[server:main]
use = egg:waitress#main
listen = 127.0.0.1:%(http_port)s

[loggers]
keys = root
[handlers]
keys = console
[formatters]
keys = plain
[logger_root]
level = INFO
handlers = console
[handler_console]
class = StreamHandler
args = (sys.stderr,)
formatter = plain
[formatter_plain]
format = as the ini says: %(message)s
"""

COMPOSITE = """
[composite:main]
use = call:test_pyramid_serving:compose
apps = shop blog

[app:blog]
use = {use}
"""


@pytest.fixture
def write_ini(engine, tmp_path) -> Callable[..., Path]:
    Base.metadata.create_all(engine)

    def write(**settings: str) -> Path:
        ini = tmp_path / "development.ini"
        lines = "\n".join(f"apoq.{name} = {value}" for name, value in settings.items())
        ini.write_text(
            INI.format(
                url=engine.url.render_as_string(hide_password=False).replace("%", "%%"), settings=lines
            )
        )
        return ini

    return write


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*command: object) -> Process:
        process = Process(
            [str(BIN / str(command[0])), *map(str, command[1:])],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONUNBUFFERED": "1"},
            log=tmp_path / f"output-{len(started)}.log",
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def serve(start) -> Iterator[Callable[..., httpx.Client]]:
    """Start a web server by its command, in which ``{port}`` is its port; answer a browser."""
    with httpx.Client(timeout=30, trust_env=False) as client:

        def serve(*command: object) -> httpx.Client:
            port = free_port()
            server = start(*(str(part).format(port=port) for part in command))
            client.base_url = httpx.URL(f"http://127.0.0.1:{port}")
            until(lambda: process_id(client), what="the server answers", alive=server)
            return client

        yield serve


def process_id(client: httpx.Client) -> str | None:
    """Answer which process serves; None while none does."""
    try:
        return client.get("/process_id").raise_for_status().text
    except httpx.HTTPError:
        return None


@pytest.fixture
def notes(engine) -> Callable[[], list[str]]:
    def read() -> list[str]:
        with Session(engine) as session:
            return sorted(session.scalars(sa.select(Note.text)))

    return read


class TestTheWorkerOfAnIniFile:
    def test_works_its_tasks(self, write_ini, start, notes, engine):
        worker = start("python", "-m", "apoq", "worker", "--pyramid", write_ini())

        with Session(engine) as session, session.begin():
            Queue().add(session, "note", {"text": "noted"})

        until(notes, what="the task is worked", alive=worker)
        assert notes() == ["noted"]
        assert "as the ini says: <Worker of Queue('default') concurrency=4> has started" in worker.output()
        worker.interrupt()
        assert worker.wait() == 0

    def test_is_as_its_settings_say(self, write_ini):
        ini = write_ini(concurrency="2", queues="emails reports", schema="jobs")

        assert repr(load_worker(str(ini))) == (
            "<Worker of Queue('emails', schema='jobs'), Queue('reports', schema='jobs') concurrency=2>"
        )

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            (None, "development.ini: .*No such file or directory"),
            ("", "development.ini: No section 'main'"),
            ("[app:main", "development.ini: File contains no section headers"),
            ("[app:main]\nuse = call:test_pyramid_serving:bare", r"call config.include\(\"apoq.pyramid\"\)"),
            ("[app:main]\nuse = call:test_pyramid_serving:bare\napoq.concurrency = 2", "call config.include"),
            ("[app:main]\nuse = call:test_pyramid_serving:conflicting", "Conflicting configuration actions"),
        ],
    )
    def test_a_file_that_can_not_be_used(self, tmp_path, text, says):
        ini = tmp_path / "development.ini"
        if text is not None:
            ini.write_text(text)

        with pytest.raises(Misconfigured, match=says):
            load_worker(str(ini))

    def test_a_file_that_does_not_configure_logging_leaves_it_alone(self, write_ini, monkeypatch):
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        ini = write_ini()
        ini.write_text(ini.read_text().partition("[loggers]")[0])

        load_worker(str(ini))

        assert logging.getLogger().handlers == []

    def test_of_several_applications_it_is_the_one_with_apoq(self, write_ini):
        ini = write_ini(queue="emails")
        text = ini.read_text().replace("[app:main]", "[app:shop]")
        ini.write_text(text + COMPOSITE.format(use="call:test_pyramid_serving:bare"))

        assert [queue.name for queue in load_worker(str(ini)).queues] == ["emails"]

    def test_of_several_applications_with_apoq_one_must_be_given(self, write_ini):
        ini = write_ini(queue="emails")
        text = ini.read_text().replace("[app:main]", "[app:shop]")
        use = "call:test_pyramid_serving:bare\npyramid.includes = apoq.pyramid"
        ini.write_text(text + COMPOSITE.format(use=use))

        with pytest.raises(Misconfigured, match=r"got 2: give one, as in .*development\.ini#shop"):
            load_worker(str(ini))
        assert [queue.name for queue in load_worker(f"{ini}#shop").queues] == ["emails"]

    def test_the_command_says_so_in_one_line(self, tmp_path):
        ini = tmp_path / "development.ini"
        ini.write_text("[app:main]\nuse = call:test_pyramid_serving:bare")

        result = CliRunner().invoke(main, ["worker", "--pyramid", str(ini)])

        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("Error: this application doesn't include apoq: call config.include")


def compose(loader, global_config, apps):
    """Create several applications, as Paste's urlmap does."""
    return [loader.get_app(name, global_config) for name in apps.split()]


def bare(_global_config, **settings):
    from pyramid.config import Configurator

    return Configurator(settings=settings).make_wsgi_app()


def conflicting(_global_config, **settings):
    from pyramid.config import Configurator

    config = Configurator(settings=settings)
    config.include("apoq.pyramid")
    config.add_apoq_task(pyramid_site.note, "t")
    config.add_apoq_task(pyramid_site.note_and_doom, "t")
    return config.make_wsgi_app()


class TestAnEmbeddedWorker:
    @pytest.fixture
    def site(self, engine):
        """An application with an in-process worker, in this process."""
        Base.metadata.create_all(engine)
        url = engine.url.render_as_string(hide_password=False)
        settings = {"sqlalchemy.url": url, "apoq.in_process_worker": "true"}
        site = pyramid_site.main({}, **settings)
        yield site
        Application.of(site.registry).in_process.stop()
        site.registry["dbsession_factory"].kw["bind"].dispose()

    def test_starts_with_the_first_request(self, site):
        worker = Application.of(site.registry).in_process
        browser = TestApp(site)
        assert not worker.is_healthy()

        browser.get("/health")

        until(worker.is_healthy, what="it works")
        assert browser.get("/health").text == "healthy"

    def test_there_is_none_unless_asked_for(self, engine):
        url = engine.url.render_as_string(hide_password=False)
        site = pyramid_site.main({}, **{"sqlalchemy.url": url})

        assert TestApp(site).get("/health").text == "no worker"

    def test_that_can_not_start_says_so_and_harms_no_request(self, site, engine, caplog):
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE apoq_tasks, apoq_workers, apoq_migrations")

        assert TestApp(site).get("/health").text == "no worker"

        until(lambda: "CRITICAL" in caplog.text, what="it says that it can't")
        (said,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
        assert "tries again: apoq's tables are missing" in said.getMessage()

    def test_one_in_each_process_of_gunicorn_runs_each_task_once(self, write_ini, serve, notes, engine):
        ini = write_ini(in_process_worker="true")
        command = ["gunicorn", "--paste", ini, "--preload", "--workers", "2", "--bind", "127.0.0.1:{port}"]
        browser = serve(*command)
        # Begun by the first request that each of them serves.
        until(lambda: browser.get("/health").text == "healthy" and workers(engine) == 2, what="both work")

        for number in range(20):
            browser.get("/add", params={"text": f"{number:02}"})

        until(lambda: len(notes()) >= 20, what="all tasks are worked")
        assert notes() == [f"{number:02}" for number in range(20)]

    def test_a_reload_does_it_no_harm(self, write_ini, serve, notes):
        ini = write_ini(in_process_worker="true")
        browser = serve("pserve", "--reload", ini, "http_port={port}")
        first = browser.get("/process_id").text
        browser.get("/add", params={"text": "before"})
        until(lambda: notes() == ["before"], what="the task is worked")

        ini.write_text(ini.read_text() + "\n")

        until(lambda: process_id(browser) not in (None, first), what="a new process")
        browser.get("/add", params={"text": "between"})
        until(lambda: "between" in notes(), what="the task is worked")
        assert notes() == ["before", "between"]


def workers(engine) -> int:
    with engine.connect() as connection:
        return connection.exec_driver_sql("SELECT count(*) FROM apoq_workers").scalar_one()
