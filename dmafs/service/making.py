"""Making volumes: by command, or because the machine's file names them."""

from __future__ import annotations

import logging
from pathlib import Path

from dmafs.core.store import create_volume, remove_new_volume, volume_names
from dmafs.errors import InputError, MountError
from dmafs.service.configuration import StoreTable, VolumeTable
from dmafs.service.loading import Loaded, load, read_machine, require_as_made
from dmafs.service.operations import ATTACH
from dmafs.service.session import connect

log = logging.getLogger(__name__)


def make_volume(store: Path, wanted: VolumeTable, *, force: bool = False) -> tuple[list[str], str]:
    """Make a volume, and its mapped device if it has one; return warnings, and the device's path or an empty text.

    On any error nothing is changed.
    """
    warnings = create_volume(store, wanted.name, source=wanted.source, tap=wanted.tap, log_path=wanted.log, force=force)
    if wanted.tap != "dm":
        return warnings, ""
    try:
        with connect(store) as asked:
            [report] = asked.tap(ATTACH, wanted.name)["volumes"]
    except BaseException:
        remove_new_volume(store, wanted.name)
        raise
    return warnings, str(report["device"])


def find(store: Path | None, mount_point: Path | None) -> tuple[Path, Path, Loaded]:
    """Return store, mount point and settings for a daemon: what isn't given is in the machine's file."""
    if store is None:
        store = _only_store()
    loaded = load(store)
    if mount_point is not None:
        return store, mount_point, loaded
    entry = loaded.configuration
    if not isinstance(entry, StoreTable) or entry.mount is None:
        raise InputError(
            f"no mount point is known for store {store}",
            hint="give it behind the store, or as mount below [[store]] in dmafs.toml: see dmafs.conf(5)",
        )
    try:
        entry.mount.mkdir(parents=True)
    except FileExistsError:
        pass
    except OSError as error:
        raise MountError(
            f"mount point {entry.mount} can't be made: {(error.strerror or '').lower()}", hint="check the path"
        ) from error
    return store, entry.mount, loaded


def _only_store() -> Path:
    machine = read_machine()
    if machine is None:
        raise InputError("no store is given", hint="dmafs serve STORE MOUNTPOINT; or name it in dmafs.toml")
    machine[1].finish()
    stores = [str(entry.path) for entry in machine[0].store]
    if len(stores) != 1:
        hint = (
            f"a daemon serves one: dmafs serve STORE; there are: {', '.join(stores)}" if stores else "add a [[store]]"
        )
        raise InputError(f"configuration {machine[1].path} has {len(stores)} stores, and none is given", hint=hint)
    return Path(stores[0])


def make_missing(loaded: Loaded) -> None:
    """Make the volumes that the machine's file names for a store, as far as they aren't there.

    InputError if one that is there has another source or tap. Warnings are logged.
    """
    entry = loaded.configuration
    if not isinstance(entry, StoreTable):
        return
    for name in require_as_made(loaded):
        log.warning("volume %s of store %s isn't named in %s; it is served all the same", name, entry.path, loaded.file)
    there = volume_names(entry.path) if entry.path.is_dir() else []
    for wanted in entry.volume:
        if wanted.name not in there:
            warnings, device = make_volume(entry.path, wanted)
            for warning in warnings:
                log.warning("%s", warning)
            log.info("volume %s made in %s%s", wanted.name, entry.path, f", device {device}" if device else "")
