"""The graph around a task, as a tree."""

from __future__ import annotations

import sqlalchemy as sa
from rich.text import Text
from rich.tree import Tree

from apoq.cli.list import STYLES, shown_state
from apoq.monitor.formatting import clean, number
from apoq.monitor.graphs import MAX_COUNTED, Graph, Node


def drawn(row: sa.RowMapping, graph: Graph) -> Tree:
    """Return a tree of the task's parents, the task, and the tasks that wait for it."""
    title = Text("graph", "bold")
    tree = Tree(title, guide_style="dim")
    for parent in graph.parents:
        tree.add(Text("after ", "dim") + _line(parent))
    if graph.more_parents:
        tree.add(Text(f"after … and {number(graph.more_parents, MAX_COUNTED)} more", "dim"))
    own = tree.add(
        Text(f"{row['id']} ", "bold")
        + _described(row["type"], shown_state(row))
        + Text("  (this task)", "dim")
    )
    for child in graph.children:
        _add(own, child)
    if graph.more_children:
        own.add(Text(f"… and {number(graph.more_children, MAX_COUNTED)} more", "dim"))
    return tree


def _add(tree: Tree, node: Node) -> None:
    branch = tree.add(_line(node))
    for child in node.children:
        _add(branch, child)
    if node.has_more:
        branch.add(Text("… and more: apoq show", "dim") + Text(f" {node.id}", "dim"))


def _line(node: Node) -> Text:
    line = Text(f"{node.id} ") + _described(node.type or "?", node.state)
    if node.message:
        line += Text(f"  {clean(node.message)}", "dim")
    if node.is_repeated:
        line += Text("  (see above)", "dim")
    return line


def _described(type_: str, state: str) -> Text:
    return Text(clean(type_)) + Text(f" {state}", STYLES.get(state, "dim"))
