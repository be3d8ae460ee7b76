"""Fixtures of the mount tests, and the daemon's log beside what failed."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.mount.harness import Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A scratch folder for one test; see harness.py."""
    with Rig() as made:
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the daemon's log with a failure."""
    report = yield
    if call.when == "call" and report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Rig):
                report.sections.append(("daemon's log", value.log()))
    return report
