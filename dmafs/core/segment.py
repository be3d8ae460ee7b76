"""A segment: one pair of queues, extent descriptors (``.ext``) and the data they point to (``.dat``); fig. 7 and 13.

The forward journal is a row of segments, each snapshot's part of the backward journal is one segment.

Invariants:

1. Records and data are only ever appended. What ``append`` has returned from is in the files, though not durable.
   Behind their ends there may be zeros (``write_ahead``), which are no records.
2. A descriptor is never made durable before its data in the backward journal; in the forward journal both may become
   durable in any order, so the data of records after the last durable one is verified on opening.
3. The columns in memory equal the valid records of the file. They are packed arrays: about 50 bytes an extent.
4. Data is served only after the checksum of the whole extent was verified once since the segment was opened.

One thread appends. Any thread may read extents that were in the columns before it began.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
from collections.abc import Iterator, Sequence
from typing import Final
from uuid import UUID

import numpy as np

from dmafs.core.batch import Extent, described, end_of, name_sector
from dmafs.core.extent import Ints
from dmafs.core.files import discard_files
from dmafs.core.limits import SegmentLimits
from dmafs.core.ondisk import (
    EVENT_FLAGS,
    HEADER_SIZE,
    RECORD_DTYPE,
    RECORD_SIZE,
    Flag,
    Header,
    Kind,
    Records,
    checksum,
    decode_records,
    encode_record,
    seal_records,
)
from dmafs.core.opening import open_ours
from dmafs.core.pair import Pair
from dmafs.core.seal import LANDMARKS, Seal, Summary, digest_of, encode, landmarks_of
from dmafs.core.storage import Buffer, File, Storage
from dmafs.errors import CorruptionError, DmafsError
from dmafs.units import SECTOR

log = logging.getLogger(__name__)

SCAN_BYTES: Final = 4 << 20
"""How much of a descriptor queue is decoded at once: bounds the memory of opening."""
BATCH_BYTES: Final = 8 << 20
"""What a sync or a drop copies in one step: bounds its memory, and how long it can't be stopped."""


DATA_AHEAD: Final = 1 << 20
RECORDS_AHEAD: Final = 16 << 10
"""So many bytes of zeros are written ahead of data and of records, again when a sixteenth is left of them."""

_NO_RECORD: Final = bytes(RECORD_SIZE)
_NEEDED: Final = "some of the history can't be read without it"


