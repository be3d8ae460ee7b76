"""``dmafs config``: what is wrong with configuration files, and which settings a store has."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dmafs.cli.common import JSON
from dmafs.cli.output import both, say, show
from dmafs.client import connect
from dmafs.core.names import CONFIGURATION_NAME
from dmafs.core.storage import lock_directory
from dmafs.errors import DmafsError, InputError, NoStoreError, StoreBusyError
from dmafs.service.configuration import Configuration
from dmafs.service.document import Document
from dmafs.service.loading import check_stores, is_same, load, machine_of, read
from dmafs.service.machine import machine_file
from dmafs.service.report import Report

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "config",
        parents=JSON,
        help="check configuration files, show a store's settings",
        description="List all that is wrong with a configuration file; or show a store's settings, those that its "
        "daemon goes by if one runs, and where each is from.",
    )
    command.add_argument("action", choices=["check", "show"], help="what to do")
    command.add_argument("path", metavar="PATH", type=Path, help="directory of the store, or a file to be checked")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Do it; InputError if a file that is checked isn't right."""
    if options.action == "check":
        return _check(options.path, as_json=options.json)
    report = _in_effect(options.path)
    if options.json:
        show(report)
    else:
        say("\n".join(_lines(report)))
    return 0


def _check(path: Path, *, as_json: bool) -> int:
    """List what is wrong with a file, or with that which tells of a store."""
    store = path if path.is_dir() else None
    path = _file_of(path)
    document = read(path)
    if document is None:
        raise InputError(f"configuration {path} isn't there", hint="give the path of a file or a store")
    others: list[DmafsError] = []
    if is_same(path, machine_file()) or "store" in document.values:
        machine = machine_of(document)
        others = [] if document.problems else check_stores(machine, document)
    else:
        document.table(Configuration)
        if store is not None and not document.problems:
            others = _refused(store)
    found = [_row(document, number) for number in range(len(document.problems))]
    found += [{"line": 0, "message": error.message, "hint": error.hint} for error in others]
    found.sort(key=lambda row: row["line"])
    count = {0: "no errors", 1: "1 error"}.get(len(found), f"{len(found)} errors")
    if as_json:
        show({"file": str(path), "errors": found})
    else:
        for row in found:
            say(f"{row['message']}\n  hint: {row['hint']}")
        if not found:
            say(f"configuration {path}: {count}")
    if found:
        raise InputError(f"configuration {path} has {count}", hint="see dmafs.conf(5)")
    return 0


def _file_of(path: Path) -> Path:
    """Return the file that tells of a store, or what isn't a directory as it is."""
    if not path.is_dir():
        return path
    own = path / CONFIGURATION_NAME
    return own if os.path.lexists(own) else load(path).file or own


def _refused(store: Path) -> list[DmafsError]:
    """Return why a store's settings can't be loaded although its file is right: the machine's file tells of it, too."""
    try:
        load(store)
    except DmafsError as error:
        return [error]
    return []


def _row(document: Document, number: int) -> Report:
    problem = document.problems[number]
    return {"line": problem.line, "message": document.message(problem), "hint": problem.hint}


def _in_effect(store: Path) -> Report:
    """Return the settings of the daemon that serves a store, else those that one would have."""
    try:
        os.close(lock_directory(store))
    except StoreBusyError:
        with connect(store) as asked:
            daemon = asked.status()["daemon"]
        if daemon is not None and daemon["configuration"] is not None:
            return {"daemon": daemon["pid"], **daemon["configuration"]}
    except NoStoreError:
        if load(store).file is None:  # a store that is still to be made may be in the machine's file
            raise
    return {"daemon": None, **load(store).report(), "problem": "", "after_restart": []}


def _lines(report: Report) -> list[str]:
    source = report["file"] or "defaults"
    if report["daemon"] is None:
        lines = [f"no daemon; one would load: {source}"]
    else:
        lines = [f"process {report['daemon']} goes by: {source}, loaded {both(report['loaded'])}"]
    if report["problem"]:
        lines.append(f"what is there now can't be loaded: {report['problem']}")
    width = max(len(key) for key in report["settings"])
    values = {key: json.dumps(setting["value"]) for key, setting in report["settings"].items()}
    across = max(len(value) for value in values.values())
    for key, setting in report["settings"].items():
        line = f"{key:<{width}}  {values[key]:<{across}}  {setting['origin']}"
        if "after_restart" in setting:
            line += f"; after a restart {json.dumps(setting['after_restart'])}"
        lines.append(line)
    return lines
