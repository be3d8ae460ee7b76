"""What every handler of the tree is wrapped in: only FUSEError leaves it, and none waits for ever."""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar, cast

import trio
from pyfuse3 import FUSEError

from dmafs.errors import DmafsError, InputError, NotFoundError, PinnedError

log = logging.getLogger(__name__)

DEADLINE_S: Final = 300
"""Longest that a handler which waits for others may take before its caller gets EIO."""

Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])


def guarded(handler: Handler) -> Handler:
    """Translate whatever a handler raises to FUSEError; log what isn't an ordinary answer."""

    @functools.wraps(handler)
    async def wrapper(self: Any, *args: Any) -> Any:  # noqa: ANN401 - as the handler
        try:
            return await handler(self, *args)
        except FUSEError:
            raise
        except (NotFoundError, InputError, PinnedError) as error:
            raise FUSEError(error.errno) from None
        except DmafsError as error:
            log.error("%s: %s", handler.__name__, error.message)
            raise FUSEError(error.errno) from None
        except OSError as error:
            log.error("%s: %s", handler.__name__, error)
            raise FUSEError(error.errno or errno.EIO) from None
        except Exception:
            log.exception("%s failed, please report this", handler.__name__)
            raise FUSEError(errno.EIO) from None

    return cast("Handler", wrapper)


def with_deadline(handler: Handler) -> Handler:
    """Give up on a handler that waits for others too long: EIO."""

    @functools.wraps(handler)
    async def wrapper(self: Any, *args: Any) -> Any:  # noqa: ANN401 - as the handler
        try:
            with trio.fail_after(DEADLINE_S):
                return await handler(self, *args)
        except trio.TooSlowError:
            log.error("%s took longer than %s s", handler.__name__, DEADLINE_S)
            raise FUSEError(errno.EIO) from None

    return cast("Handler", wrapper)


def text_of(name: bytes) -> str:
    """Decode a name; ENOENT for what isn't UTF-8."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise FUSEError(errno.ENOENT) from None
