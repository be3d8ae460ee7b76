"""Claims about dmafs.service.control: what comes from outside is checked."""

from __future__ import annotations

import pytest

from dmafs.errors import InputError
from dmafs.service.control import _flag


def test_flags_are_0_or_1() -> None:
    """Nothing else is taken for yes or no."""
    assert (_flag("0"), _flag("1")) == (False, True)
    for text in (None, "", "2", "true", "01"):
        with pytest.raises(InputError, match="neither 0 nor 1"):
            _flag(text)
