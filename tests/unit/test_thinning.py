"""Claims about dmafs.service.thinning: the table of the configuration, and what is dropped in which order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmafs.core.moments import snapshot_groups
from dmafs.core.retention import KeepRules
from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import InputError
from dmafs.service.loading import load_configuration
from dmafs.service.thinning import Drops, Shrinking, Thinning, held_of
from tests.unit.tools import Ticking, copied_volume, fill

NONE = KeepRules(within_s=0, hourly=0, daily=0, weekly=0, monthly=0, yearly=0, minimum=0, named=False)


def rules_of(path: Path, text: str) -> KeepRules:
    (path / "dmafs.conf").write_text(text)
    return load_configuration(path).retention.rules(path)


# -- configuration --------------------------------------------------------------------------------------------------


def test_no_table_and_an_empty_one_are_the_defaults(tmp_path: Path) -> None:
    """All keys are optional."""
    assert load_configuration(tmp_path).retention.rules(tmp_path) == rules_of(tmp_path, "") == KeepRules()
    assert rules_of(tmp_path, "[retention]\n") == KeepRules()


def test_all_keys(tmp_path: Path) -> None:
    """Each key sets its rule, beside the keys of other tables."""
    found = rules_of(
        tmp_path,
        'reserve = "1GiB"\n[retention]\nwithin = "1h30min"\nhourly = 1\ndaily = 2\nweekly = 3\nmonthly = 4\n'
        'yearly = 5\nminimum = 0\nnamed = false\nquota = "500GiB"\n',
    )
    assert found == KeepRules(5400.0, 1, 2, 3, 4, 5, 0, named=False, quota=500 << 30)
    assert load_configuration(tmp_path).reserve == 1 << 30


def test_a_quota_may_be_a_share_of_the_file_system(tmp_path: Path) -> None:
    """Percents are of the store's file system as a whole."""
    info = os.statvfs(tmp_path)
    total = info.f_blocks * info.f_frsize
    assert rules_of(tmp_path, '[retention]\nquota = "20%"').quota == int(total * 0.2)
    assert rules_of(tmp_path, '[retention]\nquota = "0.5%"').quota == int(total * 0.005)
    assert rules_of(tmp_path, "[retention]\nquota = 4096").quota == 4096


@pytest.mark.parametrize(
    "text",
    [
        "retention = 1",
        "[[retention]]\ndaily = 1",
        "[retention]\nwithin_s = 1",
        "[retention]\nhour = 1",
        "[retention]\nwithin = 86400",
        '[retention]\nwithin = "1m"',
        '[retention]\nwithin = ""',
        pytest.param(f'[retention]\nwithin = "{"9" * 5000}h"', id="many digits"),
        '[retention]\nwithin = "99999999999h"',
        "[retention]\ndaily = -1",
        "[retention]\ndaily = 1.0",
        "[retention]\ndaily = true",
        '[retention]\ndaily = "1"',
        "[retention]\nnamed = 1",
        "[retention]\nquota = -1",
        '[retention]\nquota = "100%"',
        '[retention]\nquota = "101%"',
        '[retention]\nquota = "1GB"',
    ],
)
def test_what_is_not_right_is_refused(tmp_path: Path, text: str) -> None:
    """Unknown keys, wrong types and values out of range are errors that name file and key."""
    with pytest.raises(InputError) as caught:
        rules_of(tmp_path, text)
    assert str(tmp_path) in caught.value.message
    assert "retention" in caught.value.message
    assert caught.value.hint


# -- thinning and shrinking -----------------------------------------------------------------------------------------


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    """A volume with five snapshots; those named a to e hold 2, 3, 4, 5 and 0 sectors of their own."""
    volume = copied_volume(tmp_path / "disk", fill(1, 64))
    for number, name in enumerate("abcde"):
        run(volume.take_snapshot(name=name))
        if name != "e":
            volume.write(8 * number, fill(number + 2, number + 2))
            run(volume.flush())
            run(sync(volume, open_snapshot=False))
    yield volume
    volume.close()


def names(volume: Volume) -> list[str]:
    return [snapshot.name for snapshot in volume.snapshots]


def drop(volume: Volume, thinning: Iterator[Drops]) -> list[list[str]]:
    """Do what a thinning or shrinking asks for; return the names that it asked to drop, step by step."""
    found = []
    for drops in thinning:
        [(name, snapshots)] = drops.items()
        assert name == "disk"
        found.append([snapshot.name for snapshot in snapshots])
        for snapshot in snapshots:
            run(volume.drop_snapshot(snapshot))
            for segment in volume.take_garbage():
                segment.close()
    return found


