"""Which file says what: the settings of a store are in its own ``dmafs.conf``, or in the machine's ``dmafs.toml``.

Never in both: a store that the machine's file names must have no file of its own. So there is nothing to be merged, and
for each setting one place. A store that no file tells of has the defaults.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from dmafs import answers
from dmafs.core.names import CONFIGURATION_NAME
from dmafs.core.privacy import require_private
from dmafs.core.store import volume_info, volume_names
from dmafs.errors import DmafsError, InputError
from dmafs.service.configuration import Configuration, Machine, StoreTable
from dmafs.service.document import Document
from dmafs.service.lines import Place
from dmafs.service.machine import MACHINE_FILE, machine_file
from dmafs.units import format_rfc3339

Table = TypeVar("Table")


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings of a store, and where each is from."""

    configuration: Configuration
    document: Document | None = None
    """None: no file tells of the store."""
    place: Place = ()
    """Of its table in the document."""
    time_ns: int = field(default_factory=time.time_ns)

    @property
    def file(self) -> Path | None:
        """Return the path of the file."""
        return self.document.path if self.document else None

    @property
    def source(self) -> str:
        """Return what messages call it."""
        return f"configuration {self.file}" if self.file else "the default configuration"

    def settings(self) -> dict[str, answers.Setting]:
        """Return value and origin of each setting by its key, ``[table]`` and key with a point between."""
        return {".".join(key): self._setting(key) for key in setting_keys()}

    def _setting(self, key: tuple[str, ...]) -> answers.Setting:
        found: Any = self.document.values if self.document else {}
        for name in (*self.place, *key):
            if isinstance(found, dict) and name not in found:
                return {"value": _default(key), "origin": "default"}
            found = found[name]  # a table, an array of tables by number, or the value
        assert self.document is not None
        return {"value": found, "origin": self.document.shown((*self.place, *key))}

    def report(self) -> answers.Settings:
        """Return all of it, as JSON has it."""
        return {
            "file": None if self.file is None else str(self.file),
            "loaded": format_rfc3339(self.time_ns),
            "settings": self.settings(),
        }


def setting_keys() -> list[tuple[str, ...]]:
    """Return the key of each setting of a store: alone, or behind that of its table."""
    found: list[tuple[str, ...]] = []
    for entry in fields(Configuration):
        table = entry.metadata.get("table")
        found += [(entry.name,)] if table is None else [(entry.name, each.name) for each in fields(table)]
    return found


def _default(key: tuple[str, ...]) -> Any:  # noqa: ANN401 - whatever TOML has
    kind: Any = Configuration
    for name in key[:-1]:
        kind = next(entry for entry in fields(kind) if entry.name == name).metadata["table"]
    return next(entry for entry in fields(kind) if entry.name == key[-1]).metadata["default"]


# -- reading files ------------------------------------------------------------------------------------------------


def load_configuration(store: Path) -> Configuration:
    """Return the settings of a store; see ``load``."""
    return load(store).configuration


def load(store: Path) -> Loaded:
    """Return the settings of a store, or the defaults where no file tells of it.

    UnsafeError if others can write the file, InputError for anything not right in it, or if both files tell of it.
    """
    machine = read_machine()
    if machine is not None:
        machine[1].finish()
        for number, entry in enumerate(machine[0].store):
            if is_same(entry.path, store):
                require_one_place(machine[1], number, entry)
                return Loaded(entry, machine[1], ("store", number))
    document = read(store / CONFIGURATION_NAME)
    if document is None:
        return Loaded(Configuration())
    configuration = document.table(Configuration)
    document.finish()
    return Loaded(configuration, document)


def is_same(one: Path, other: Path) -> bool:
    """Say whether two paths lead to one store, links resolved; neither has to be there."""
    return os.path.realpath(one) == os.path.realpath(other)


def require_one_place(document: Document, number: int, entry: StoreTable) -> None:
    """Refuse settings of a store in both places; *number* is the store's in the machine's file."""
    own = entry.path / CONFIGURATION_NAME
    if os.path.lexists(own):
        raise InputError(
            f"store {entry.path} has its settings in {document.shown(('store', number))}, and there is {own}",
            hint=f"move what it says to {document.path}, and remove it",
        )


def read(path: Path) -> Document | None:
    """Return a file's document, whatever is wrong with it; None if there is no file.

    UnsafeError if others can write it, InputError if it can't be read.
    """
    try:
        require_private(path)
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):  # the store itself says what is wrong with its path
        return None
    except OSError as error:
        raise InputError(
            f"configuration {path} can't be read: {(error.strerror or '').lower()}",
            hint="look at it and its permissions",
        ) from error
    return Document(content, path)


def read_machine() -> tuple[Machine, Document] | None:
    """Return what the machine's file says, and its document, whose problems are for the caller; None without a file."""
    path = machine_file()
    document = read(path)
    if document is None:
        if path != MACHINE_FILE:
            raise InputError(f"configuration {path} isn't there", hint="give the path of a file with --config")
        return None
    return machine_of(document), document


def machine_of(document: Document) -> Machine:
    """Return the machine that a document tells of; what is wrong with it is among the document's problems."""
    machine = document.table(Machine)
    if not document.problems:
        _mind_twins(machine, document)
    return machine


def _mind_twins(machine: Machine, document: Document) -> None:
    """Note what is there twice and must not be."""
    seen: dict[tuple[str, str], Place] = {}

    def mind(kind: str, value: str, place: Place) -> None:
        first = seen.setdefault((kind, value), place)
        if first != place:
            document.complain(place, f"{kind} {value} is in line {document.line(first)} already", "leave one of them")

    for number, entry in enumerate(machine.store):
        place: Place = ("store", number)
        mind("store", os.path.realpath(entry.path), (*place, "path"))
        if entry.mount is not None:
            mind("mount point", os.path.realpath(entry.mount), (*place, "mount"))
        for count, volume in enumerate(entry.volume):
            mind(f"in store {entry.path}, volume", volume.name, (*place, "volume", count, "name"))
            mind("source", str(volume.source), (*place, "volume", count, "source"))


# -- what isn't only a matter of the file ---------------------------------------------------------------------------


def check_stores(machine: Machine, document: Document) -> list[DmafsError]:
    """Return what of a machine's file doesn't fit the stores that are there."""
    found: list[DmafsError] = []
    for number, entry in enumerate(machine.store):
        try:
            require_one_place(document, number, entry)
            require_as_made(Loaded(entry, document, ("store", number)))
        except DmafsError as error:
            found.append(error)
    return found


def require_as_made(loaded: Loaded) -> list[str]:
    """Refuse another source or tap than a volume has; return the names of the volumes that the file doesn't name.

    None of them if it names no volume at all.
    """
    entry, document = loaded.configuration, loaded.document
    if document is None or not isinstance(entry, StoreTable) or not entry.volume:
        return []
    there = volume_names(entry.path) if entry.path.is_dir() else []
    for number, volume in enumerate(entry.volume):
        if volume.name not in there:
            continue
        info = volume_info(entry.path, volume.name)
        for what, wanted, made in (
            ("source", str(volume.source), info.source),
            ("tap", volume.tap, info.tap),
            ("log", str(volume.log or ""), info.log),
        ):
            if wanted != made:
                place = document.shown((*loaded.place, "volume", number, what))
                raise InputError(
                    f"configuration {place}: volume {volume.name} of store {entry.path} has {what} {made!r}, "
                    f"not {wanted!r}",
                    hint=f"write what it has; another {what} needs another volume",
                )
    named = {volume.name for volume in entry.volume}
    return [name for name in there if name not in named]
