"""Traces: from the span in which a task is added to those of its attempts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from isolated_tasks import current_span
from opentelemetry import trace
from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode
from spans import EXPORTER, ended, ids, linked, provide
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from waiting import patience

from apoq import Cancel, Queue, Retry, Snooze, Task
from apoq.errors import MissingExtra

until = patience(20)

tracer = trace.get_tracer("the application")


@pytest.fixture(scope="module", autouse=True)
def _provider() -> None:
    provide()


@pytest.fixture(autouse=True)
def spans() -> Iterator[Callable[..., list[ReadableSpan]]]:
    """Return the spans that have ended, of this name or all."""
    EXPORTER.clear()
    yield ended
    EXPORTER.clear()


@pytest.fixture
def add(engine, queue) -> Callable[..., trace.SpanContext]:
    """Add a task in the span of a request; return that span's context."""

    def add(type_: str = "t", **options: object) -> trace.SpanContext:
        with (
            tracer.start_as_current_span("request") as span,
            Session(engine) as session,
            session.begin(),
        ):
            queue.add(session, type_, **options)
        return span.get_span_context()

    return add


class TestAdding:
    def test_it_stores_the_current_span(self, session, queue):
        with tracer.start_as_current_span("request") as span:
            task = queue.add(session, "t", meta={"tenant": 7})
            queue.add_many(session, "t", [{}] * 2)
        context = span.get_span_context()

        flags = f"{context.trace_flags:02x}"
        expected = f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags}"
        assert task.meta == {"tenant": 7, "traceparent": expected}
        found = session.scalars(sa.select(Task.meta["traceparent"].astext)).all()
        assert found == [expected] * 3

    def test_so_do_chains_and_groups(self, session, queue):
        @queue.task(type="t")
        def process() -> None: ...

        with tracer.start_as_current_span("request"):
            queue.chain(session, process.call(), process.call())
            with queue.group(session, name="import 7") as group:
                group.add(process.call())
                group.add_many([process.call()])
                group.then(process.call())
        found = session.scalars(sa.select(Task.meta["traceparent"].astext)).all()
        assert len(found) == 5
        assert None not in found
        assert len(set(found)) == 1

    def test_without_a_valid_span_it_stores_nothing(self, session, queue):
        assert queue.add(session, "t").meta is None
        with trace.use_span(trace.INVALID_SPAN):
            assert queue.add(session, "t").meta is None

    def test_a_span_that_is_not_sampled_is_stored_as_well(self, session, queue):
        context = trace.SpanContext(1, 2, is_remote=False, trace_state=trace.TraceState([("vendor", "x")]))
        with trace.use_span(trace.NonRecordingSpan(context)):
            meta = queue.add(session, "t").meta

        assert meta == {"traceparent": f"00-{1:032x}-{2:016x}-00", "tracestate": "vendor=x"}

    def test_so_does_an_async_session(self, url, queue):
        async def add() -> dict:
            engine = create_async_engine(url)
            try:
                async with AsyncSession(engine) as session, session.begin():
                    with tracer.start_as_current_span("request"):
                        return (await queue.add(session, "t")).meta
            finally:
                await engine.dispose()

        assert set(asyncio.run(add())) == {"traceparent"}

    def test_without_the_library_it_costs_no_import(self):
        program = "import sys, apoq; print([name for name in sys.modules if 'opentelemetry' in name])"

        assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


