"""Claims about tests/seeded_bugs.py: its bugs can still be put in."""

from __future__ import annotations

import pytest

from tests.seeded_bugs import BUGS, ROOT, Bug


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_each_bug_has_its_place_and_its_test(bug: Bug) -> None:
    """The text that it replaces is in the module exactly once, and there is the test that catches it."""
    assert (ROOT / "dmafs" / bug.module).read_text().count(bug.old) == 1
    assert bug.new != bug.old
    file, _, name = bug.test.partition("::")
    assert f"def {name}" in (ROOT / file).read_text()


def test_there_are_enough() -> None:
    """Each has a name of its own."""
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 12
