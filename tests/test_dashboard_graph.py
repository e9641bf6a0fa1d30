"""The graph on the page of a task: the drawing, and the list that says the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree as ET

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from test_graphs import run_failing_graph
from viewers import Viewer, text_of

from apoq import Queue
from apoq.dashboard.dashboard import Dashboard
from apoq.dashboard.site import Site
from apoq.monitor.graphs import MAX_CHILDREN, MAX_NODES, graph_of

QUEUE = Queue()


@pytest.fixture
def reader(engine) -> Iterator[Viewer]:
    site = Site(engine, schema=None, redact=None, environment=None, secret=None)
    yield Viewer(Dashboard(site))
    site.close()


@pytest.fixture
def graph(engine, worker) -> list[int]:
    return run_failing_graph(engine, worker, QUEUE)


def drawing(page: str) -> ET.Element:
    found = re.search(r"<svg class=\"graph\".*?</svg>", page, re.DOTALL)
    assert found is not None
    return ET.fromstring(found[0])


def lines(page: str) -> list[str]:
    """Return the texts of the drawing, from top to bottom."""
    texts = sorted(drawing(page).iter("text"), key=lambda each: float(each.attrib["y"]))
    return ["".join(each.itertext()) for each in texts]


def nested(page: str) -> list[str]:
    """Return the entries of the list, each with its level."""
    found, level = [], 0
    tags = r"<(/?ul|/?li)>(.*?)(?=</?ul>|</?li>|$)"
    for tag, text in re.findall(tags, page.partition("As a list")[2], re.DOTALL):
        level += {"ul": 1, "/ul": -1}.get(tag, 0)
        if tag == "li":
            found.append(f"{level} {text_of(text)}")
    return found


def test_the_drawing_has_the_parents_the_task_and_those_that_wait_for_it(reader, graph):
    bad, held, left, right = graph

    page = reader.get(f"/tasks/{held}")

    assert lines(page) == [
        f"failed {bad} fail parent {bad} (fail) failed",
        f"waiting {held} t",
        f"waiting {left} t",
        f"waiting {right} t shown elsewhere",
        f"waiting {right} t",
    ]
    links = [each.attrib["href"] for each in drawing(page).iter("a")]
    assert links == [f"../tasks/{each}" for each in (bad, left, right, right)]


def test_the_list_says_the_same(reader, graph):
    bad, held, left, right = graph

    page = reader.get(f"/tasks/{held}")

    assert nested(page) == [
        f"1 {bad} fail failed parent {bad} (fail) failed",
        f"1 {left} t waiting",
        f"2 {right} t waiting shown elsewhere",
        f"1 {right} t waiting",
    ]


def test_a_task_without_parents_and_children_has_no_graph(engine, reader):
    with Session(engine) as session, session.begin():
        id_ = QUEUE.add(session, "t").id

    assert 'class="graph"' not in reader.get(f"/tasks/{id_}")


def test_a_deleted_task_is_named_without_a_link(engine, reader, graph):
    bad, held, *_ = graph
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM apoq_tasks WHERE id = :id"), {"id": bad})

    page = reader.get(f"/tasks/{held}")

    assert lines(page)[0].startswith(f"deleted {bad} ")
    assert f'href="../tasks/{bad}"' not in page


def test_the_number_of_the_others_is_said_for_a_large_group(engine, reader):
    with Session(engine) as session, session.begin():
        with QUEUE.group(session) as group:
            group.add_many("t", [{}] * 300)
            group.then("report")
        closing = session.execute(sa.text("SELECT id FROM apoq_tasks WHERE type = 'report'")).scalar_one()
        member = session.execute(sa.text("SELECT min(id) FROM apoq_tasks WHERE type = 't'")).scalar_one()

    page = reader.get(f"/tasks/{closing}")

    assert lines(page)[MAX_CHILDREN] == "280 more"
    assert "Waits for 300 other tasks" in text_of(page)
    assert f"of task {closing}" in text_of(reader.get(f"/tasks/{member}"))


def test_a_large_graph_is_drawn_up_to_a_bound(engine, reader):
    with Session(engine) as session, session.begin():
        root = QUEUE.add(session, "t")
        for _ in range(25):
            child = QUEUE.add(session, "t", after=[root])
            QUEUE.add_many(session, "t", [{}] * 25, after=[child])
        root_id = root.id

    page = reader.get(f"/tasks/{root_id}")
    with engine.connect() as connection:
        graph = graph_of(connection, None, root_id)

    texts = lines(page)
    assert texts[-1] == "5 more"
    assert sum("waiting" in each for each in texts) == MAX_NODES
    assert texts.count("more") == len(graph.children) == MAX_CHILDREN


def test_a_chain_is_drawn_up_to_a_depth(engine, reader):
    with Session(engine) as session, session.begin():
        tasks = [QUEUE.add(session, "t")]
        for _ in range(12):
            tasks.append(QUEUE.add(session, "t", after=[tasks[-1]]))
        ids = [task.id for task in tasks]

    page = reader.get(f"/tasks/{ids[0]}")

    assert lines(page)[-2:] == [f"waiting {ids[6]} t", "more"]
    assert [each.attrib["href"] for each in drawing(page).iter("a")][-1] == f"../tasks/{ids[6]}"
