"""Records of several extents at once, before they are written: pure. Where they go is the business of ``segment``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dmafs.core.ondisk import LOST, RECORD_DTYPE, Flag, Records, checksum
from dmafs.core.storage import Buffer
from dmafs.units import SECTOR


class Lost(bytes):
    """Stands for data that was found damaged: zeros of its length, which are written with a checksum nothing has."""


Extent = tuple[int, int, Buffer | None]
"""Start, length in sectors, and data, or None for zeros."""


def described(extents: Sequence[Extent], seq: int, physical: int) -> Records:
    """Return records of extents, the first with that seq and physical sector."""
    records = np.zeros(len(extents), RECORD_DTYPE)
    with_data = np.array([data is not None for _, _, data in extents], bool)
    records["seq"] = np.arange(seq, seq + len(extents))
    records["start"] = [start for start, _, _ in extents]
    records["length"] = [length for _, length, _ in extents]
    records["flags"] = np.where(with_data, int(Flag.DATA), int(Flag.ZERO))
    sectors = np.where(with_data, records["length"], 0).astype(np.uint64)
    records["physical"] = np.uint64(physical) + np.cumsum(sectors) - sectors
    records["data_checksum"][with_data] = [
        LOST if isinstance(data, Lost) else checksum(data) for _, _, data in extents if data is not None
    ]
    return records


def end_of(records: Records, before: int) -> int:
    """Return the sector behind the data of *records*; *before* if there are none."""
    if not len(records):
        return before
    with_data = np.isin(records["flags"], (int(Flag.DATA), int(Flag.MARK)))
    return int((records["physical"] + np.where(with_data, records["length"], 0)).max())


def name_sector(name: str) -> bytes:
    """Return the sector of data that a mark's name is kept in."""
    text = name.encode().ljust(SECTOR, b"\0")
    assert len(text) == SECTOR
    return text


def name_of(sector: bytes | bytearray) -> str:
    """Return the name that is kept in a sector."""
    return sector.rstrip(b"\0").decode()
