"""Claims about dmafs.service.control: what comes from outside is checked."""

from __future__ import annotations

import errno
from pathlib import Path
from unittest import mock

import pytest
import trio
import trio.testing

from dmafs.errors import InputError
from dmafs.service.appliance import Appliance
from dmafs.service.control import _flag, _rate, serve_control


def test_flags_are_0_or_1() -> None:
    """Nothing else is taken for yes or no."""
    assert (_flag("0"), _flag("1")) == (False, True)
    for text in (None, "", "2", "true", "01"):
        with pytest.raises(InputError, match="neither 0 nor 1"):
            _flag(text)


def test_rates_are_not_negative() -> None:
    """A rate is a number of bytes, 0 too."""
    assert (_rate("0"), _rate("4096")) == (0, 4096)
    for text in ("-1", "4K", ""):
        with pytest.raises(InputError):
            _rate(text)


async def test_a_socket_that_cannot_be_removed_is_left_behind(tmp_path: Path) -> None:
    """A file system that has failed is read-only: the daemon ends in order nevertheless, and the next one goes on."""
    path = tmp_path / "control.sock"
    for _ in range(2):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                await inner.start(serve_control, mock.Mock(Appliance), path)
                with mock.patch.object(Path, "unlink", side_effect=OSError(errno.EROFS, "Read-only file system")):
                    scope.cancel()
                    with trio.CancelScope(shield=True):
                        await trio.testing.wait_all_tasks_blocked()
        assert path.is_socket()
