"""Metrics for Prometheus: a worker's own, and those that one exporter reads from the database.

They need the extra ``apoq[metrics]``.
"""

from __future__ import annotations

from apoq.errors import MissingExtra

try:
    import prometheus_client  # noqa: F401
except ImportError as error:
    raise MissingExtra("metrics", "prometheus-client") from error

from apoq.metrics.database import DatabaseMetrics, database_registry
from apoq.metrics.exposition import exposition
from apoq.metrics.worker import WorkerMetrics

__all__ = ["DatabaseMetrics", "WorkerMetrics", "database_registry", "exposition"]
