"""Enough was tried, all together; runs after the others (see conftest)."""

from __future__ import annotations

import pytest

from tests.crash.counting import LEAST, PERCENT, SEED, tried


def test_enough_was_tried(capsys: pytest.CaptureFixture[str]) -> None:
    """There were as many cuts, faults, flips and misdirected writes as there have to be."""
    with capsys.disabled():
        print(f"\nDMAFS_TEST_SEED={SEED} DMAFS_TEST_CRASHES={PERCENT}: {dict(sorted(tried.items()))}")
    for kind, least in LEAST.items():
        assert tried[kind] >= least * PERCENT // 100, f"{kind}: pytest tests/crash runs them all"
