"""``dmafs diff`` of a real volume, with the daemon and without it, against the images themselves."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.mount.harness import MIB, Rig, moment, pwrite, spelled

pytestmark = pytest.mark.mount

SIZE = 8 * MIB
SECTOR = 512


def differing(one: bytes, other: bytes) -> set[int]:
    """Return the sectors whose bytes differ."""
    places = [slice(at, at + SECTOR) for at in range(0, len(one), SECTOR)]
    return {number for number, place in enumerate(places) if one[place] != other[place]}


def ask(rig: Rig, a: str, b: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(rig.dmafs("diff", rig.store, "disk", a, b, "--json").stdout)
    return found


def diff(rig: Rig, a: str, b: str) -> dict[str, Any]:
    """Ask in both directions, as JSON and as text; all answers have to agree."""
    found, other = ask(rig, a, b), ask(rig, b, a)
    assert other == {**found, "a": found["b"], "b": found["a"]}
    first, second, head, *lines, total = rig.dmafs("diff", rig.store, "disk", a, b).stdout.splitlines()
    for name, line in (("a", first), ("b", second)):
        assert line.startswith(f"{name} {found[name]['time']} (")
        assert line.endswith(f")  seq {found[name]['seq']}")
    assert head.split() == ["OFFSET", "LENGTH"]
    extents = [(extent["offset"], extent["length"]) for extent in found["extents"]]
    assert [tuple(map(int, line.split())) for line in lines] == extents
    assert total.split()[:3] == ["total", str(found["bytes"]), "bytes"]
    assert str(found["count"]) in total
    assert found["bytes"] == sum(length for _, length in extents)
    assert found["count"] == len(extents)
    return found


def sectors(found: dict[str, Any]) -> set[int]:
    return {
        sector
        for extent in found["extents"]
        for sector in range(extent["offset"] // SECTOR, (extent["offset"] + extent["length"]) // SECTOR)
    }


def test_a_diff_is_the_difference_of_the_images(rig: Rig) -> None:
    """Between snapshots, writes and the present, before and after syncs, however the moments are spelled."""
    rng = random.Random(1)
    rig.create(size=SIZE, content=rng.randbytes(MIB))
    rig.start()
    moments = {"seq:0": rig.live().read_bytes()}
    for number in range(3):
        for _ in range(20):
            pwrite(rig.tap(), rng.randbytes(rng.randint(1, 40_000)), rng.randrange(SIZE - 40_000))
        (rig.mnt / "snapshots" / f"s{number}").mkdir()
        moments[f"s{number}"] = rig.live().read_bytes()
        if number < 2:
            rig.dmafs("sync", rig.store)
    pwrite(rig.tap(), rng.randbytes(10_000), 5 * MIB + 77, sync=True)
    moments[spelled(moment())] = rig.live().read_bytes()
    names = list(moments)
    served = {}
    for a, b in zip(names, names[1:] + names[:1], strict=True):
        found = served[a, b] = diff(rig, a, b)
        assert sectors(found) == differing(moments[a], moments[b]), "random bytes: what was written differs"
    last = diff(rig, names[-1], "s2")
    assert last["extents"] == [{"offset": 5 * MIB, "length": 10_240}]
    assert diff(rig, "latest", "s2")["extents"] == []
    assert ask(rig, "0s ago", names[-1])["extents"] == []
    rig.stop()
    for (a, b), found in served.items():
        assert ask(rig, a, b) == found, "the same without a daemon"


def test_refused_moments(rig: Rig) -> None:
    """What isn't there is the error that read gives, with and without a daemon."""
    rig.create()
    rig.start()
    pwrite(rig.tap(), b"x", 0, sync=True)
    for served in (True, False):
        for arguments, code in (
            (("disk", "seq:0", "seq:2"), 21),
            (("disk", "no-such-name", "seq:0"), 21),
            (("disk", "1s ago~1000d", "seq:0"), 21),
            (("other", "seq:0", "seq:1"), 22),
            (("disk", "seq:0"), 2),
        ):
            refused = rig.dmafs("diff", rig.store, *arguments, code=code)
            assert refused.stdout == ""
            assert "error: " in refused.stderr
        assert ask(rig, "seq:0", "seq:1")["bytes"] == SECTOR
        if served:
            rig.stop()
