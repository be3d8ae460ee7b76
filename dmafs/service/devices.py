"""The mapped devices of volumes with the dm tap: what commands do with them when there is no daemon."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dmafs import answers
from dmafs.core.storage import boot_id
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import InputError
from dmafs.service.operations import ATTACH, DETACH
from dmafs.service.report import volume_of
from dmafs.taps.dm import DmTap, attach, detach


def mapped_volumes(volumes: Mapping[str, Volume], name: str | None) -> list[str]:
    """Return the names of the volumes with a dm tap, or the one that is named; InputError if it has none."""
    if name is not None:
        volume_of(volumes, name)
    mapped = [each for each, volume in volumes.items() if volume.info.tap == "dm" and name in {None, each}]
    if not mapped:
        which = f"volume {name} has no mapped device" if name else "no volume of this store has a mapped device"
        raise InputError(which, hint="only volumes made with --tap dm have one")
    return mapped


def local_tap(volume: Volume, directory: Path, action: str, *, log_bytes: int) -> answers.Device:
    """Attach or detach a volume's device without a daemon, or only report; does nothing where it is so already."""
    tap = DmTap(volume, directory, log_bytes=log_bytes)
    try:
        if action == ATTACH and tap.mapped is None:
            run(attach(volume, tap, boot_id()))
        elif action == DETACH and tap.mapped is not None:
            tap.begin(volume.journal.position, volume.journal.retained)
            run(detach(volume, tap))
        return tap.report()
    finally:
        tap.close()
