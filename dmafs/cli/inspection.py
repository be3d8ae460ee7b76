"""``dmafs check``: what is wrong with a store that nobody works on."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dmafs.cli.common import JSON, add_store
from dmafs.cli.output import say, show
from dmafs.core.inspection import Inspected, inspect
from dmafs.core.names import CONFIGURATION_NAME
from dmafs.errors import CorruptionError
from dmafs.service.loading import load_configuration

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "check",
        parents=JSON,
        help="list all that is wrong with a store that no daemon serves",
        description="Look at the files of a store that no daemon serves, and list all that is wrong with them at once, "
        "with the remedies. Nothing is changed. Descriptors and structure are read, data isn't: that is what dmafs "
        "scrub does. If there are errors, the exit status is 14.",
    )
    add_store(command)
    command.add_argument("volume", metavar="VOLUME", nargs="?", help="name of the volume (all)")
    command.set_defaults(run=run)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Have the core log nothing: all of it is in the list."""
    core = logging.getLogger("dmafs.core")
    level = core.level
    core.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        core.setLevel(level)


def run(options: argparse.Namespace) -> int:
    """Check; CorruptionError if there is an error."""
    with _quiet():
        found = inspect(options.store, options.volume)
    with found.taking(str(options.store / CONFIGURATION_NAME)):
        load_configuration(options.store)
    found.sort()
    errors = found.count("error")
    if options.json:
        findings = [finding._asdict() for finding in found.findings]
        report = {"volumes": found.volumes, "errors": errors, "findings": findings}
        show(report)
    else:
        say("\n".join(_lines(found)))
    if errors:
        count = "1 error" if errors == 1 else f"{errors} errors"
        raise CorruptionError(
            f"store {options.store} has {count}", hint="do what the remedies say, on a copy of the store if you can"
        )
    return 0


def _lines(found: Inspected) -> list[str]:
    lines = ["SEVERITY  FILE"] if found.findings else []
    for finding in found.findings:
        lines += [
            f"{finding.severity:<8}  {finding.file}",
            f"{'':<8}    {finding.problem}",
            f"{'':<8}    remedy: {finding.remedy}",
        ]
    names = ("volume " if len(found.volumes) == 1 else "volumes ") + ", ".join(found.volumes)
    errors, notes = found.count("error"), found.count("note")
    text = (
        f"{errors or 'no'} {'error' if errors == 1 else 'errors'}, {notes or 'no'} {'note' if notes == 1 else 'notes'}"
    )
    return [*lines, f"{names}: {text}; data was not read"]