class TestAttempts:
    @pytest.fixture
    def worker(self, make_worker):
        return make_worker(tracing=True)

    def test_a_request_its_task_and_its_retry_are_linked(self, worker, add, spans):
        def process(task):
            if task.attempt == 1:
                raise ValueError("not yet")

        worker.use("t", process, retry_delay=0)
        request = add()
        worker.work()
        worker.work()

        first, second = spans("process t")
        assert linked(first) == linked(second) == [ids(request)]
        assert first.parent is second.parent is None
        assert len({first.context.trace_id, second.context.trace_id, request.trace_id}) == 3
        assert first.kind is SpanKind.CONSUMER
        assert dict(first.attributes) == {
            "messaging.system": "apoq",
            "messaging.destination.name": "default",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.message.id": "1",
            "apoq.task.type": "t",
            "apoq.task.attempt": 1,
            "error.type": "ValueError",
        }
        assert first.status.status_code is StatusCode.ERROR
        assert [event.name for event in first.events] == ["exception"]
        assert second.status.status_code is StatusCode.UNSET

    def test_the_first_attempt_is_a_child_if_that_is_asked_for(self, make_worker, add, spans):
        def process(task):
            raise Retry(delay=0)

        worker = make_worker(tracing="child")
        worker.use("t", process)
        request = add()
        worker.work()
        worker.work()

        first, second = spans("process t")
        assert (first.context.trace_id, first.parent.span_id) == ids(request)
        assert (second.parent, linked(second)) == (None, [ids(request)])

    def test_a_task_that_waited_for_long_is_no_child(self, make_worker, engine, add, spans):
        worker = make_worker(tracing="child")
        worker.use("t", lambda task: None)
        request = add()
        with engine.begin() as connection:
            connection.execute(sa.text("UPDATE apoq_tasks SET created_at = now() - interval '2 min'"))
        worker.work()

        (span,) = spans("process t")
        assert (span.parent, linked(span)) == (None, [ids(request)])

    def test_the_processors_own_spans_are_children_and_the_next_task_has_none_of_them(
        self, make_worker, engine, queue, spans
    ):
        worker = make_worker(tracing=True, concurrency=1)

        def process(task):
            with tracer.start_as_current_span("own"):
                pass

        async def coroutine(task):
            await asyncio.sleep(0)
            with tracer.start_as_current_span("own"):
                await asyncio.sleep(0)

        worker.use("t", process)
        worker.use("async", coroutine)
        with engine.begin() as connection:
            for type_ in ("t", "async") * 3:
                queue.add(connection, type_)
        worker.start()
        until(lambda: worker.stats().completed == 6)
        worker.stop()

        attempts = {span.context.span_id: span for span in [*spans("process t"), *spans("process async")]}
        assert len(attempts) == 6
        assert {span.parent.span_id for span in spans("own")} == set(attempts)
        assert all(span.parent is None and not span.links for span in attempts.values())

    @pytest.mark.slow
    def test_the_span_is_current_in_the_process_of_an_isolated_task(self, make_worker, engine, add, spans):
        worker = make_worker(tracing=True)
        worker.use("t", current_span, isolated=True, keep_result=True)
        add()

        task = worker.work()

        (span,) = spans("process t")
        with Session(engine) as session:
            found = Queue().result(session, task).value
        context = span.get_span_context()
        assert found == [f"{context.trace_id:032x}", f"{context.span_id:016x}"]

    def test_a_worker_that_starts_in_a_request_does_not_extend_its_trace(self, worker, add, spans):
        worker.use("t", lambda task: None)
        add()
        with tracer.start_as_current_span("other") as other:
            worker.work()

        (span,) = spans("process t")
        assert span.context.trace_id != other.get_span_context().trace_id

    def test_it_ends_after_the_commit_of_the_tasks_session(self, make_worker, engine, add, spans):
        worker = make_worker(tracing=True)
        seen = []

        def process(task):
            task.session.execute(sa.text("SELECT 1"))
            sa.event.listen(
                task.session, "after_commit", lambda session: seen.append(len(spans("process t")))
            )

        worker.use("t", process)
        add()
        worker.work()

        assert seen == [0]
        assert len(spans("process t")) == 1

    @pytest.mark.parametrize("outcome", [Snooze(60), Cancel()], ids=repr)
    def test_other_outcomes_are_no_errors(self, worker, add, spans, outcome):
        def process(task):
            raise outcome

        worker.use("t", process)
        add()
        worker.work()

        (span,) = spans("process t")
        assert (span.status.status_code, span.events) == (StatusCode.UNSET, ())

    def test_the_processor_does_not_see_the_context_in_its_meta(self, worker, add):
        found = []
        worker.use("t", lambda task: found.append(task.meta))
        add(meta={"tenant": 7})
        worker.work()

        assert found == [{"tenant": 7}]

    @pytest.mark.parametrize("value", ["", "00-1", f"00-{0:032x}-{0:016x}-01", "x" * 5_000, 7, None])
    def test_what_another_program_stored_is_no_error(self, worker, engine, spans, value):
        worker.use("t", lambda task: None)
        with engine.begin() as connection:
            connection.execute(
                sa.insert(Task), [{"type": "t", "meta": {"traceparent": value, "tracestate": value}}]
            )

        assert worker.work().state == "completed"
        (span,) = spans("process t")
        assert not span.links

    def test_without_tracing_there_are_no_spans(self, make_worker, add, spans):
        worker = make_worker()
        worker.use("t", lambda task: None)
        add()
        worker.work()

        assert [span.name for span in spans()] == ["request"]

    def test_the_option_must_be_one_of_these(self, make_worker, monkeypatch):
        with pytest.raises(ValueError, match="tracing must be True, False"):
            make_worker(tracing="parent")
        monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
        with pytest.raises(
            MissingExtra, match=r'opentelemetry-api is not installed: pip install "apoq\[tracing\]"'
        ):
            make_worker(tracing=True)