def test_a_quota_is_kept_by_going_on_until_nothing_more_is_to_go(volume: Volume) -> None:
    """What merges move to a pinned snapshot counts: a second round drops what the first thought it could keep."""
    volumes = {"disk": volume}
    held = held_of(volumes, snapshot_groups(volumes))
    assert [held[name] // 512 for name in "abcde"] == [2, 3, 4, 5, 0]
    run(volume.pin(next(iter(volume.snapshots))))
    rules = KeepRules(within_s=10**6, minimum=0, named=False, quota=sum(held.values()) - 1)
    thinning = Thinning(volumes, rules)
    before = thinning.report(dry_run=True)
    assert [one["id"] for one in before["snapshots"] if not one["kept"]] == ["b"]
    assert drop(volume, thinning.rounds()) == [["b"], ["c"], ["d"]]
    report = thinning.report(dry_run=False)
    assert [(one["id"], one["kept"]) for one in report["snapshots"]] == [(name, name in "ae") for name in "abcde"]
    assert names(volume) == ["a", "e"]
    assert list(Thinning(volumes, rules).rounds()) == []


def test_what_is_pinned_between_plan_and_drop_is_told_as_kept(volume: Volume) -> None:
    """The report says what became of each snapshot, not what was planned."""
    thinning = Thinning({"disk": volume}, NONE)
    rounds = thinning.rounds()
    drops = next(rounds)
    run(volume.pin(drops["disk"][2]))
    for number in (0, 1, 3, 4):
        run(volume.drop_snapshot(drops["disk"][number]))
    assert list(rounds) == []
    report = thinning.report(dry_run=False)
    assert [(one["id"], one["reasons"]) for one in report["snapshots"] if one["kept"]] == [("c", ["pinned"])]
    assert [one["id"] for one in report["snapshots"]] == list("abcde")


def test_shrinking_frees_what_is_missing_from_the_oldest(volume: Volume) -> None:
    """It stops as soon as enough is freed, and at the floor."""
    held = held_of({"disk": volume}, snapshot_groups({"disk": volume}))
    shrinking = Shrinking({"disk": volume}, NONE, held["a"] + 1)
    assert drop(volume, shrinking.steps(spare=10**9)) == [["a", "b"]]
    assert (shrinking.dropped, shrinking.missing) == (2, 1 - held["b"])
    shrinking = Shrinking({"disk": volume}, KeepRules(named=False, minimum=2), 10**9)
    assert drop(volume, shrinking.steps(spare=10**9)) == [["c"]]
    assert shrinking.missing == 10**9 - held["c"]
    assert names(volume) == ["d", "e"]


def test_shrinking_passes_over_what_frees_nothing(volume: Volume) -> None:
    """A held image, a merge that has to copy everything, and one that would need more space than there is, stay."""
    snapshots = list(volume.snapshots)
    image = volume.image(snapshots[1].seq)
    image.pins += 1
    run(volume.pin(snapshots[0]))
    shrinking = Shrinking({"disk": volume}, NONE, 10**9)
    assert drop(volume, shrinking.steps(spare=10**9)) == []
    assert names(volume) == list("abcde")
    run(volume.unpin(snapshots[0]))
    assert drop(volume, Shrinking({"disk": volume}, NONE, 10**9).steps(spare=100)) == [["a"]]
    image.pins -= 1
    assert drop(volume, Shrinking({"disk": volume}, NONE, 10**9).steps(spare=0)) == [["b", "c", "d"]]


def test_a_run_is_dropped_for_what_it_frees_as_a_whole(volume: Volume) -> None:
    """Snapshots that free nothing alone go together with the one that shares their data, if there is space for that."""
    run(volume.pin(next(iter(volume.snapshots))))
    for number in (1, 2, 3):  # what b, c and d hold, once more
        run(volume.take_snapshot(name=f"{number}"))
        volume.write(8 * number, fill(99, number + 2))
        run(volume.flush())
        run(sync(volume, open_snapshot=False))
    assert drop(volume, Shrinking({"disk": volume}, NONE, 1).steps(spare=512)) == []
    assert names(volume) == list("abcde123")
    assert drop(volume, Shrinking({"disk": volume}, NONE, 1).steps(spare=10**6)) == [list("bcde1")]
    assert names(volume) == list("a23")


def test_time_stands_still_in_one_thinning(volume: Volume) -> None:
    """All rounds judge by the time of the first."""
    clock = volume.clock
    assert isinstance(clock, Ticking)
    thinning = Thinning({"disk": volume}, KeepRules(within_s=1, minimum=0, named=False, hourly=0, daily=0))
    clock.now += 3600 * 10**9
    assert list(thinning.rounds()) == []
