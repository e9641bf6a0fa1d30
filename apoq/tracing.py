"""Traces through OpenTelemetry's API: the context that travels with a task, and the spans of attempts.

Nothing here imports or sets up the SDK. The API is only imported for workers with ``tracing=``; elsewhere, it
is used if the application has imported it, because without it there can't be a span.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final, Literal

from apoq.errors import MissingExtra

TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"
KEYS: Final = (TRACEPARENT, TRACESTATE)
"""The keys of a task's `meta` that hold the context."""

MAX_TRACESTATE: Final = 512
"""A longer tracestate is left out, as the specification allows."""

LINK: Final = "link"
CHILD: Final = "child"

Relation = Literal["link", "child"]
"""How the span of an attempt refers to the span that was current when its task was added."""

_SUPPRESS: Final = "suppress_instrumentation"
"""The key in OpenTelemetry's context at which instrumentations look."""


def with_trace(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a new task, with the current span in its `meta`, if there is a valid one."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return parameters
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return parameters
    found = {TRACEPARENT: f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"}
    state = context.trace_state.to_header() if context.trace_state else ""
    if 0 < len(state) <= MAX_TRACESTATE:
        found[TRACESTATE] = state
    # It is the text of a JSON object, or None.
    given = parameters["task_meta"]
    text = json.dumps(found)
    return parameters | {"task_meta": text if given is None else f"{text[:-1]},{given[1:]}"}


@contextmanager
def in_trace(meta: str | None) -> Iterator[None]:
    """Make the span current in this block that `with_trace` has written, in another process."""
    if meta is None:
        yield
        return
    propagator = import_module("opentelemetry.trace.propagation.tracecontext")
    context = import_module("opentelemetry.context")
    token = context.attach(propagator.TraceContextTextMapPropagator().extract(json.loads(meta)))
    try:
        yield
    finally:
        context.detach(token)


@contextmanager
def untraced() -> Iterator[None]:
    """Let no instrumentation trace what is done in this block: it is apoq's own work."""
    context = sys.modules.get("opentelemetry.context")
    if context is None:
        yield
        return
    token = context.attach(context.set_value(_SUPPRESS, True))
    try:
        yield
    finally:
        context.detach(token)


class Tracer:
    """Begins spans for the attempts of a worker."""

    def __init__(self, relation: Relation) -> None:
        """Import the API; `MissingExtra` if it isn't installed."""
        try:
            self._trace = import_module("opentelemetry.trace")
            self._context = import_module("opentelemetry.context")
            propagator = import_module("opentelemetry.trace.propagation.tracecontext")
        except ImportError as error:
            raise MissingExtra("tracing", "opentelemetry-api") from error
        self._propagator = propagator.TraceContextTextMapPropagator()
        self._tracer = self._trace.get_tracer("apoq")
        self._relation = relation

    @contextmanager
    def span(
        self, name: str, attributes: Mapping[str, Any], meta: Mapping[str, Any], *, may_be_child: bool
    ) -> Iterator[Any]:
        """Make a span current in this block, and end it at its end.

        It is the root of a new trace, with a link to the span in `meta`. If the worker asks for children and
        `may_be_child`, it is a child of that span instead.
        """
        sender = self._sender(meta)
        is_child = sender is not None and may_be_child and self._relation == CHILD
        added_in = sender if is_child else None
        links = [] if sender is None or is_child else [self._trace.Link(_span_context(self._trace, sender))]
        span = self._tracer.start_span(
            name,
            # Not the current context: a worker that is started in a request would extend its trace for ever.
            context=added_in or self._context.Context(),
            kind=self._trace.SpanKind.CONSUMER,
            attributes=attributes,
            links=links,
        )
        token = self._context.attach(self._trace.set_span_in_context(span))
        try:
            yield span
        finally:
            self._context.detach(token)
            span.end()

    def fail(self, span: Any, error: BaseException) -> None:
        """Note the error of an attempt."""
        span.record_exception(error)
        span.set_attribute("error.type", type(error).__qualname__)
        span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, str(error)))

    def _sender(self, meta: Mapping[str, Any]) -> Any:
        """Return a context with the span that was current when the task was added; None if it has none."""
        carrier = {key: meta[key] for key in KEYS if isinstance(meta.get(key), str)}
        if TRACEPARENT not in carrier:
            return None
        context = self._propagator.extract(carrier, context=self._context.Context())
        return context if _span_context(self._trace, context).is_valid else None


def _span_context(trace: Any, context: Any) -> Any:
    return trace.get_current_span(context).get_span_context()
