"""Claims about dmafs.tree.requests: who waits for requests isn't forgotten, and neither is anybody else."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pyfuse3
import pytest
import trio
import trio.testing

from dmafs.tree import requests
from dmafs.tree.requests import Readiness, UnfairLock


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def nothing() -> bool:
    return False


async def test_a_turn_is_one_tasks() -> None:
    turn, log = UnfairLock(), []

    async def take(name: str, event: trio.Event) -> None:
        async with turn:
            log.append(f"{name} in")
            await event.wait()
            log.append(f"{name} out")

    events = [trio.Event() for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for number, event in enumerate(events):
            nursery.start_soon(take, str(number), event)
            await trio.testing.wait_all_tasks_blocked()
        for event in events:
            event.set()
    assert sorted(log) == sorted(f"{number} {what}" for number in range(3) for what in ("in", "out"))
    assert all(log[at].split()[0] == log[at + 1].split()[0] for at in (0, 2, 4))


async def test_a_turn_given_up_and_taken_again_keeps_nobody_waiting_for_ever() -> None:
    turn, waited = UnfairLock(), trio.Event()

    async def wait() -> None:
        async with turn:
            waited.set()

    async with trio.open_nursery() as nursery:
        async with turn:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
        async with turn:
            pass
        with trio.fail_after(5):
            await waited.wait()


async def test_a_turn_that_a_cancelled_task_waited_for_is_free() -> None:
    turn = UnfairLock()
    async with trio.open_nursery() as nursery, turn:
        nursery.start_soon(turn.__aenter__)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    async with turn:
        pass


async def test_what_is_readable_is_not_waited_for(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    readiness = Readiness(nothing)
    os.write(pipe[1], b"x")
    await readiness.wait_readable(pipe[0])
    monkeypatch.setattr(trio.lowlevel, "wait_readable", None)
    await readiness.wait_readable(pipe[0])


async def test_what_is_not_readable_is_waited_for(pipe: tuple[int, int]) -> None:
    readiness, done = Readiness(nothing), trio.Event()

    async def wait() -> None:
        await readiness.wait_readable(pipe[0])
        done.set()

    os.write(pipe[1], b"x")
    await readiness.wait_readable(pipe[0])
    os.read(pipe[0], 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not done.is_set()
        os.write(pipe[1], b"x")


async def test_others_have_their_turn(pipe: tuple[int, int]) -> None:
    """However many requests there are."""
    readiness, done = Readiness(nothing), trio.Event()
    os.write(pipe[1], b"x")

    async def other() -> None:
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        with trio.fail_after(10):
            while not done.is_set():
                await readiness.wait_readable(pipe[0])


async def test_what_is_done_between_is_done_when_no_request_waits(pipe: tuple[int, int]) -> None:
    left = [3]

    def between() -> bool:
        if not left[0]:
            os.write(pipe[1], b"x")
            return False
        left[0] -= 1
        return True

    readiness = Readiness(between)
    os.write(pipe[1], b"x")
    await readiness.wait_readable(pipe[0])
    before = left[0]
    os.read(pipe[0], 1)
    with trio.fail_after(10):
        await readiness.wait_readable(pipe[0])
    assert before > 0
    assert left == [0]


async def test_pyfuse3_finds_all_that_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it takes from its ``trio`` is in ours too: else the mount would end at the first request."""
    monkeypatch.setattr(pyfuse3, "trio", trio, raising=False)
    requests.install(nothing)
    ours = pyfuse3.trio  # type: ignore[attr-defined]
    for name in ("Lock", "ClosedResourceError", "open_nursery", "lowlevel"):
        assert hasattr(ours, name)
    for name in ("wait_readable", "notify_closing", "current_trio_token", "current_task"):
        assert hasattr(ours.lowlevel, name)
