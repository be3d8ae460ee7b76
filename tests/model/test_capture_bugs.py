"""Seeded bugs: the machine of ``test_capture_machine`` catches each of these."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from dmafs.core.journal import ForwardJournal
from dmafs.core.reopening import Recovery
from dmafs.core.storage import File
from dmafs.core.window import Window
from dmafs.core.work import Work
from dmafs.errors import DmafsError
from dmafs.taps import capture
from dmafs.taps.arbiter import Arbiter, Verdict
from dmafs.taps.capture import LoggedTap, Scanned
from dmafs.taps.chained import ChainedTap
from dmafs.taps.logreader import LogReader
from tests.model.capture_world import SimulatedTap, World
from tests.model.counting import SEED
from tests.model.logwrites import Device
from tests.model.test_capture_machine import CaptureMachine

EXAMPLES = 300
Bug = Callable[[], contextlib.AbstractContextManager[Any]]


def skip_arbitration() -> contextlib.AbstractContextManager[Any]:
    nothing = Verdict([], (np.empty(0, np.int64), np.empty(0, np.int64)))
    return mock.patch.object(Arbiter, "judge", return_value=nothing)


def forget_at_once() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(Arbiter, "remember")


def forget_on_restart() -> contextlib.AbstractContextManager[Any]:
    begin = ChainedTap.begin
    return mock.patch.object(ChainedTap, "begin", lambda self, position, _: begin(self, position, position))


def consume_the_last_entry() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(LogReader, "_is_whole", return_value=True)


def publish_before_check() -> contextlib.AbstractContextManager[Any]:
    def write(tap: LoggedTap, scanned: Scanned, window: Window) -> Verdict:
        with mock.patch.object(SimulatedTap, "check"):
            return original(tap, scanned, window)

    original = capture._write
    return mock.patch.object(capture, "_write", write)


def lose_the_place_on_release() -> contextlib.AbstractContextManager[Any]:
    def release(self: ForwardJournal, tail: int) -> list[Any]:
        with mock.patch.object(self, "windowed", new=False):
            return original(self, tail)

    original = ForwardJournal.release
    return mock.patch.object(ForwardJournal, "release", release)


def lose_the_place_on_recovery() -> contextlib.AbstractContextManager[Any]:
    """Take the segment with the last indicator for a leftover."""
    original = Recovery.__init__

    def begin(self: Recovery, *arguments: Any, windowed: bool) -> None:
        original(self, *arguments, windowed=windowed and False)

    return mock.patch.object(Recovery, "__init__", begin)


def release_what_no_record_lets_go() -> contextlib.AbstractContextManager[Any]:
    def take_dirty(self: ForwardJournal, *others: File) -> Work[None]:
        self._noted_retained = self.retained
        return original(self, *others)

    original = ForwardJournal.take_dirty
    return mock.patch.object(ForwardJournal, "take_dirty", take_dirty)


def trust_an_old_look() -> contextlib.AbstractContextManager[Any]:
    """Take zeros that were read long ago for the end of a log."""
    original = LogReader._header_visible

    def visible(self: LogReader) -> bool:
        self._stale = False
        return original(self)

    return mock.patch.object(LogReader, "_header_visible", visible)


def rotate_without_draining() -> contextlib.AbstractContextManager[Any]:
    """Replace a table while entries of its log are still to be written: the kernel puts newer ones before them."""
    original = Device.__init__

    def begin(self: Device, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self.drains = False

    return mock.patch.object(Device, "__init__", begin)


def skip_a_window() -> contextlib.AbstractContextManager[Any]:
    """Go on behind a window that couldn't be journaled."""
    original = World._resume

    def resume(self: World, go_on: Callable[[Any], Any]) -> bool:
        done = original(self, go_on)
        if self.work is None:
            self.tap.pending = None
        return done

    return mock.patch.object(World, "_resume", resume)


BUGS: list[Bug] = [
    skip_arbitration,
    forget_at_once,
    forget_on_restart,
    consume_the_last_entry,
    publish_before_check,
    lose_the_place_on_release,
    lose_the_place_on_recovery,
    release_what_no_record_lets_go,
    trust_an_old_look,
    rotate_without_draining,
    skip_a_window,
]


def live(examples: int) -> None:
    profile = settings(
        max_examples=examples,
        stateful_step_count=50,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    run_state_machine_as_test(hypothesis.seed(SEED)(CaptureMachine), settings=profile)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_the_machine_catches(bug: Bug) -> None:
    """With a bug seeded, a history soon fails."""
    with bug(), pytest.raises((AssertionError, DmafsError, KeyError)):
        live(EXAMPLES)


def test_without_a_bug_nothing_fails() -> None:
    """What the machine catches are the bugs."""
    live(5)
