"""Claims about dmafs.service.devices and what asks it: mapped devices with and without a daemon."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import pytest
import trio

from dmafs.cli.main import main
from dmafs.core.limits import VolumeLimits
from dmafs.core.storage import RealStorage, open_source
from dmafs.core.store import Store, create_volume, open_volume
from dmafs.core.volume import Volume
from dmafs.errors import InputError, NoSuchVolumeError, SourceBusyError, TapBusyError, TapError
from dmafs.service.appliance import Appliance
from dmafs.service.checking import RESYNC, VERIFY
from dmafs.service.control import application
from dmafs.service.devices import local_tap, mapped_volumes
from dmafs.service.engine import Engine
from dmafs.service.exposition import Exposition
from dmafs.service.following import FollowingEngine
from dmafs.service.keeper import Keeper
from dmafs.service.passing import PassThroughEngine
from dmafs.taps.dm import DmTap
from dmafs.taps.passthrough import PassThroughTap
from dmafs.units import SECTOR
from tests.unit.rig import BOOT, SIZE
from tests.unit.target import Kernel
from tests.unit.test_engine import until
from tests.unit.tools import copy_all, fill

LOG = 16 << 20


def make_store(path: Path, kernel: Kernel) -> Path:
    """Make a store with a volume of each kind, copied: mapped, plain and past."""
    store, plain = path / "store", path / "plain"
    plain.write_bytes(bytes(SIZE * SECTOR))
    create_volume(store, "plain", source=plain, tap="fuse")
    for name, source, tap in (("mapped", kernel.source, "dm"), ("past", plain, "none")):
        (store / name).mkdir()
        Volume.create(RealStorage(store / name), name=name, size_sectors=SIZE, source=source, tap=tap, created_ns=1)
    for name in ("mapped", "plain", "past"):
        volume = open_volume(store / name)
        copy_all(volume, Path(volume.info.source))
        volume.mark_clean()
        volume.close()
    return store


@pytest.fixture
def store(tmp_path: Path, kernel: Kernel) -> Path:
    return make_store(tmp_path, kernel)


# -- without a daemon -------------------------------------------------------------------------------------------------


def test_a_device_comes_and_goes_without_a_daemon(store: Path, kernel: Kernel) -> None:
    """What is so already stays so; what was written meanwhile is in the journal."""
    volume = open_volume(store / "mapped")
    for _ in range(2):
        report = local_tap(volume, store / "mapped", "attach", log_bytes=LOG)
        assert (report["volume"], report["attached"], report["log_limit_bytes"]) == ("mapped", True, LOG)
    kernel.write(1, fill(1))
    assert not volume.pointers.now.clean
    for _ in range(2):
        report = local_tap(volume, store / "mapped", "detach", log_bytes=LOG)
        assert report == {"volume": "mapped", "device": "/dev/mapper/dmafs-mapped", "attached": False}
    assert local_tap(volume, store / "mapped", "status", log_bytes=LOG) == report
    assert bytes(volume.live.read(0, SIZE * SECTOR)) == kernel.disk
    volume.close()


def test_what_cannot_be_done_changes_nothing(store: Path, kernel: Kernel) -> None:
    """A source in use isn't attached, a device in use isn't detached."""
    volume = open_volume(store / "mapped")
    kernel.busy = True
    with pytest.raises(SourceBusyError):
        local_tap(volume, store / "mapped", "attach", log_bytes=LOG)
    assert volume.pointers.now.clean
    kernel.busy = False
    local_tap(volume, store / "mapped", "attach", log_bytes=LOG)
    assert kernel.device is not None
    kernel.device.users = 1
    with pytest.raises(TapBusyError):
        local_tap(volume, store / "mapped", "detach", log_bytes=LOG)
    assert volume.journal.gaps == []
    volume.close()


def test_which_volumes_have_devices(store: Path) -> None:
    """All that do, or the one that is named; a name that is none, and a volume without one, are different mistakes."""
    opened = Store(store)
    assert mapped_volumes(opened.volumes, None) == mapped_volumes(opened.volumes, "mapped") == ["mapped"]
    with pytest.raises(NoSuchVolumeError, match="there is no volume nope"):
        mapped_volumes(opened.volumes, "nope")
    with pytest.raises(InputError, match="volume plain has no mapped device"):
        mapped_volumes(opened.volumes, "plain")
    with pytest.raises(InputError, match="no volume of this store"):
        mapped_volumes({"plain": opened.volumes["plain"]}, None)
    opened.close()


def test_the_command_says_what_is(store: Path, kernel: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    """In lines for people, with users and what has gone wrong, or as JSON; exit statuses are those of the errors."""
    assert main(["tap", "attach", str(store)]) == 0
    log = store / "mapped" / "log" / f"{0:020d}.log"
    assert capsys.readouterr().out == (
        "volume mapped: /dev/mapper/dmafs-mapped is attached, nobody has it open\n"
        f"  log       {log}\n"
        "            512 B of 16 GiB, 0 entries, logging\n"
    )
    assert kernel.device is not None
    kernel.device.users, kernel.device.disabled = 1, True
    assert main(["tap", "status", str(store), "mapped"]) == 0
    told = capsys.readouterr().out
    assert "is attached, 1 user\n" in told
    assert "logging has stopped: a gap" in told
    kernel.device.users = 2
    assert main(["tap", "status", str(store)]) == 0
    assert "2 users" in capsys.readouterr().out
    kernel.device.disabled = False
    assert main(["tap", "detach", str(store)]) == 33
    kernel.device.users = 0
    assert main(["tap", "detach", "--json", str(store)]) == 0
    (report,) = json.loads(capsys.readouterr().out)["volumes"]
    assert report == {"volume": "mapped", "device": "/dev/mapper/dmafs-mapped", "attached": False}
    assert main(["tap", "status", str(store), "mapped"]) == 0
    assert capsys.readouterr().out == "volume mapped: /dev/mapper/dmafs-mapped is not attached\n"
    assert main(["tap", "status", str(store), "nope"]) == 22
    assert main(["tap", "status", str(store), "plain"]) == 3


def test_what_may_be_in_a_log_only_is_not_passed_over(
    store: Path, kernel: Kernel, capsys: pytest.CaptureFixture[str]
) -> None:
    """While there is a device, or its log wasn't read, nothing that needs the newest state works without a daemon."""
    assert main(["tap", "attach", str(store)]) == 0
    kernel.write(1, fill(1))
    for command in (["snapshot", "create", str(store), "s"], ["mark", str(store), "m"]):
        assert main(command) == 32
        assert "may be in its log only" in capsys.readouterr().err
    for what in ("verify", "resync"):
        assert main([what, str(store), "mapped"]) == 32
        assert "volume mapped may be in its log only" in capsys.readouterr().err
        assert main([what, str(store), "plain"]) == 0
    assert main(["tap", "detach", str(store)]) == 0
    for what in ("verify", "resync"):
        assert main([what, str(store), "mapped"]) == 0
    assert main(["snapshot", "create", str(store), "s"]) == 0


