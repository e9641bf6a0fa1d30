"""The drawing of the graph around a task: the place of each task, and the lines between them.

Each task has a line of its own, so that the drawing is readable on a narrow screen: first the parents, then
the task, then those that wait for it, further to the right with each level.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from apoq.dashboard.views import Task
from apoq.monitor.formatting import clean, number
from apoq.monitor.graphs import DELETED, MAX_COUNTED, Graph, Node

LINE: Final = 26
"""Pixels from one task to the next."""

STEP: Final = 22
"""Pixels from one level to the next."""

RADIUS: Final = 5
MARGIN: Final = 10

NOTE: Final = 120
"""Characters of an error that are shown."""


class Spot(NamedTuple):
    """A task of a drawing, or the note that there are more."""

    x: int
    y: int
    link: int | None
    """The task to whose page it leads."""
    label: str
    state: str = ""
    """Empty for a note."""
    note: str = ""
    is_own: bool = False
    """Whether the page is that of this task."""

    @property
    def text_x(self) -> int:
        """Where its text begins."""
        return self.x + 2 * RADIUS + 2


@dataclass
class Drawing:
    """A drawing, from top to bottom."""

    spots: list[Spot] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    """The paths of the lines."""
    arrows: list[str] = field(default_factory=list)
    """The paths of their heads."""

    @property
    def height(self) -> int:
        """Its height in pixels."""
        return LINE * len(self.spots)

    def add(self, level: int, label: str, link: int | None = None, **values: str | bool) -> Spot:
        """Add a task below the others."""
        y = LINE * len(self.spots) + LINE // 2
        spot = Spot(MARGIN + level * STEP, y, link, clean(label), **values)  # type: ignore[arg-type]
        self.spots.append(spot)
        return spot


def drawing(task: Task, graph: Graph) -> Drawing:
    """Draw the parents of a task, the task, and some levels of the tasks that wait for it."""
    drawn = Drawing()
    parents = [_add(drawn, 1, parent) for parent in graph.parents]
    if graph.more_parents:
        parents.append(drawn.add(1, more(graph.more_parents)))
    own = drawn.add(0, f"{task.id} {task.type}", state=task.shown_state, is_own=True)
    for spot in parents:
        drawn.lines.append(f"M{spot.x - RADIUS} {spot.y}H{own.x}")
    if parents:
        drawn.lines.append(f"M{own.x} {parents[0].y}V{own.y - RADIUS - 6}")
        drawn.arrows.append(f"M{own.x - 4} {own.y - RADIUS - 7}h8l-4 6z")
    children = _add_all(drawn, 1, graph.children)
    if graph.more_children:
        children.append(drawn.add(1, more(graph.more_children)))
    _connect(drawn, own, children)
    return drawn


def more(count: int) -> str:
    """Write how many tasks aren't shown."""
    return f"{number(count, MAX_COUNTED)} more"


def note_of(node: Node) -> str:
    """Return what is said of a task of a graph."""
    said = "shown elsewhere" if node.is_repeated else node.message or ""
    return clean(said if len(said) <= NOTE else f"{said[:NOTE]}…")


def _add(drawn: Drawing, level: int, node: Node) -> Spot:
    link = None if node.state == DELETED else node.id
    return drawn.add(level, f"{node.id} {node.type or ''}", link, state=node.state, note=note_of(node))


def _add_all(drawn: Drawing, level: int, nodes: list[Node]) -> list[Spot]:
    """Add tasks, each with those that wait for it."""
    spots = []
    for node in nodes:
        spots.append(spot := _add(drawn, level, node))
        below = _add_all(drawn, level + 1, node.children)
        if node.has_more:
            below.append(drawn.add(level + 1, "more", node.id))
        _connect(drawn, spot, below)
    return spots


def _connect(drawn: Drawing, above: Spot, below: list[Spot]) -> None:
    """Draw the lines from a task to those that wait for it."""
    if below:
        drawn.lines.append(f"M{above.x} {above.y + RADIUS}V{below[-1].y}")
    for spot in below:
        end = spot.x - RADIUS - 6
        drawn.lines.append(f"M{above.x} {spot.y}H{end}")
        drawn.arrows.append(f"M{end - 1} {spot.y - 4}v8l6-4z")
