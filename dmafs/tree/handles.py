"""Handles: what is open in the tree."""

from __future__ import annotations

from dataclasses import dataclass

from dmafs.core.clone import Clone
from dmafs.core.image import Image
from dmafs.core.statistics import Statistics


@dataclass(slots=True)
class Handle:
    """An open file: a past image (held), a clone (counted), a tap, or live; *size* bytes of it, from *start* on."""

    volume: str
    inode: int
    start: int
    size: int
    statistics: Statistics
    image: Image | None = None
    clone: Clone | None = None
    tap: bool = False
    next: int = 0  # where a sequential read goes on
    sequential: bool = False  # whether the last one did
