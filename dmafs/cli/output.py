"""Standard output: what commands print. A full disk behind it is an error of its own, a closed pipe isn't caught."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, NamedTuple, TextIO

from dmafs.errors import DmafsError
from dmafs.service.logs import has_fields

log = logging.getLogger(__name__)


class Manner(NamedTuple):
    """How this process tells what it tells."""

    quiet: bool = False
    json: bool = False


_manner: ContextVar[Manner] = ContextVar("manner", default=Manner())  # noqa: B039 - it can't be changed


def choose(manner: Manner) -> None:
    """Have this process tell in that manner."""
    _manner.set(manner)


def say(line: str) -> None:
    """Print a line."""
    with _translated():
        print(line)


def show(report: Mapping[str, Any]) -> None:
    """Print JSON, its keys sorted."""
    say(json.dumps(report, indent=2, sort_keys=True))


def named(extents: Iterable[Sequence[int]]) -> list[dict[str, int]]:
    """Return extents as JSON of commands has them."""
    return [{"offset": offset, "length": length} for offset, length in extents]


def note(text: str, report: Mapping[str, Any]) -> None:
    """Print that something was done, which *report* says in JSON; nothing if that isn't wanted."""
    if _manner.get().json:
        show(report)
    elif not _manner.get().quiet:
        say(text)


def warn(text: str) -> None:
    """Print a warning to standard error, unless it isn't wanted."""
    if not _manner.get().quiet:
        print(f"dmafs: warning: {text}", file=sys.stderr)


def fail(error: DmafsError) -> int:
    """Print an error to standard error, as one line of JSON if that is wanted, or to the journal; return its status."""
    if _manner.get().json:
        told = {"error": type(error).__name__, "exit_code": error.exit_code}
        print(json.dumps({**told, "hint": error.hint, "message": error.message}, sort_keys=True), file=sys.stderr)
        return error.exit_code
    if has_fields():
        log.error("%s%s", error.message, f"\nhint: {error.hint}" if error.hint else "")
        return error.exit_code
    print(f"dmafs: error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    return error.exit_code


def has_bars() -> bool:
    """Say whether a bar can be shown: on a terminal that can move its cursor, and if it is wanted."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not _manner.get().quiet


def both(text: str | None) -> str:
    """Return a time in UTC, in RFC 3339 or canonical, as it is and with the local time behind it; None as ``-``.

    That has no fractions of a second, and is in the zone of this process.
    """
    if text is None:
        return "-"
    whole = text.removesuffix("Z").partition(".")[0].replace(":", "")
    local = datetime.strptime(whole, "%Y-%m-%dT%H%M%S").replace(tzinfo=UTC).astimezone()
    return f"{text} ({local:%Y-%m-%d %H:%M:%S %z})"


def write(data: bytes) -> None:
    """Write bytes as they are."""
    with _translated():
        sys.stdout.buffer.write(data)


def flush() -> None:
    """Write out what is still in memory."""
    with _translated():
        sys.stdout.flush()


def abandon(stream: TextIO | None = None) -> None:
    """Forget what is still in memory for a stream (standard output), so that nothing is left to fail at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, (stream or sys.stdout).fileno())
    os.close(null)


def settle_errors() -> None:
    """Write out what is still in memory for standard error, or forget it if its terminal is gone."""
    try:
        sys.stderr.flush()
    except OSError:
        abandon(sys.stderr)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        abandon()
        raise DmafsError(
            f"standard output can't be written: {(error.strerror or '').lower()}", hint="look at where it goes"
        ) from error
