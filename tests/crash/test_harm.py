"""Whatever fails or is damaged, nothing wrong is shown, then or later."""

from __future__ import annotations

from tests.crash.conftest import Spread
from tests.crash.counting import seeds
from tests.crash.harm import faults, flips, misdirections
from tests.crash.workloads import WORKLOADS

RUNS = 1

EVERY = [(workload.name, seed) for seed in seeds(RUNS) for workload in WORKLOADS]


def test_faults(spread: Spread) -> None:
    """When an operation fails, or several do, the volume goes on right or takes no writes any more.

    So it is with "no space" and with I/O errors, at each operation; what is found when it is opened again, after a kill
    or after a cut, is a prefix of history with all in it that was flushed.
    """
    spread(faults, EVERY)


def test_flips(spread: Spread) -> None:
    """A flipped bit, anywhere in any file, is an error or changes nothing: no image shows wrong bytes."""
    spread(flips, EVERY)


def test_misdirected_writes(spread: Spread) -> None:
    """A write that lands at another place, in whatever file, is an error or changes nothing once it is read back."""
    spread(misdirections, EVERY)
