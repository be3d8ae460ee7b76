"""``dmafs completion``: what a shell needs to complete commands, options and paths."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import shtab

from dmafs.cli.common import TELLING
from dmafs.cli.output import say

if TYPE_CHECKING:
    from argparse import _SubParsersAction

SHELLS: Final = ("bash", "zsh", "fish")
_DIRECTORIES: Final = ("STORE", "MOUNTPOINT", "DIR")


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "completion",
        parents=TELLING,
        help="print a completion script for a shell",
        description="Print a script that has a shell complete commands, options and paths. bash reads it with "
        '"source <(dmafs completion bash)", zsh from a file "_dmafs" in a folder of fpath, fish from '
        '"~/.config/fish/completions/dmafs.fish".',
    )
    command.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the script."""
    from dmafs.cli.main import parser  # noqa: PLC0415 - which imports this module

    whole = parser()
    for action in _paths(whole):
        action.complete = shtab.DIR if action.metavar in _DIRECTORIES else shtab.FILE  # type: ignore[attr-defined]  # shtab's way to say it
    say(shtab.complete(whole, options.shell))
    return 0


def _paths(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser, and of its commands, that are paths."""
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to go through them
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - likewise
            for command in action.choices.values():
                yield from _paths(command)
        elif action.type is Path:
            yield action
