"""The connection to a daemon: its control socket, and the errors that it answers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from dmafs import errors
from dmafs.core.store import SOCKET_NAME
from dmafs.errors import ControlError, DmafsError


@contextlib.contextmanager
def connected(path: Path) -> Iterator[httpx.Client]:
    """Yield an HTTP client of the store's socket, reached by its directory: unix socket names are short."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        transport = httpx.HTTPTransport(uds=f"/proc/self/fd/{directory}/{SOCKET_NAME}")
        with httpx.Client(transport=transport, base_url="http://dmafs") as client:
            yield client
    finally:
        os.close(directory)


def no_answer(path: Path, error: httpx.HTTPError) -> ControlError:
    """Return the error that says that a daemon didn't answer."""
    return ControlError(
        f"the daemon of store {path} doesn't answer: {type(error).__name__}: {error}",
        hint="look at its log; or another command is just working on the store, then try again",
    )


def error_in(response: httpx.Response, path: Path) -> DmafsError:
    """Return the error of the tree that a daemon answered."""
    try:
        return error_of(response.json())
    except (ValueError, KeyError, AttributeError, TypeError):
        return ControlError(
            f"the daemon of store {path} answered with status {response.status_code}", hint="look at the daemon's log"
        )


def error_of(body: dict[str, Any]) -> DmafsError:
    """Return the error of the tree that a JSON object says; TypeError and its like if it says none."""
    kind = getattr(errors, body["error"])
    if not issubclass(kind, DmafsError):
        raise TypeError
    error: DmafsError = kind(body["message"], hint=body["hint"])
    return error
