"""How much of everything was tried, by all processes together; and how much there has to be."""

from __future__ import annotations

import os
from collections import Counter
from typing import Final

SEED: Final = int(os.environ.get("DMAFS_TEST_SEED", "1"))
PERCENT: Final = int(os.environ.get("DMAFS_TEST_CRASHES", "100"))
"""How many runs there are of each workload, in percent of what there are otherwise."""
LEAST: Final = {"cuts": 100_000, "kills": 10_000, "faults": 3_500, "flips": 9_000, "misdirected": 800}
"""What there has to be at the least, at 100 percent."""

tried: Final[Counter[str]] = Counter()


def seeds(runs: int) -> range:
    """Return the seeds of so many runs, at 100 percent; one at the least."""
    return range(SEED * 1000, SEED * 1000 + max(1, runs * PERCENT // 100))
