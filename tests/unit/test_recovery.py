"""Claims about dmafs.core.recovery: its tables are exhaustive, no two rows fit one state, and the code follows them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from dmafs.core import recovery
from dmafs.core.recovery import FoundSegment

YES_NO = {"yes": True, "no": False}
SETS = {"bad": {"blank", "damaged"}, "lost": {"some", "all"}}
"""What a word in a cell stands for, if that isn't itself."""

DOMAINS: dict[str, dict[str, list[str]]] = {
    "file_case": {"ours": [*YES_NO], "ext": [*YES_NO]},
    "segment_case": {
        "needed": [*YES_NO],
        "header": ["blank", "damaged", "good"],
        "follows": [*YES_NO],
        "later": [*YES_NO],
        "sealed": [*YES_NO],
        "whole": [*YES_NO],
        "durable": ["none", "some", "all"],
    },
    "end_case": {
        "ends": ["before", "behind", "there"],
        "last": ["none", "open", "sealed", "damaged"],
        "windowed": [*YES_NO],
    },
    "tail_case": {"torn": [*YES_NO], "windowed": [*YES_NO], "unclosed": [*YES_NO]},
    "snapshot_case": {"suffix": [*recovery.SUFFIXES, "foreign"], "beside": [*YES_NO]},
    "entries_case": {"readable": ["fewer", "all"]},
    "pointers_case": {"slots": ["none", "some"], "snapshot": ["missing", "whole"], "target": [*YES_NO]},
    "stop_case": {"clean": [*YES_NO], "kernel": ["same", "other"], "gap": [*YES_NO], "copied": [*YES_NO]},
    "index_case": {"beside": [*YES_NO]},
}
"""By the function that decides: all values of all conditions."""


class Row(NamedTuple):
    """One row of a table: what its conditions allow, and what is done."""

    label: str
    cells: dict[str, str]
    done: str

    def fits(self, state: dict[str, str]) -> bool:
        return all(cell == "-" or state[name] in SETS.get(cell, {cell}) for name, cell in self.cells.items())


def tables() -> dict[str, list[Row]]:
    """Return the rows of each table in the module's docstring."""
    found: dict[str, list[Row]] = {}
    text = recovery.__doc__ or ""
    deciders = re.findall(r"``(\w+_case)``", text)
    blocks = re.findall(r"::\n\n((?:    .*\n)+)", text)
    for name, block in zip(deciders, blocks, strict=True):
        head, *lines = block.splitlines()
        begins = [match.start() for match in re.finditer(r"(?<=\s)\S+(?: is done)?", head)]
        ends = [*begins[1:], None]
        titles = [head[begin:end].strip() for begin, end in zip(begins, ends, strict=True)]
        assert (titles[0], titles[-1]) == ("row", "what is done")
        rows = [[line[begin:end].strip() for begin, end in zip(begins, ends, strict=True)] for line in lines]
        found[name] = [Row(row[0], dict(zip(titles[1:-1], row[1:-1], strict=True)), row[-1]) for row in rows]
    return found


def states(name: str) -> Iterator[dict[str, str]]:
    """Yield every combination of the conditions of a table."""
    domain = DOMAINS[name]
    for values in itertools.product(*domain.values()):
        yield dict(zip(domain, values, strict=True))


def decided(name: str, state: dict[str, str]) -> str:
    """Return the row that the code takes."""
    arguments: dict[str, Any] = {key: YES_NO.get(value, value) for key, value in state.items()}
    if name == "segment_case":
        return recovery.segment_case(FoundSegment(**arguments))
    decide: Callable[..., str] = getattr(recovery, name)
    return decide(**arguments)


def labels() -> list[str]:
    return [row.label for rows in tables().values() for row in rows]


def test_labels_are_numbered() -> None:
    """Every row has a label of its own, R1, R2 and so on."""
    assert labels() == [f"R{number}" for number in range(1, len(labels()) + 1)]


@pytest.mark.parametrize("name", DOMAINS)
def test_exactly_one_row_fits_each_state(name: str) -> None:
    """Whatever is found, one row counts and no other, and it is the one that the code takes."""
    rows = tables()[name]
    assert all(list(row.cells) == list(DOMAINS[name]) for row in rows)
    for state in states(name):
        assert [row.label for row in rows if row.fits(state)] == [decided(name, state)], state


@pytest.mark.parametrize("name", DOMAINS)
def test_each_row_fits_some_state(name: str) -> None:
    """No row is there for nothing, and no cell has a word that means nothing."""
    taken = {decided(name, state) for state in states(name)}
    assert taken == {row.label for row in tables()[name]}
    for row in tables()[name]:
        for condition, cell in row.cells.items():
            assert cell == "-" or SETS.get(cell, {cell}) <= set(DOMAINS[name][condition])


def test_refused_rows_are_those_that_say_so() -> None:
    """The rows that the code raises for are those whose text begins with it."""
    said = {row.label for rows in tables().values() for row in rows if row.done.startswith("refused")}
    assert said == recovery.REFUSED


def test_every_table_is_looked_at() -> None:
    """The tables are those of the conditions above."""
    assert list(tables()) == list(DOMAINS)
