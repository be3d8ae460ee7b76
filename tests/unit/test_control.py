"""Claims about dmafs.service.control: what comes from outside is checked."""

from __future__ import annotations

import pytest

from dmafs.errors import InputError
from dmafs.service.control import _flag, _rate


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
