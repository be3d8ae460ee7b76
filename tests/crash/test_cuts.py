"""After a cut of the power at any operation all that is claimed of a volume holds."""

from __future__ import annotations

from tests.crash.conftest import Spread
from tests.crash.counting import seeds
from tests.crash.crash import crash, crash_behind_releases
from tests.crash.workloads import WORKLOADS

RUNS = 4


def test_cuts(spread: Spread) -> None:
    """Images are prefixes of history, what was flushed is there, and to recover twice changes nothing.

    So it is after a cut at each operation of each workload, whatever is lost of what wasn't durable, after a kill of
    the process at each operation, and after another cut while the volume is opened.
    """
    spread(crash, [(workload.name, seed) for seed in seeds(RUNS) for workload in WORKLOADS])


def test_cuts_behind_releases(spread: Spread) -> None:
    """A released segment's data is gone at once, its names when the folder is durable: in between it may come back."""
    spread(crash_behind_releases, [(name, seed) for name in ("marks", "windows") for seed in (1005, 1008, 1017, 1021)])
