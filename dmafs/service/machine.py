"""Where the machine's file is."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import Final

MACHINE_FILE: Final = Path("/etc/dmafs/dmafs.toml")

_chosen: ContextVar[Path | None] = ContextVar("machine file", default=None)


def choose_machine_file(path: Path | None) -> None:
    """Have *path* be the machine's file for this process; without one, ``MACHINE_FILE``, which needn't be there."""
    _chosen.set(None if path is None else path.absolute())


def machine_file() -> Path:
    """Return the path of the machine's file."""
    return _chosen.get() or MACHINE_FILE
