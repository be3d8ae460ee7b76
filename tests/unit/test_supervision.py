"""What a service manager is told, checked by one that knows the protocol: sd_notify(3)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import trio

from dmafs.service.supervision import Manager, look_up, supervise
from dmafs.units import format_span
from tests.notified import FakeManager


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeManager]:
    """A manager's socket, in the file system or an abstract one."""
    made = FakeManager(str(tmp_path / "notify") if request.param == "path" else f"@dmafs-test-{os.getpid()}")
    yield made
    made.close()


def test_what_the_environment_says_is_taken_out_of_it() -> None:
    """So hooks can't speak for the daemon."""
    environment = {"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "120000000", "WATCHDOG_PID": "7", "HOME": "/"}
    assert Manager.of(environment, 7) == Manager("/run/n", 120)
    assert environment == {"HOME": "/"}
    assert Manager.of(environment, 7) is None


@pytest.mark.parametrize(
    ("environment", "watchdog_s"),
    [
        ({}, 0),
        ({"WATCHDOG_USEC": "5000000"}, 5),
        ({"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "8"}, 0),
        ({"WATCHDOG_USEC": "-1"}, 0),
        ({"WATCHDOG_USEC": "²"}, 0),
    ],
)
def test_a_watchdog_is_meant_for_one_process(environment: dict[str, str], watchdog_s: float) -> None:
    """One for another process, or none that is a number, is none."""
    assert Manager.of({"NOTIFY_SOCKET": "@n", **environment}, 7) == Manager("@n", watchdog_s)


@pytest.mark.parametrize("address", ["", "n", "vsock:2:1"])
def test_other_sockets_are_not_spoken_to(address: str) -> None:
    """Only names in the file system and abstract ones are."""
    assert Manager.of({"NOTIFY_SOCKET": address}, 7) is None


async def test_ready_comes_first_and_with_an_answer(systemd: FakeManager, autojump_clock: trio.abc.Clock) -> None:
    """Then a watchdog is fed at least twice in its time, each time with how things are."""
    del autojump_clock
    looks = iter([OSError("no answer"), None, None, None, OSError("no answer"), None])
    done = trio.Event()
    told: list[float] = []

    def look() -> None:
        outcome = next(looks, done)
        if outcome is done:
            trio.from_thread.run_sync(done.set)
        elif isinstance(outcome, OSError):
            raise outcome
        else:
            trio.from_thread.run_sync(lambda: told.append(trio.current_time()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervise, Manager(systemd.address, 6), look, lambda: "well")
        await done.wait()
        nursery.cancel_scope.cancel()
    assert systemd.take() == ["READY=1", "WATCHDOG=1", "STATUS=well"]
    for _ in told[1:]:
        assert systemd.take() == ["WATCHDOG=1", "STATUS=well"]
    assert max(after - before for before, after in pairwise(told)) <= 4
    assert len(told) == 4


async def test_a_look_up_that_hangs_feeds_nothing(systemd: FakeManager, autojump_clock: trio.abc.Clock) -> None:
    """And it keeps nobody from ending."""
    del autojump_clock
    with trio.move_on_after(100) as waited:
        reading, writing = os.pipe()
        try:
            await supervise(Manager(systemd.address, 6), lambda: _wait_for(reading), lambda: "well")
        finally:
            os.close(writing)
    assert waited.cancelled_caught
    assert systemd.take_all() == []


def _wait_for(pipe: int) -> None:
    os.read(pipe, 1)
    os.close(pipe)


def test_a_manager_that_is_gone_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The daemon goes on; the log says what wasn't told."""
    Manager(str(tmp_path / "nobody")).tell("READY=1", "STATUS=well")
    assert "can't be told READY=1" in caplog.text


def test_a_look_up_asks_the_tree(tmp_path: Path) -> None:
    """No history yet is an answer; a tree that is gone is none."""
    (tmp_path / "at").mkdir()
    look_up(tmp_path)
    (tmp_path / "at").rmdir()
    (tmp_path / "at").touch()
    with pytest.raises(NotADirectoryError):
        look_up(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.9, "0s"), (59, "59s"), (60, "1min"), (125, "2min5s"), (7200, "2h"), (90061, "1d1h"), (86405, "1d")],
)
def test_spans_have_two_units(seconds: float, text: str) -> None:
    """Rounded down."""
    assert format_span(seconds) == text
