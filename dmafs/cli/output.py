"""Standard output: what commands print. A full disk behind it is an error of its own, a closed pipe isn't caught."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from dmafs.errors import DmafsError


def say(line: str) -> None:
    """Print a line."""
    with _translated():
        print(line)


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
