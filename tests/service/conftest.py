"""A daemon on a scratch store, with all that can be asked for, and a client of its socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from dmafs.client import connect
from tests.mount.harness import MIB, Rig, pwrite


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """A store with a snapshot, a mark, a sync, a clone, and writes after them."""
    with Rig() as rig:
        rig.create(size=4 * MIB, content=b"from the beginning")
        rig.start()
        pwrite(rig.tap(), b"first", 4096, sync=True)
        with connect(rig.store) as asked:
            asked.take_snapshot("kept")
            asked.mark("noted")
            asked.sync()
            asked.create_clone("scratch")
        pwrite(rig.tap(), b"second", 65536, sync=True)
        yield rig
        rig.stop()


@pytest.fixture(scope="module")
def client(rig: Rig) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(rig.store / "control.sock"))
    with httpx.Client(transport=transport, base_url="http://dmafs", timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").raise_for_status().json()
    return found
