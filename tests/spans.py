"""The spans of this process that have ended."""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

EXPORTER = InMemorySpanExporter()


def provide() -> None:
    """Export the spans of this process to memory; a process can have one provider only."""
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(EXPORTER))
        trace.set_tracer_provider(provider)


def ended(name: str | None = None) -> list[ReadableSpan]:
    """Return the spans of this name, or all."""
    return [span for span in EXPORTER.get_finished_spans() if name is None or span.name == name]


def linked(span: ReadableSpan) -> list[tuple[int, int]]:
    """Return the traces and spans that a span has links to."""
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


def ids(context: trace.SpanContext) -> tuple[int, int]:
    return context.trace_id, context.span_id
