"""``dmafs at``: what a time means."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from dmafs.answers import MomentOfVolume, NoMoment
from dmafs.cli.common import JSON, add_store
from dmafs.cli.output import both, say, show
from dmafs.client import connect
from dmafs.service.mounting import tree_of

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_STATES: Final = {
    "frozen": "frozen: a hook had brought what uses the disk to rest",
    "exact": "exact: what a power cut right after a flush would have left",
    "crash": "crash: what a power cut between two flushes would have left",
}


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    at = commands.add_parser(
        "at",
        parents=JSON,
        help="explain which moment a time means",
        description="Say which moment of each volume a time means, why it is that one, and where the tree shows it.",
    )
    add_store(at)
    at.add_argument("time", metavar="TIME", help="the time")
    at.add_argument("--volume", metavar="VOLUME", help="this volume only")
    at.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Explain; 1 if some volume has no point there."""
    with connect(options.store) as asked:
        report = asked.moment(options.time, options.volume)
    tree = tree_of(options.store)
    paths = {
        found["volume"]: None
        if tree is None or "problem" in found
        else str(tree / "at" / report["at"] / f"{found['volume']}.img")
        for found in report["volumes"]
    }
    if options.json:
        show({**report, "volumes": [{**found, "path": paths[found["volume"]]} for found in report["volumes"]]})
    else:
        say(f"moment {both(report['at'])}")
        for found in report["volumes"]:
            say("\n".join(_lines(found, paths[found["volume"]])))
    return 1 if any("problem" in found for found in report["volumes"]) else 0


def _lines(found: MomentOfVolume | NoMoment, path: str | None) -> list[str]:
    if "problem" in found:
        return [f"volume {found['volume']}: nothing: {found['problem']}", f"  hint   {found['hint']}"]
    kind = f"{found['kind']} {found['name']}".rstrip()
    lines = [
        f"volume {found['volume']}: {kind}, seq {found['seq']}",
        f"  time   {both(found['time'])}",
        f"  why    {found['why']}",
        f"  state  {_STATES[found['consistency']]}",
    ]
    return lines + ([f"  path   {path}"] if path else [])
