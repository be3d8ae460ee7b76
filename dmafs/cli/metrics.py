"""``dmafs metrics``: what a daemon measures."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dmafs.cli.common import TELLING, add_store
from dmafs.cli.output import say
from dmafs.service.measured import metrics_of

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "metrics",
        parents=TELLING,
        help="print the metrics of the daemon",
        description="Print the metrics of the daemon that serves a store, in the text format of Prometheus.",
    )
    add_store(command)
    command.set_defaults(run=run_metrics)


def run_metrics(options: argparse.Namespace) -> int:
    """Print the metrics."""
    say(metrics_of(options.store).removesuffix("\n"))
    return 0