class Segment(Pair):
    """One ``.ext``/``.dat`` pair, with its descriptors in memory. Made by ``create`` or ``open``."""

    def __init__(self, storage: Storage, stem: str, header: Header, ext: File, dat: File) -> None:
        """Take ownership of two open files."""
        super().__init__(header, ext, dat)
        self._storage = storage
        self.stem = stem
        self._trimmed = False
        self._zeroed = [0, 0]  # up to where zeros are written ahead, of data and of records
        self._settled_sectors = 0

    @classmethod
    def create(cls, storage: Storage, stem: str, header: Header, *, suffix: str = ".ext") -> Segment:
        """Create the pair of files, or none; leftovers of a creation that was cut off are replaced."""
        discard_files(storage, stem, suffix)
        with contextlib.ExitStack() as undo:
            undo.callback(discard_files, storage, stem, suffix)
            dat = storage.create(stem + ".dat")
            undo.callback(dat.close)
            ext = storage.create(stem + suffix)
            undo.callback(ext.close)
            ext.write([header.encode()], 0)
            undo.pop_all()
        segment = cls(storage, stem, header, ext, dat)
        segment._trimmed = True
        return segment

    @classmethod
    def open(
        cls, storage: Storage, stem: str, kind: Kind, uuid: UUID, *, suffix: str = ".ext", seal: Seal | None = None
    ) -> Segment:
        """Open the pair and read its descriptors: those that a *seal* is of, else up to the first invalid one.

        O(records). CorruptionError where it isn't ours, a file is missing, or the descriptors aren't what was sealed.
        """
        ext = open_ours(storage, stem + suffix, needed=_NEEDED)
        try:
            dat = open_ours(storage, stem + ".dat", needed=_NEEDED)
        except BaseException:
            ext.close()
            raise
        try:
            header = read_header(ext, kind, uuid)
            segment = cls(storage, stem, header, ext, dat)
            if seal is None:
                segment._scan()
            else:
                segment._take_sealed(seal)
        except BaseException:
            ext.close()
            dat.close()
            raise
        return segment

    # -- reading the descriptor queue ---------------------------------------------------------------------------

    def _scan(self) -> None:
        size = self.ext.size()
        while self.ext_size + RECORD_SIZE <= size:
            begin = self.ext_size
            data = bytearray(min(SCAN_BYTES, (size - begin) // RECORD_SIZE * RECORD_SIZE))
            self.ext.read_into(data, begin)
            records = decode_records(data, self.header.salt, next_seq=self.next_seq)
            self.absorb(records)
            if len(records) * RECORD_SIZE < len(data):
                break
        if self.data_sectors * SECTOR > self.dat.size():
            self._cut_to_data()

    def _take_sealed(self, seal: Seal) -> None:
        count = seal.summary.records * RECORD_SIZE
        parts = []
        for begin in range(0, count, SCAN_BYTES):
            parts.append(bytearray(min(SCAN_BYTES, count - begin)))
            self.ext.read_into(parts[-1], HEADER_SIZE + begin)
        if digest_of(parts, self.header.salt) != seal.digest:
            raise CorruptionError(
                f"checksum of the descriptors in {self.ext.name} doesn't match",
                hint="the storage below the store is damaged; moments that need this file can't be read",
            )
        for part in parts:
            self.absorb(np.frombuffer(part, RECORD_DTYPE))

    def _cut_to_data(self) -> None:
        """Forget what lies past the end of the data file, in memory only.

        The pair was cut between its two files, or damaged: what the records call durable decides which.
        """
        available = self.dat.size() // SECTOR
        for index in range(len(self)):
            if self.flags[index] == Flag.DATA and self.physicals[index] + self.lengths[index] > available:
                self.forget(self.header.first + index)
                break
        for index, (physical, length, _) in self.mark_places.items():
            if physical + length > available:
                self.forget(self.indicator_seqs[index] + 1, indicators=index)
                break

    def claims_beyond_end(self) -> int:
        """Return the highest seq that a record after the first invalid one calls durable, or 0.

        If that is not less than ``next_seq``, the invalid record had been durable, and it isn't the torn end of
        the queue but damage.
        """
        size, highest = self.ext.size(), 0
        for begin in range(self.ext_size + RECORD_SIZE, size - RECORD_SIZE + 1, SCAN_BYTES):
            data = bytearray(min(SCAN_BYTES, (size - begin) // RECORD_SIZE * RECORD_SIZE))
            self.ext.read_into(data, begin)
            for offset in range(0, len(data), RECORD_SIZE):
                record = memoryview(data)[offset : offset + RECORD_SIZE]
                if record == _NO_RECORD:
                    continue
                seq = int.from_bytes(record[:8], "little")
                kind = int.from_bytes(record[28:32], "little") in EVENT_FLAGS
                found = decode_records(record, self.header.salt, next_seq=seq if kind else seq + 1)
                if len(found):
                    highest = max(highest, int(found[0]["durable"]))
        return highest

    def cut_torn(self, after_seq: int) -> bool:
        """Forget the first event or mark after *after_seq* whose data doesn't match its checksum, and all behind it.

        Returns whether something was cut. Reads all data after *after_seq*.
        """
        torn = self.next_seq
        for index in range(max(0, after_seq + 1 - self.header.first), len(self)):
            try:
                self.verify(index)
            except CorruptionError:
                torn = self.header.first + index
                break
        for index in list(self.mark_places):
            seq = self.indicator_seqs[index]
            if after_seq <= seq < torn:
                try:
                    self.indicator(index)
                except CorruptionError:
                    self.cut(seq + 1, indicators=index)
                    return True
        if torn < self.next_seq:
            self.cut(torn)
            return True
        return False

    def cut(self, seq: int, *, indicators: int | None = None) -> None:
        """Forget event *seq* and all after it, and the indicators after the event before it (or from a number on).

        The files are truncated and synced: leftovers must not look valid once new records have been appended.
        """
        self.forget(seq, indicators=indicators)
        self.trim()

    def trim(self) -> None:
        """Truncate both files to what counts, durably."""
        if self.ext.size() != self.ext_size:
            self.ext.truncate(self.ext_size)
        if self.dat.size() != self.data_sectors * SECTOR:
            self.dat.truncate(self.data_sectors * SECTOR)
        self.datasync()
        self._trimmed = True
        self._zeroed = [0, 0]

    # -- appending ----------------------------------------------------------------------------------------------

    def append_event(self, *, time_ns: int, start: int, length: int, data: Buffer | None, durable: int) -> None:
        """Append one event; *data* is ``length * 512`` bytes or None for zeros. Two system calls (one for zeros).

        After an exception nothing counts as appended, and the next append takes the same place.
        """
        flag, digest = Flag.ZERO, 0
        if data is not None:
            assert len(data) == length * SECTOR
            flag, digest = Flag.DATA, checksum(data)
            self.dat.write([data], self.data_sectors * SECTOR)
        record = encode_record(
            self.header.salt,
            seq=self.next_seq,
            time_ns=time_ns,
            start=start,
            length=length,
            flags=flag,
            physical=self.data_sectors,
            data_checksum=digest,
            durable=durable,
        )
        self.ext.write([record], self.ext_size)
        self.add_event(time_ns, start, length, flag, digest)

    def append_indicator(
        self, flag: Flag, *, time_ns: int, durable: int, name: str = "", position: int = 0, retained: int = 0
    ) -> None:
        """Append a sync indicator; a name is kept as one sector of data. A mark doesn't say what is *retained*."""
        digest, length = 0, 0
        if name:
            text = name_sector(name)
            digest, length = checksum(text), 1
            self.dat.write([text], self.data_sectors * SECTOR)
        record = encode_record(
            self.header.salt,
            seq=self.next_seq - 1,
            time_ns=time_ns,
            start=position,
            length=length,
            flags=flag,
            physical=self.data_sectors,
            data_checksum=digest if name else retained,
            durable=durable,
        )
        self.ext.write([record], self.ext_size)
        self.add_indicator(time_ns, flag, length, digest, position=position, retained=retained)

    def write_batch(self, extents: Sequence[Extent], time_ns: int) -> Records:
        """Write (start, length, data or None) extents durably, data before descriptors, without publishing them.

        May run in a thread. ``publish`` adds the batch to the columns. Of one that wasn't published, since it failed,
        the next call cuts off what is there: behind a shorter batch the rest of it would look valid.
        """
        if not self._trimmed:
            self.trim()
        self._trimmed = False
        records = described(extents, self.next_seq, self.data_sectors)
        records["time_ns"] = time_ns
        out = seal_records(records, self.header.salt)
        self.dat.write([data for _, _, data in extents if data is not None], self.data_sectors * SECTOR)
        self.dat.datasync()
        self.ext.write([out], self.ext_size)
        self.ext.datasync()
        return records

    def write_behind(self, pending: Records, extents: Sequence[Extent], time_ns: int, *, durable: int) -> Records:
        """Write extents behind what counts and behind *pending*, which was written so; return all that is pending.

        Neither durable nor published. May run in a thread, while nothing is appended.
        """
        sectors, count = end_of(pending, self.data_sectors), len(pending)
        records = described(extents, self.next_seq + count, sectors)
        records["time_ns"], records["durable"] = time_ns, durable
        out = seal_records(records, self.header.salt)
        self._trimmed = False
        self.dat.write([data for _, _, data in extents if data is not None], sectors * SECTOR)
        self.ext.write([out], self.ext_size + count * RECORD_SIZE)
        return np.concatenate([pending, records])

    def write_indicator_behind(
        self, pending: Records, flag: Flag, time_ns: int, *, durable: int, position: int, retained: int, name: str
    ) -> Records:
        """Write a sync indicator likewise; see ``append_indicator``. No extent may follow it."""
        sectors, events = end_of(pending, self.data_sectors), int(np.isin(pending["flags"], EVENT_FLAGS).sum())
        record = np.zeros(1, RECORD_DTYPE)
        record["seq"], record["time_ns"], record["flags"] = self.next_seq + events - 1, time_ns, int(flag)
        record["start"], record["physical"] = position, sectors
        record["durable"], record["data_checksum"] = durable, retained
        if name:
            text = name_sector(name)
            record["length"], record["data_checksum"] = 1, checksum(text)
            self.dat.write([text], sectors * SECTOR)
        out = seal_records(record, self.header.salt)
        self.ext.write([out], self.ext_size + len(pending) * RECORD_SIZE)
        return np.concatenate([pending, record])

    def publish(self, batch: Records) -> None:
        """Add what ``write_batch`` wrote to the columns."""
        self.absorb(batch)
        self._trimmed = True

    def seal(self) -> None:
        """Have a marker and the header say that all published batches are durable; itself after the next datasync.

        From then on a batch that can't be read is damage, and not the torn end of an unclean stop, also where the end
        of a file is missing.
        """
        assert self.unsealed
        self.append_indicator(Flag.TICK, time_ns=self.times[-1], durable=self.next_seq - 1)
        self.header = dataclasses.replace(self.header, sealed=len(self))
        self.ext.write([self.header.encode()], 0)

    def rename(self, name: str) -> None:
        """Have the header, which is one sector, say another name; durable after the next datasync of ``ext``."""
        self.header = dataclasses.replace(self.header, name=name)
        self.ext.write([self.header.encode()], 0)

    @property
    def unsealed(self) -> bool:
        """Say whether there are entries that the header doesn't call durable."""
        return self.header.sealed < len(self)

    def finish(self, certain: int) -> Seal | None:
        """Write the seal of a full segment of the forward journal, durably, and return it. May run in a thread.

        All of the segment is durable, the journal up to *certain*, and nothing will be appended. None, and nothing is
        changed, if there is no space, or the file isn't what is in memory: who reads it then will find out.
        """
        try:
            text, seal = self._sealed(certain)
        except DmafsError as error:
            log.error("segment %s can't be sealed: %s", self.ext.name, error.message)
            return None
        for file, end in ((self.dat, self.data_sectors * SECTOR), (self.ext, self.ext_size)):
            if file.size() > end:
                file.truncate(end)
        try:
            self.ext.write([text], self.ext_size)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            self.ext.truncate(self.ext_size)
            return None
        self.ext.datasync()
        return seal

    def _sealed(self, certain: int) -> tuple[bytes, Seal]:
        """Return the seal, in bytes too, of what the files hold; CorruptionError if that isn't what is in memory."""
        data = bytearray(self.records * RECORD_SIZE)
        self.ext.read_into(data, HEADER_SIZE)
        records = np.frombuffer(data, RECORD_DTYPE)
        if not self.agrees(records):
            raise CorruptionError("its records aren't what was written", hint="the storage below the store is damaged")
        indicators = [self.indicator(number) for number in self._landmarks()]
        names = [name_sector(one.name) for one in indicators if one.name]
        summary = Summary(
            records=self.records,
            next_seq=self.next_seq,
            data_sectors=self.data_sectors,
            first_time_ns=self.times[0] if self.times else 0,
            last_time_ns=max([*self.times[-1:], *self.indicator_times[-1:]], default=0),
            certain=certain,
            durable=self.claimed_durable,
            indicators=len(self.indicator_seqs),
            first_indicator=self.indicator_seqs[0] if self.indicator_seqs else 0,
            position=self.indicator_positions[-1] if self.indicator_positions else 0,
            retained=next((value for value in reversed(self.indicator_retained) if value), 0),
        )
        digest = digest_of([data], self.header.salt)
        text = encode(summary, landmarks_of(records), names, self.header.salt, digest)
        return text, Seal(summary, tuple(indicators), digest)

    def _landmarks(self) -> list[int]:
        """Return the numbers of the indicators that a seal keeps."""
        return sorted({*self.indicators_of(*LANDMARKS), len(self.indicator_seqs) - 1} - {-1})

    def write_ahead(self, limits: SegmentLimits) -> None:
        """Write zeros behind both ends, not beyond what is full, if little was appended since the last call.

        To make durable what overwrites them takes no transaction of the file system: where each small write is flushed
        that is most of what a flush costs. Without space for them it costs that.
        """
        appended = (self.data_sectors - self._settled_sectors) * SECTOR
        self._settled_sectors = self.data_sectors
        if appended > DATA_AHEAD // 16:
            return
        for number, (file, end, ahead, most) in enumerate(
            (
                (self.dat, self.data_sectors * SECTOR, DATA_AHEAD, limits.data_sectors * SECTOR),
                (self.ext, self.ext_size, RECORDS_AHEAD, HEADER_SIZE + limits.records * RECORD_SIZE),
            )
        ):
            begin, stop = max(end, self._zeroed[number]), min(end + ahead, most)
            if begin < stop and begin - end < ahead // 16:
                try:
                    file.write([bytes(stop - begin)], begin)
                except OSError as error:
                    if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                        raise
                self._zeroed[number] = stop

    @property
    def files(self) -> tuple[File, File]:
        """Return what has to be durable for everything appended to be."""
        return self.dat, self.ext

    def datasync(self) -> None:
        """Make everything appended durable, data first. May run in a thread."""
        for file in self.files:
            file.datasync()

    # -- housekeeping -------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Unlink both files, the descriptors first: data without descriptors is a leftover, not damage.

        The data's space is free at once, also while the files are open: a sync that goes on may need it.
        """
        self._storage.unlink(self.stem + ".ext")
        self._storage.unlink(self.stem + ".dat")
        self.dat.truncate(0)

    def check(self) -> None:
        """Assert the invariants of the columns, and that the files hold what they describe."""
        super().check()
        assert self.ext.size() >= self.ext_size
        assert self.dat.size() >= self.data_sectors * SECTOR
        if self.header.kind == Kind.FORWARD:
            assert np.all(np.diff(np.array(self.times, np.int64)) >= 0), "times never decrease"


def parts(starts: Ints, stops: Ints) -> Iterator[tuple[int, int]]:
    """Cut a list of extents into runs ``[first, last)`` of BATCH_BYTES at most, or of one extent."""
    total = np.cumsum((stops - starts) * SECTOR + RECORD_SIZE)
    first = 0
    while first < len(total):
        done = int(total[first - 1]) if first else 0
        last = max(int(np.searchsorted(total, done + BATCH_BYTES, "right")), first + 1)
        yield first, last
        first = last


def read_header(ext: File, kind: Kind, uuid: UUID) -> Header:
    """Read and check the header of a descriptor file: ours, of this volume and kind."""
    data = bytearray(HEADER_SIZE)
    ext.read_into(data, 0)
    header = Header.decode(data, ext.name)
    if header.uuid != uuid or header.kind != kind:
        raise CorruptionError(
            f"{ext.name} belongs to volume {header.uuid} ({header.kind.name.lower()}), not to {uuid}",
            hint="move the foreign file out of the store",
        )
    return header