def test_an_imported_volume_has_nothing_to_be_compared_with(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its source is the log that it was made of; the error says so."""
    for what in ("verify", "resync"):
        assert main([what, str(store), "past"]) == 32
        assert "volume past was imported: it has no source to compare with" in capsys.readouterr().err


# -- with a daemon ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def appliance(store: Path, kernel: Kernel, nursery: trio.Nursery) -> AsyncIterator[Appliance]:
    """All three volumes, in a daemon."""
    opened = Store(store, limits=VolumeLimits(reserve_bytes=0))
    engines: dict[str, Engine] = {}
    limiter = trio.CapacityLimiter(8)
    for name, volume in opened.volumes.items():
        if name == "mapped":
            tap = DmTap(volume, store / name, log_bytes=LOG)
            engines[name] = FollowingEngine(volume, tap, tick_s=0.02, limiter=limiter)
        else:
            source = open_source(Path(volume.info.source), writable=True) if name == "plain" else volume.mirror.file
            engines[name] = PassThroughEngine(volume, PassThroughTap(volume, source), tick_s=0.02, limiter=limiter)
    ended = trio.Event()
    scope = trio.CancelScope()

    async def run(task_status: trio.TaskStatus[None]) -> None:
        with scope:
            async with trio.open_nursery() as tasks:
                for engine in engines.values():
                    await tasks.start(engine.run)
                task_status.started()
        ended.set()

    for engine in engines.values():
        await engine.recover(BOOT)
    await nursery.start(run)
    yield Appliance(opened, engines)
    scope.cancel()
    await ended.wait()
    for name in ("mapped", "plain"):
        await engines[name].close()
    opened.close()
    assert kernel.source.exists()


def number_of(appliance: Appliance, volume: str, seq: int) -> int:
    return int.from_bytes(bytes(appliance.image(volume, seq).read(0, 8)), "little")


@pytest.mark.parametrize("what", ["snapshot", "mark", "clone"])
async def test_one_instant_of_volumes_with_and_without_a_log(appliance: Appliance, kernel: Kernel, what: str) -> None:
    """What was complete on either volume before somebody asked is in it."""
    counter = 0
    done = False

    async def write() -> None:
        nonlocal counter
        while not done:
            number = counter + 1
            data = number.to_bytes(8, "little").ljust(SECTOR, b".")
            kernel.write(0, data)
            kernel.flush()
            await appliance.write_tap("plain", 0, data)
            counter = number
            await trio.sleep(0.004)

    take: dict[str, Callable[[str], Awaitable[None]]] = {
        "snapshot": appliance.take_snapshot,
        "mark": appliance.mark,
        "clone": lambda name: appliance.create_clone(name, None),
    }
    async with trio.open_nursery() as writers:
        writers.start_soon(write)
        for number in range(5):
            before = counter
            await take[what](f"n{number}")
            if what == "clone":
                seqs = {name: clone.seq for name, clone in appliance.clones(f"n{number}").items()}
            else:
                seqs = appliance.seqs_at(appliance.resolve(f"n{number}"))
            assert number_of(appliance, "mapped", seqs["mapped"]) >= before
            assert number_of(appliance, "plain", seqs["plain"]) >= before
        done = True


async def test_a_volume_that_cannot_settle_is_the_error(appliance: Appliance, kernel: Kernel) -> None:
    """What is wrong is said as it is, and none of the volumes has the snapshot, mark or clone."""
    assert kernel.device is not None
    kernel.device.fails = "can't be flushed"
    for call in (appliance.take_snapshot, appliance.mark, lambda name: appliance.create_clone(name, None)):
        with pytest.raises(TapError, match="can't be flushed"):
            await call("n")
    kernel.device.fails = ""
    assert (appliance.snapshot_ids(), appliance.clone_names(), appliance.landmarks()[1]) == ([], [], {})


async def test_a_gap_sets_an_alarm_until_it_has_ended(appliance: Appliance, kernel: Kernel) -> None:
    """The keeper clears it."""
    keeper, device = Keeper(appliance), kernel.device
    assert device is not None
    device.disabled = True
    await until(appliance.alarms.report)
    assert [(alarm["kind"], alarm["volume"]) for alarm in appliance.alarms.report()] == [("gap", "mapped")]
    await until(lambda: not device.disabled)
    engine = appliance._engines["mapped"]
    await until(lambda: engine.volume.journal.gaps and engine.volume.journal.gaps[-1].end is not None)
    await keeper.check()
    assert appliance.alarms.report() == []


async def test_the_route(appliance: Appliance, kernel: Kernel) -> None:
    """Actions and volumes are checked; what the device says comes back."""
    transport = httpx.ASGITransport(application(appliance, Exposition(appliance, {})))
    async with httpx.AsyncClient(transport=transport, base_url="http://dmafs") as client:
        for query, status, error in (
            ({}, 400, "InputError"),
            ({"action": "remove"}, 400, "InputError"),
            ({"action": "status", "volume": "nope"}, 404, "NoSuchVolumeError"),
            ({"action": "status", "volume": "plain"}, 400, "InputError"),
        ):
            answer = await client.post("/tap", params=query)
            assert (answer.status_code, answer.json()["error"]) == (status, error)
        assert kernel.device is not None
        kernel.device.users = 1
        answer = await client.post("/tap", params={"action": "detach"})
        assert answer.json()["error"] == "TapBusyError"
        kernel.device.users = 0
        for action, attached in (("status", True), ("detach", False), ("detach", False), ("attach", True)):
            answer = await client.post("/tap", params={"action": action, "volume": "mapped"})
            (report,) = answer.json()["volumes"]
            assert (answer.status_code, report["volume"], report["attached"]) == (200, "mapped", attached)
        for what in ("/verify", "/resync"):
            answer = await client.post(what, params={"volume": "past"})
            assert (answer.status_code, answer.json()["error"]) == (409, "TapError")
    for kind in (VERIFY, RESYNC):
        with pytest.raises(TapError, match="was imported"):
            appliance.begin_check(kind, "past", None)
