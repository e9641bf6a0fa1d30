"""Writes metrics in Prometheus' formats."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder


def exposition(registry: CollectorRegistry, accept: str = "") -> tuple[str, bytes]:
    """Return the content type and the body of a response with all metrics of a registry.

    Args:
        registry: The registry, such as that of `database_registry` or `Worker.metrics`.
        accept: The request's header `Accept`, by which Prometheus chooses the format.
    """
    encode, content_type = choose_encoder(accept)
    return content_type, encode(registry)
