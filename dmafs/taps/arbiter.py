"""FUA arbitration: where the order of a log isn't that of the disk.

The log-writes target logs a FUA write when it completes, a plain write only when a later flush does. So in the log a
FUA write may overtake plain writes that were complete before it, and replaying the log can bring old data back. From
the log alone that can't be told from a plain write that really came later. The primary can tell: what is on it there
is the newer of the two. So of each window, where a plain write is the last one in the log and a FUA write of the same
sectors stands before it, the two are compared with the primary, sector by sector:

======================  ==============================================================================
the primary has         then
======================  ==============================================================================
the plain write's data  the log is right
the FUA write's data    it goes behind the window once more: a *correction*
something else          a newer write has been there, or the disk is wrong: a *doubt*. The log is kept to, and the
                        sectors are compared again when everything that is on the primary has been captured
======================  ==============================================================================

If somebody wrote the FUA write's bytes, then the plain write's, then the FUA write's once more, the first look may
already see the last: then the window shows what a later one really has. That can't be told.

A FUA write has to be remembered until a flush that began after it completed has been read: only that one is sure to
have brought all plain writes from before it into the log.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dmafs.core.batch import Extent
from dmafs.core.extent import Ints, chop, net_change, united
from dmafs.core.storage import File
from dmafs.taps.logformat import LogFlag
from dmafs.taps.logreader import LoggedWindow
from dmafs.units import SECTOR

_FUA: Final = int(LogFlag.FUA)
_DOUBTED, _CONFIRMED = 1, 2
_DISCARD: Final = int(LogFlag.DISCARD)


class Verdict(NamedTuple):
    """What becomes of a window: events to be put behind it, and the sectors in doubt as a disjoint list."""

    corrections: list[Extent]
    doubts: tuple[Ints, Ints]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one window in log order, and where in which file their data is."""

    file: File
    begin: int
    """Place in the log of the window that they are from."""
    starts: Ints
    stops: Ints
    flags: Ints
    offsets: Ints

    def fua(self) -> _Rows:
        """Return the FUA writes among them."""
        mine = (self.flags & _FUA) > 0
        return _Rows(self.file, self.begin, self.starts[mine], self.stops[mine], self.flags[mine], self.offsets[mine])


