"""The expressions of the dashboard and of the alerts name metrics and labels that are exported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import yaml
from pages import ROOT
from prometheus_client.parser import text_string_to_metric_families

from apoq.metrics import database_registry, exposition

FOLDER = ROOT / "examples" / "monitoring"
OF_PROMETHEUS = {"instance", "job"}
"""Labels that Prometheus adds."""

_METRIC = re.compile(r"\b(apoq_\w+)(?:\{(.*?)\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"(.*?)"')
_BY = re.compile(r"\b(?:by|on|without)\s*\((.*?)\)")


class Series(NamedTuple):
    labels: set[str]
    values: dict[str, set[str]]


@pytest.fixture
def exported(engine, make_worker, queue) -> dict[str, Series]:
    """Return all exported series by name, with their labels and the values of these."""
    with engine.begin() as connection:
        queue.add(connection, "t")
    worker = make_worker(metrics=True)
    worker.use("t", lambda task: None)
    found: dict[str, Series] = {}
    for registry in (worker.metrics, database_registry(engine)):
        for family in text_string_to_metric_families(exposition(registry)[1].decode()):
            for sample in family.samples:
                series = found.setdefault(sample.name, Series(set(), {}))
                series.labels.update(sample.labels)
                for name, value in sample.labels.items():
                    series.values.setdefault(name, set()).add(value)
    return found


def alerts() -> list[dict]:
    [group] = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return group["rules"]


def dashboard() -> dict:
    return json.loads((FOLDER / "grafana.json").read_text())


def expressions() -> Iterator[tuple[str, str]]:
    """Yield each expression, with the text in which its labels are named."""
    for rule in alerts():
        shown = " ".join(rule["annotations"].values())
        yield rule["expr"], " ".join(re.findall(r"\$labels\.(\w+)", shown))
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield target["expr"], " ".join(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]).groups()
            yield metric, label


def test_each_expression_names_exported_metrics_and_labels(exported):
    for expression, shown in expressions():
        names = _METRIC.findall(expression)
        assert names, expression
        labels = OF_PROMETHEUS.union(*(exported[name].labels for name, _ in names))
        for name, matchers in names:
            for label, operator, value in _MATCHER.findall(matchers):
                assert label in exported[name].labels, expression
                if not value.startswith("$"):
                    for each in value.split("|") if "~" in operator else [value]:
                        assert each in exported[name].values[label], expression
        grouped = {label.strip() for group in _BY.findall(expression) for label in group.split(",")}
        assert grouped <= labels, expression
        aggregates = re.search(r"\b(sum|max|min|histogram_quantile)\b", expression)
        assert set(shown.split()) <= ((grouped | set()) if aggregates else labels), expression


def test_each_exported_metric_is_on_the_dashboard(exported):
    shown = {name for expression, _ in expressions() for name, _ in _METRIC.findall(expression)}

    families = {re.sub("_(bucket|sum|count)$", "", name) for name in exported}
    assert {re.sub("_bucket$", "", name) for name in shown} >= families


def test_brackets_are_closed_and_alerts_say_what_to_do():
    for expression, _ in expressions():
        for opening, closing in ("()", "{}", "[]"):
            assert expression.count(opening) == expression.count(closing), expression
    for rule in alerts():
        assert set(rule["annotations"]) == {"summary", "action"}
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}


def test_the_panels_have_their_own_places():
    cells = [
        (x, y)
        for panel in dashboard()["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]

    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_prometheus_scrapes_both_and_has_the_rules():
    found = yaml.safe_load((FOLDER / "prometheus.yml").read_text())

    assert [job["job_name"] for job in found["scrape_configs"]] == ["apoq-workers", "apoq-database"]
    assert found["rule_files"] == ["alerts.yml"]