class TestInstrumentations:
    """With those of SQLAlchemy and psycopg on, only the application's statements are traced."""

    @pytest.fixture
    def engine(self, url) -> Iterator[sa.Engine]:
        SQLAlchemyInstrumentor().instrument()
        PsycopgInstrumentor().instrument()
        engine = sa.create_engine(url, poolclass=NullPool)
        yield engine
        engine.dispose()
        SQLAlchemyInstrumentor().uninstrument()
        PsycopgInstrumentor().uninstrument()

    @pytest.fixture
    def engine_of_the_application(self, engine) -> sa.Engine:
        return engine

    def test_the_workers_own_statements_are_not_traced(self, engine, make_worker, spans):
        queue = Queue()
        worker = make_worker(tracing=True)
        table = "CREATE TEMP TABLE ours (id int)"

        def process(task):
            task.session.execute(sa.text(table))

        worker.use("t", process)
        worker.use("plain", lambda task: None)
        with engine.begin() as connection:
            queue.add(connection, "t")
            queue.add(connection, "plain", {"large": "x" * 20_000})
        assert any("INSERT" in span.name for span in spans())  # so the instrumentations are on
        EXPORTER.clear()

        worker.start()
        until(lambda: worker.stats().completed == 2)
        worker.stop()
        with engine.begin() as connection:
            queue.add(connection, "plain")
        EXPORTER.clear()
        worker.work()

        statements = [span.attributes.get("db.statement", span.name) for span in spans()]
        assert [text for text in statements if text != "process plain"] == []

    def test_those_of_a_processor_are_in_its_span(self, engine, make_worker, spans):
        queue = Queue()
        worker = make_worker(tracing=True)
        worker.use("t", lambda task: task.session.execute(sa.text("SELECT 7 AS ours")))
        with engine.begin() as connection:
            queue.add(connection, "t")
        EXPORTER.clear()

        worker.start()
        until(lambda: worker.stats().completed)
        worker.stop()

        (attempt,) = spans("process t")
        others = [span for span in spans() if span is not attempt]
        assert any("SELECT 7 AS ours" in span.attributes.get("db.statement", "") for span in others)
        assert all(span.context.trace_id == attempt.context.trace_id for span in others)
        assert not any("apoq_" in span.attributes.get("db.statement", "") for span in others)
