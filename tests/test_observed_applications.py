"""Metrics and traces of the workers of web applications, by the applications' settings."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pyramid_site
import pytest
import sqlalchemy as sa
from fastapi import FastAPI, Request, Response
from flask import Flask, request
from flask_sqlalchemy import SQLAlchemy
from opentelemetry import trace
from prometheus_client import CollectorRegistry
from pyramid_site import Base
from spans import EXPORTER, ended, ids, linked, provide
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from waiting import patience
from webtest import TestApp

from apoq import MissingExtra, Queue, Worker
from apoq.fastapi import lifespan
from apoq.flask import Apoq
from apoq.metrics import exposition
from apoq.pyramid import Misconfigured, make_worker
from apoq.pyramid.application import Application
from apoq.pyramid.settings import Settings as PyramidSettings

until = patience(20)
tracer = trace.get_tracer("the application")

COMPLETED = 'apoq_tasks_total{outcome="completed",queue="default",type="%s"} 1.0'


@pytest.fixture(autouse=True)
def _spans() -> Iterator[None]:
    provide()
    EXPORTER.clear()
    yield
    EXPORTER.clear()


def is_linked(type_: str, context: trace.SpanContext) -> bool:
    """Return whether the task's attempt has ended in a span that is linked to the one of its request."""
    return [linked(span) for span in ended(f"process {type_}")] == [[ids(context)]]