class Arbiter:
    """The FUA writes that may have overtaken plain ones which are still to come."""

    def __init__(self, primary: File) -> None:
        """Remember nothing yet; *primary* decides."""
        self._primary = primary
        self._remembered: list[_Rows] = []

    @property
    def retained(self) -> int | None:
        """Return from where on the log is needed for what is remembered; None if nothing is."""
        return self._remembered[0].begin if self._remembered else None

    def remember(self, file: File, window: LoggedWindow, begin: int) -> None:
        """Remember the FUA writes of a window that begins at place *begin*; once, however often it is tried."""
        rows = _rows(file, window, begin).fua()
        known = self._remembered[-1].begin if self._remembered else -1
        if len(rows.starts) and begin > known:
            self._remembered.append(rows)

    def forget(self, before: int) -> None:
        """Forget those of the windows that begin before a place."""
        self._remembered = [rows for rows in self._remembered if rows.begin >= before]

    def judge(self, file: File, window: LoggedWindow, begin: int) -> Verdict:
        """Compare a window with the primary where that is needed. Reads; may run in a thread."""
        rows = _rows(file, window, begin)
        before = [*self._remembered, rows.fua()]
        count = sum(len(each.starts) for each in before)
        if not count or not _overlap(before, rows):
            return Verdict([], (np.empty(0, np.int64),) * 2)
        corrections: list[Extent] = []
        doubts: list[tuple[int, int]] = []
        for start, stop, plain, fua in self._disputed([*self._remembered, rows]):
            for part, end, extent in self._compare(start, stop, plain, fua):
                if extent is None:
                    doubts.append((part, end))
                else:
                    corrections.append(extent)
        starts, stops = (np.array([doubt[side] for doubt in doubts], np.int64) for side in (0, 1))
        return Verdict(corrections, united(starts, stops))

    def _disputed(self, parts: list[_Rows]) -> Iterator[tuple[int, int, _Source, _Source]]:
        """Yield the extents that a plain write wins over an earlier FUA write: start, stop, the two writes."""
        starts, stops, flags = (
            np.concatenate([getattr(rows, name) for rows in parts]) for name in ("starts", "stops", "flags")
        )
        bounds = np.cumsum([0, *(len(rows.starts) for rows in parts)])

        def source(number: int) -> _Source:
            part = int(np.searchsorted(bounds, number, "right")) - 1
            return _Source(parts[part], number - int(bounds[part]))

        fua = np.flatnonzero(flags & _FUA)
        last = net_change(starts, stops)
        plain = (flags[last.winner] & _FUA) == 0
        overtaking = net_change(starts[fua], stops[fua])
        for begin, end, winner in zip(
            last.starts[plain].tolist(), last.stops[plain].tolist(), last.winner[plain].tolist(), strict=True
        ):
            first = int(np.searchsorted(overtaking.stops, begin, "right"))
            behind = int(np.searchsorted(overtaking.starts, end, "left"))
            for number in range(first, behind):
                yield (
                    max(begin, int(overtaking.starts[number])),
                    min(end, int(overtaking.stops[number])),
                    source(winner),
                    source(int(fua[overtaking.winner[number]])),
                )

    def _compare(self, start: int, stop: int, plain: _Source, fua: _Source) -> Iterator[tuple[int, int, Extent | None]]:
        """Yield the runs of sectors where the log is wrong, with the event that corrects it, or None if in doubt."""
        for begin, end in zip(*(column.tolist() for column in chop(*_one(start, stop))), strict=True):
            there = bytearray((end - begin) * SECTOR)
            self._primary.read_into(there, begin * SECTOR)
            mine = plain.read(begin, end)
            if there == mine:
                continue
            theirs = fua.read(begin, end)
            differs, confirmed = _unequal(there, mine), ~_unequal(there, theirs)
            for first, last, right in _runs(differs, confirmed):
                data = memoryview(theirs)[first * SECTOR : last * SECTOR]
                extent = (begin + first, last - first, data) if right else None
                yield begin + first, begin + last, extent


class _Source(NamedTuple):
    """One row."""

    rows: _Rows
    number: int

    def read(self, start: int, stop: int) -> bytearray:
        """Return its data of a range of sectors within it."""
        data = bytearray((stop - start) * SECTOR)
        if not self.rows.flags[self.number] & _DISCARD:
            skip = start - int(self.rows.starts[self.number])
            self.rows.file.read_into(data, int(self.rows.offsets[self.number]) + skip * SECTOR)
        return data


def _rows(file: File, window: LoggedWindow, begin: int) -> _Rows:
    return _Rows(file, begin, window.starts, window.starts + window.lengths, window.flags, window.offsets)


def _one(start: int, stop: int) -> tuple[Ints, Ints]:
    return np.array([start], np.int64), np.array([stop], np.int64)


def _overlap(fua: list[_Rows], rows: _Rows) -> bool:
    """Say whether a plain row overlaps a FUA write."""
    begins, ends = united(np.concatenate([each.starts for each in fua]), np.concatenate([each.stops for each in fua]))
    plain = (rows.flags & _FUA) == 0
    index = np.searchsorted(ends, rows.starts[plain], "right")
    return bool(np.any(np.append(begins, np.iinfo(np.int64).max)[index] < rows.stops[plain]))


def _unequal(one: bytearray, other: bytearray) -> npt.NDArray[np.bool_]:
    """Return which sectors differ."""
    pair = (np.frombuffer(data, np.uint8).reshape(-1, SECTOR) for data in (one, other))
    return np.asarray(np.not_equal(*pair).any(axis=1), np.bool_)


def _runs(differs: npt.NDArray[np.bool_], confirmed: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int, bool]]:
    """Yield the runs of differing sectors that are alike in whether they are confirmed."""
    kinds = np.where(differs, np.where(confirmed, _CONFIRMED, _DOUBTED), 0)
    edges = np.flatnonzero(np.diff(kinds, prepend=-1, append=-1))
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if kinds[first]:
            yield first, last, bool(kinds[first] == _CONFIRMED)
