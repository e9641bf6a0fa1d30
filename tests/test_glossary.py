"""docs/glossary.md can be looked things up in."""

from __future__ import annotations

import re

import pages

from apoq.core.states import STATES

TEXT = (pages.DOCS / "glossary.md").read_text(encoding="utf-8")


def test_its_terms_are_in_alphabetical_order():
    terms = re.findall(r"^\*\*(.+)\*\* \N{EN DASH}", TEXT, re.MULTILINE)

    assert len(terms) > 50
    assert terms == sorted(terms, key=str.lower)


def test_it_has_all_states():
    assert tuple(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)) == STATES


def test_what_it_refers_to_is_there():
    for term in re.findall(r"see \*(.+)\*", TEXT):
        assert re.search(rf"^\*\*{re.escape(term)}\*\* \N{{EN DASH}}", TEXT, re.MULTILINE | re.IGNORECASE), (
            term
        )