def hide(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Let a module be imported as if it were not installed."""
    for name in [name for name in sys.modules if name.startswith(("apoq.metrics", module))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)


class TestFlask:
    @pytest.fixture
    def make(self, url) -> Iterator[Callable[..., Flask]]:
        """Make an application with these settings."""
        made: list[tuple[Flask, SQLAlchemy]] = []

        def make(apoq: Apoq, **settings: Any) -> Flask:
            app, db = Flask("shop"), SQLAlchemy()
            app.config.update(SQLALCHEMY_DATABASE_URI=url, **settings)
            db.init_app(app)
            made.append((app, db))
            apoq.init_app(app)

            @app.post("/sign-up")
            def sign_up() -> str:
                apoq.add("welcome")
                db.session.commit()
                return "welcome"

            @app.get("/metrics")
            def metrics() -> Any:
                content_type, body = exposition(apoq.worker.metrics, request.headers.get("Accept", ""))
                return body, {"Content-Type": content_type}

            return app

        yield make
        for app, db in made:
            with app.app_context():
                db.engine.dispose()

    def test_an_embedded_worker_is_observed(self, make):
        apoq = Apoq()
        apoq.use("welcome", lambda task: None)
        app = make(apoq, APOQ_METRICS=True, APOQ_TRACING=True, APOQ_IN_PROCESS_WORKER=True)
        client = app.test_client()
        try:
            with tracer.start_as_current_span("request") as span:
                assert client.post("/sign-up").status_code == 200
            until(lambda: is_linked("welcome", span.get_span_context()))

            until(lambda: COMPLETED % "welcome" in client.get("/metrics").text)
            response = client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
            assert response.content_type.startswith("application/openmetrics-text")
        finally:
            with app.app_context():
                apoq.worker.stop()

    def test_without_the_settings_it_is_not(self, make):
        apoq = Apoq()
        app = make(apoq)

        with app.app_context():
            assert apoq.worker.metrics is None

    def test_metrics_go_to_the_registry_of_the_setting(self, make):
        apoq, registry = Apoq(), CollectorRegistry()

        with make(apoq, APOQ_METRICS=registry).app_context():
            assert apoq.worker.metrics is registry

    def test_the_environment_may_set_them(self, monkeypatch):
        monkeypatch.setenv("FLASK_APOQ_METRICS", "true")
        monkeypatch.setenv("FLASK_APOQ_TRACING", "child")
        app = Flask("shop")
        app.config.from_prefixed_env()
        Apoq(app)

        assert app.extensions["apoq"].settings.worker == {"metrics": True, "tracing": "child"}

    @pytest.mark.parametrize(
        ("settings", "error", "says"),
        [
            ({"APOQ_METRICS": "yes"}, TypeError, "APOQ_METRICS must be True, False or a CollectorRegistry"),
            ({"APOQ_METRICS": None}, TypeError, "got None"),
            ({"APOQ_TRACING": "parent"}, ValueError, 'APOQ_TRACING must be True, False, "link" or "child"'),
        ],
    )
    def test_a_wrong_one_is_named_when_the_application_is_made(self, make, settings, error, says):
        with pytest.raises(error, match=says):
            make(Apoq(), **settings)

    @pytest.mark.parametrize(
        ("setting", "module", "extra"),
        [
            ("APOQ_METRICS", "prometheus_client", "metrics"),
            ("APOQ_TRACING", "opentelemetry.trace", "tracing"),
        ],
    )
    def test_a_missing_library_is_named_when_the_application_is_made(
        self, make, monkeypatch, setting, module, extra
    ):
        hide(monkeypatch, module)

        with pytest.raises(MissingExtra, match=rf'pip install "apoq\[{extra}\]"'):
            make(Apoq(), **{setting: True})


class TestPyramid:
    @pytest.fixture
    def site(self, engine) -> Iterator[Any]:
        """An application whose in-process worker has metrics and traces."""
        Base.metadata.create_all(engine)
        settings = {
            "sqlalchemy.url": engine.url.render_as_string(hide_password=False),
            "apoq.in_process_worker": "true",
            "apoq.metrics": "true",
            "apoq.tracing": "link",
        }
        site = pyramid_site.main({}, **settings)
        yield site
        Application.of(site.registry).in_process.stop()
        site.registry["dbsession_factory"].kw["bind"].dispose()

    def test_an_embedded_worker_is_observed(self, site):
        with tracer.start_as_current_span("request") as span:
            TestApp(site).get("/add")

        until(lambda: is_linked("note", span.get_span_context()))
        until(lambda: COMPLETED % "note" in TestApp(site).get("/metrics").text)

    @pytest.mark.parametrize(
        ("name", "value", "read"),
        [
            ("metrics", "true", True),
            ("metrics", "off", False),
            ("metrics", True, True),
            ("tracing", " Link ", "link"),
            ("tracing", "child", "child"),
            ("tracing", "true", True),
            ("tracing", "false", False),
        ],
    )
    def test_the_settings_are_text(self, name, value, read):
        assert PyramidSettings.read({f"apoq.{name}": value}).worker == {name: read}

    def test_a_program_may_give_a_registry(self, engine):
        registry = CollectorRegistry()
        url = engine.url.render_as_string(hide_password=False)
        site = pyramid_site.main({}, **{"sqlalchemy.url": url, "apoq.metrics": registry})

        assert make_worker(site.registry).metrics is registry
        with pytest.raises(Misconfigured, match=r"apoq\.metrics must be true if this process creates"):
            make_worker(site.registry)
        site.registry["dbsession_factory"].kw["bind"].dispose()

    @pytest.mark.parametrize(
        ("name", "value", "says"),
        [
            ("metrics", "perhaps", "apoq.metrics must be true or false, got 'perhaps'"),
            ("metrics", 7, "apoq.metrics must be true or false, or a CollectorRegistry"),
            ("tracing", "parent", "apoq.tracing must be link, child, true or false, got 'parent'"),
        ],
    )
    def test_a_wrong_one_is_named(self, name, value, says):
        with pytest.raises(Misconfigured, match=says):
            PyramidSettings.read({f"apoq.{name}": value})

    @pytest.mark.parametrize(
        ("name", "module"), [("metrics", "prometheus_client"), ("tracing", "opentelemetry.trace")]
    )
    def test_a_missing_library_is_named(self, monkeypatch, name, module):
        hide(monkeypatch, module)

        with pytest.raises(Misconfigured, match=rf'apoq\.{name}: .*pip install "apoq\[{name}\]"'):
            PyramidSettings.read({f"apoq.{name}": "true"})


def test_fastapi_serves_the_metrics_of_its_worker(url, queue):
    asyncio.run(serve_fastapi(url, queue))


async def serve_fastapi(url: sa.URL, queue: Queue) -> None:
    engine = create_async_engine(url)
    ran = asyncio.Event()

    async def welcome(_task: Any) -> None:
        ran.set()

    worker = Worker(engine, queue, metrics=True, tracing=True)
    worker.use("welcome", welcome)
    app = FastAPI(lifespan=lifespan(worker))

    @app.get("/metrics")
    def metrics(request: Request) -> Response:
        content_type, body = exposition(worker.metrics, request.headers.get("Accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    transport = httpx.ASGITransport(app)
    async with (
        asyncio.timeout(30),
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        with tracer.start_as_current_span("request") as span:
            async with AsyncSession(engine) as session, session.begin():
                await queue.add(session, "welcome")
        await ran.wait()
        context = span.get_span_context()
        await asyncio.to_thread(until, lambda: is_linked("welcome", context) and worker.stats().completed)
        assert COMPLETED % "welcome" in (await client.get("/metrics")).text
    await engine.dispose()
