"""What the syncs of a volume have done, for whoever measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Statistics:
    """What syncs have copied since the volume was opened, in sectors."""

    syncs: int = 0
    saved_sectors: int = 0
    applied_sectors: int = 0
