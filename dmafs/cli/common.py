"""What commands have in common: options of how much they tell, and of JSON; and how a change is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from dmafs.cli.output import note
from dmafs.client import Session, connect


def add_telling(parser: argparse.ArgumentParser, default: object) -> None:
    """Add the options that are taken before the command as well as behind it."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "-v", "--verbose", action="store_true", default=default, help="log what happens, not only what goes wrong"
    )
    group.add_argument(
        "-q", "--quiet", action="store_true", default=default, help="print nothing but errors and what is asked for"
    )


def _telling() -> argparse.ArgumentParser:
    parent = argparse.ArgumentParser(add_help=False)
    add_telling(parent, argparse.SUPPRESS)
    return parent


def _json() -> argparse.ArgumentParser:
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--json", action="store_true", help="print JSON, errors too")
    return parent


TELLING: Final = [_telling()]
"""Parents of a command that prints nothing which could be JSON."""
JSON: Final = [*TELLING, _json()]
"""Parents of all others."""


def add_store(parser: argparse.ArgumentParser) -> None:
    """Add the argument that nearly all commands have."""
    parser.add_argument("store", metavar="STORE", type=Path, help="directory of the store")


def do(store: Path, ask: Callable[[Session], Mapping[str, object]], told: str) -> int:
    """Ask for a change, and print what was done: *told*, with fields of the answer in braces; return the status."""
    with connect(store) as asked:
        report = ask(asked)
    note(told.format_map(report), report)
    return 0
