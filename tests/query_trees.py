"""Statements as the server understands them: its own parse trees, with all functions that are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import sqlalchemy as sa

COMMANDS = {"UPDATE": "2", "INSERT": "3", "DELETE": "4", "MERGE": "5"}
"""The `commandType` of queries that write."""

TEXT, HEADER_BYTES = "25", 4
"""The number of the type in pg_type, and what comes before the characters in a stored text."""

NOTHING = "<>"
"""A field without a value."""


@dataclass
class Node:
    """A node of a parse tree; its fields are nodes, lists, and texts."""

    kind: str
    fields: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.fields[name]


class Trees:
    """Returns the trees of statements, and how volatile the functions in them are."""

    def __init__(self, connection: sa.Connection) -> None:
        self._driver: psycopg.Connection[Any] = connection.connection.driver_connection
        self._driver.autocommit = True
        rows = self._driver.execute("SELECT oid::text, provolatile::text FROM pg_proc")
        self._functions = dict(rows.fetchall())
        rows = self._driver.execute(
            "SELECT oid::text, typinput::oid::text, typoutput::oid::text FROM pg_type"
        )
        self._types = {oid: (reads, writes) for oid, reads, writes in rows}

    def of(self, statement: str) -> list[Node]:
        """Parse one statement, with `$1` and so on as parameters, without executing it."""
        with self._driver.transaction(force_rollback=True):
            self._driver.execute(b"PREPARE parsed AS " + statement.encode())
            found = self._driver.execute(
                "SELECT array_to_string(parameter_types, ',') FROM pg_prepared_statements"
            )
            (types,) = found.fetchone() or ("",)
            self._driver.execute("DEALLOCATE parsed")
            # The body of such a function is stored as its tree, which is the one that Citus' planner gets.
            body = f"CREATE FUNCTION parsed({types}) RETURNS void BEGIN ATOMIC {statement}; END"
            self._driver.execute(body.encode())
            found = self._driver.execute("SELECT prosqlbody::text FROM pg_proc WHERE proname = 'parsed'")
            (text,) = found.fetchone() or ("",)
        return parse(text)

    def volatility(self, node: Node) -> str:
        """Return how volatile the functions are that a node itself calls: "i", "s", or "v"."""
        if node.kind == "NEXTVALUEEXPR":
            return "v"
        if node.kind == "SQLVALUEFUNCTION":
            return "s"
        return max((self._functions[oid] for oid in self._called(node)), default="i")

    def _called(self, node: Node) -> Iterator[str]:
        if node.kind == "COERCEVIAIO":
            yield self._types[node.resulttype][0]
            if its_type := _type(node.arg):
                yield self._types[its_type][1]
        for name in ("funcid", "opfuncid", "aggfnoid", "winfnoid"):
            if node.fields.get(name, "0") != "0":
                yield node.fields[name]


def _type(node: Any) -> str | None:
    names = ("vartype", "paramtype", "consttype", "funcresulttype", "opresulttype", "resulttype")
    return next((node.fields[name] for name in names if name in node.fields), None)


def parse(text: str) -> list[Node]:
    """Read PostgreSQL's text of a tree (`pg_node_tree`)."""
    tokens = iter(re.findall(r'"(?:\\.|[^"\\])*"|[(){}]|(?:\\.|[^\s(){}\\])+', text))
    return _items(tokens, ")")[0]


def _items(tokens: Iterator[str], end: str) -> list[Any]:
    found: list[Any] = []
    for token in tokens:
        match token:
            case "(":
                found.append(_items(tokens, ")"))
            case "{":
                kind, *rest = _items(tokens, "}")
                found.append(Node(kind, _fields(rest)))
            case _ if token == end:
                return found
            case _:
                found.append(token)
    return found


def _fields(items: list[Any]) -> dict[str, Any]:
    fields: dict[str, list[Any]] = {}
    for item in items:
        if isinstance(item, str) and item.startswith(":"):
            fields[item[1:]] = values = []
        else:
            values.append(item)
    return {name: values[0] if len(values) == 1 else values for name, values in fields.items()}


def walk(tree: Any, *, but_not_in: Callable[[Node], bool] = lambda _node: False) -> Iterator[Node]:
    """Yield the nodes of a tree, but not those within some."""
    match tree:
        case Node():
            yield tree
            if not but_not_in(tree):
                yield from walk(list(tree.fields.values()), but_not_in=but_not_in)
        case list():
            for item in tree:
                yield from walk(item, but_not_in=but_not_in)


def is_query(node: Node) -> bool:
    return node.kind == "QUERY"


def is_write(node: Node, *commands: str) -> bool:
    """Return whether a node is a query that writes, by one of these commands if they are given."""
    return is_query(node) and node.commandType in [COMMANDS[each] for each in commands or COMMANDS]


def is_subquery(node: Node) -> bool:
    """Return whether a node is a query in an expression, such as a scalar subquery."""
    return node.kind == "SUBLINK"


def is_constant(node: Node) -> bool:
    """Return whether a node is a scalar subquery that reads nothing, such as `(SELECT now())`."""
    return is_subquery(node) and node.subLinkType == "4" and node.subselect.rtable == NOTHING


def is_recursive(node: Node) -> bool:
    return node.kind == "COMMONTABLEEXPR" and node.cterecursive == "true"


def locks(node: Node) -> bool:
    """Return whether a node is a query with FOR UPDATE or the like."""
    return is_query(node) and node.rowMarks != NOTHING


def text_of(node: Node) -> str | None:
    """Return the text of a constant; None if a node is something else."""
    if node.kind != "CONST" or node.consttype != TEXT or node.constvalue == NOTHING:
        return None
    _length, _open, *stored, _close = node.constvalue
    return bytes(int(byte) % 256 for byte in stored[HEADER_BYTES:]).decode()


def has_ctid(node: Node) -> bool:
    return node.kind == "VAR" and node.varattno == "-1"


def is_column(node: Node) -> bool:
    return node.kind == "VAR"
