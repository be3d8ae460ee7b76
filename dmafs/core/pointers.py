"""The pointer slots: the only place where head, tail and a sync in progress are persisted.

Two slots of one file are written in turn, each with a checksum and a generation, so a torn write leaves the other one.
An update is durable when ``update`` returns. Any thread may update; updates exclude each other. What is found when it
is opened is written again and made durable before anybody acts on it: a process that was killed, or whose datasync
failed, may have left it in the page cache only, and after a power cut the older slot would count again.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any
from uuid import UUID

from dmafs.core.ondisk import POINTERS_SIZE, SLOT_OFFSETS, SLOT_SIZE, Pointers
from dmafs.core.opening import open_ours
from dmafs.core.recovery import case, pointers_case
from dmafs.core.storage import File, Storage
from dmafs.errors import CorruptionError, StoreError, VersionError

NAME = "pointers"


def read_slots(file: File) -> list[Pointers | StoreError]:
    """Return what each slot holds, or why it can't be used; CorruptionError if the file is too short."""
    found: list[Pointers | StoreError] = []
    for offset in SLOT_OFFSETS:
        data = bytearray(SLOT_SIZE)
        file.read_into(data, offset)
        try:
            found.append(Pointers.decode(data, f"{file.name} at byte {offset}"))
        except (CorruptionError, VersionError) as error:
            found.append(error)
    return found


class PointerFile:
    """The pointers of one volume; ``now`` is what is durable."""

    def __init__(self, storage: Storage, uuid: UUID) -> None:
        """Open the file and take the newer valid slot; CorruptionError if there is none of this volume's."""
        self._file = open_ours(storage, NAME, needed="without it nobody knows what of the volume counts")
        self._lock = threading.Lock()
        try:
            self.now = self._newest(uuid)
            self._put(self.now)
        except BaseException:
            self._file.close()
            raise

    @staticmethod
    def create(storage: Storage, pointers: Pointers) -> None:
        """Create the file with *pointers* in both slots."""
        file = storage.create(NAME)
        try:
            file.truncate(POINTERS_SIZE)
            for offset in SLOT_OFFSETS:
                file.write([pointers.encode()], offset)
            file.datasync()
        finally:
            file.close()

    def _newest(self, uuid: UUID) -> Pointers:
        slots = read_slots(self._file)
        found = [slot for slot in slots if isinstance(slot, Pointers)]
        problems = [slot for slot in slots if isinstance(slot, StoreError)]
        for problem in problems:
            if isinstance(problem, VersionError):
                raise problem
        if not found:
            case(pointers_case(slots="none", snapshot="whole", target=False), NAME)  # R41
            raise problems[0]
        newest = max(found, key=lambda pointers: pointers.generation)
        if newest.uuid != uuid:
            raise CorruptionError(
                f"{self._file.name} belongs to volume {newest.uuid}, not to {uuid}",
                hint="the file comes from another volume; put this one's back",
            )
        return newest

    def update(self, **changes: Any) -> None:  # noqa: ANN401 - the fields of Pointers, checked by it
        """Change fields, durably."""
        with self._lock:
            generation = self.now.generation + 1
            changed = dataclasses.replace(self.now, **changes, generation=generation)
            self._put(changed)
            self.now = changed

    def _put(self, pointers: Pointers) -> None:
        self._file.write([pointers.encode()], SLOT_OFFSETS[pointers.generation % 2])
        self._file.datasync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
