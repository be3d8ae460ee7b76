"""Indexes: the layers of what is finished of the journals, kept beside it, so that a start reads and sorts nothing.

``forward/<first>.idx`` is of a sealed segment, ``backward/<seq>.idx`` of a snapshot that isn't the open one. An index
is derived: whoever finds it missing or of no use makes the layer from descriptors, and the index again. It names its
*owner*, a descriptor file in a state that no file ever had before, so that of an earlier state, or of an earlier life
of the name, is never taken; and all of it has a checksum, which is compared when it is mapped. Nobody maps it before it
is durable.

Layers are views of the mapped file: they take page cache, no memory of the process. The file is never written again,
only unlinked, which leaves mappings as they are; a process that somebody truncates it under, or that can't read one of
its pages again, is killed by SIGBUS.

Its first 512 bytes are a header, whose table is in ``ondisk``. From there on there are three tables, 8 bytes for each
entry: the first sector of each; the one behind each; and the number in the file, from 0 on, of the event that each is
of, 2**61 added if that has no data. The entries are what the events amount to: a disjoint list in ascending order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import struct
from typing import Final, NamedTuple
from uuid import UUID

import numpy as np
import xxhash

from dmafs.core.files import INDEX, discard_index, unlink_if_there
from dmafs.core.layers import Layer
from dmafs.core.limits import IndexLimits
from dmafs.core.ondisk import FORMAT_VERSION, HEADER_SIZE, RECORD_SIZE, Kind, check_block, checksum
from dmafs.core.segment import read_header
from dmafs.core.storage import Storage
from dmafs.core.vbm import ZERO
from dmafs.errors import CorruptionError, DmafsError

log = logging.getLogger(__name__)

HEADER: Final = struct.Struct("<8sII16sQQQQ440x")
INDEX_MAGIC: Final = b"DMAFSIDX"
_CHECKSUM: Final = struct.Struct("<Q")
_INT: Final = np.dtype("<i8")
_DERIVED: Final = "nothing has to be done: it is made again"
_TAIL_RECORDS: Final = 64
"""Of a snapshot's file, to tell it from others: they have times, and the checksums of what they describe."""


class Owner(NamedTuple):
    """What an index is of: a descriptor file in one of its states."""

    uuid: UUID
    records: int
    digest: int


def snapshot_owner(storage: Storage, name: str, uuid: UUID, *, events: int | None = None) -> Owner | None:
    """Return the state of a snapshot's descriptor file; None if it isn't one that stays as it is.

    With *events* all of its events are durable, and that many. May run in a thread, while the file grows.
    """
    try:
        with contextlib.closing(storage.open(name)) as ext:
            header = read_header(ext, Kind.BACKWARD, uuid)
            records, rest = divmod(ext.size() - HEADER_SIZE, RECORD_SIZE)
            tail = min(records, _TAIL_RECORDS)
            data = bytearray(HEADER_SIZE + tail * RECORD_SIZE)
            view = memoryview(data)
            ext.read_into(view[:HEADER_SIZE], 0)
            ext.read_into(view[HEADER_SIZE:], HEADER_SIZE + (records - tail) * RECORD_SIZE)
    except (DmafsError, OSError):  # who reads the descriptors will find out
        return None
    if rest or (events is not None and header.sealed != events):
        return None
    data[:HEADER_SIZE] = dataclasses.replace(header, name="").encode()  # it is the same under another name
    return Owner(uuid, records, xxhash.xxh3_64_intdigest(data))


def read_index(storage: Storage, stem: str, owner: Owner, *, base: int) -> Layer | None:
    """Return the layer in an index, references counted from *base*; None if there is none that is right."""
    name = storage.path(stem + INDEX)
    try:
        with contextlib.closing(storage.open(stem + INDEX)) as file:
            return decode(file.map(), owner, name, base=base)
    except DmafsError as error:
        log.warning("index %s isn't used, and made again: %s", name, error.message)
    except OSError as error:
        log.debug("index %s isn't used: %s", name, error)
    return None


def keep_index(
    storage: Storage, stem: str, owner: Owner, layer: Layer, limits: IndexLimits, *, base: int, beside: tuple[str, ...]
) -> Layer:
    """Write an index, and return its layer; or *layer*, where there is no space, few entries, or nothing *beside* it.

    Whatever fails, nothing else does.
    """
    if len(layer) < limits.indexed:
        return layer
    name, data = stem + INDEX, encode(owner, layer, base=base)
    try:
        unlink_if_there(storage, name)
        if storage.free_bytes() - len(data) < limits.reserve_bytes:
            return layer
        with contextlib.closing(storage.create(name)) as file:
            file.write([data], 0)
            file.datasync()
            found = decode(file.map(), owner, storage.path(name), base=base)
        if any(storage.exists(stem + suffix) for suffix in beside):
            return found
    except (DmafsError, OSError) as error:
        log.debug("index %s isn't written: %s", storage.path(name), error)
    discard_index(storage, stem)
    return layer


def encode(owner: Owner, layer: Layer, *, base: int) -> bytes:
    """Return the bytes of an index of *layer*, whose references count from *base*."""
    columns = layer.starts, layer.stops, layer.references - base
    body = b"".join(column.astype(_INT).tobytes() for column in columns)
    digest = xxhash.xxh3_64_intdigest(body, seed=owner.digest)
    head = HEADER.pack(
        INDEX_MAGIC, FORMAT_VERSION, 0, owner.uuid.bytes, owner.records, owner.digest, len(layer), digest
    )
    return head + _CHECKSUM.pack(checksum(head)) + body


def decode(data: memoryview, owner: Owner, where: str, *, base: int) -> Layer:
    """Return the layer in the bytes of an index, a view of them.

    CorruptionError or VersionError, naming *where*, if it is none of ours, of another owner, or damaged.
    """
    head, body = data[:HEADER_SIZE], data[HEADER_SIZE:]
    check_block(bytes(head), HEADER_SIZE, INDEX_MAGIC, where)
    _, _, _, uuid, records, digest, count, body_digest = HEADER.unpack(head[: HEADER.size])
    if (UUID(bytes=uuid), records, digest) != owner:
        raise CorruptionError(f"{where} is of another file, or of what that was earlier", hint=_DERIVED)
    if len(body) != count * 3 * _INT.itemsize or body_digest != xxhash.xxh3_64_intdigest(body, seed=digest):
        raise CorruptionError(f"checksum of {where} doesn't match", hint=_DERIVED)
    starts, stops, numbers = np.frombuffer(body, _INT).reshape(3, count)
    events = numbers & ~ZERO
    ascends = np.all(starts < stops) and np.all(starts[1:] >= stops[:-1])
    if count and not (ascends and starts[0] >= 0 and events.min() >= 0 and events.max() < records):
        raise CorruptionError(f"{where} has entries that can't be", hint=_DERIVED)
    return Layer(starts, stops, numbers, base=base, mapped=True)
