"""Claims about dmafs.service.reloading: what can change does, the rest is told, and a bad file changes nothing."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import trio

from dmafs.core.storage import open_source
from dmafs.core.store import Store, create_volume
from dmafs.service.appliance import Appliance
from dmafs.service.configuration import (
    ADDRESS,
    COMMAND,
    DURATION,
    FLAG,
    FULL,
    NUMBER,
    PATTERNS,
    SECONDS,
    SHARE,
    SIZE,
    SPACE,
    TIMES,
    Configuration,
    Kind,
    StoreTable,
)
from dmafs.service.engine import Engine
from dmafs.service.loading import load, setting_keys
from dmafs.service.machine import choose_machine_file
from dmafs.service.passing import PassThroughEngine
from dmafs.service.reloading import LIVE, OF_THE_MACHINE, RESTART, Reloading
from dmafs.service.scheduler import Scheduler
from dmafs.service.tapping import adjust_engine
from dmafs.service.watching import Watch
from dmafs.taps.follower import LogTap
from dmafs.taps.passthrough import PassThroughTap

OTHER: Mapping[Kind, str] = {
    SIZE: '"32MiB"',
    NUMBER: "5000",
    SECONDS: "7.5",
    FLAG: "true",
    DURATION: '"13h"',
    SHARE: '"3%"',
    SPACE: '"1GiB"',
    TIMES: '["03:00"]',
    PATTERNS: '["x"]',
    FULL: '"gap"',
    COMMAND: '["true"]',
    ADDRESS: '"127.0.0.1:9110"',
}
"""For each kind a value that no key has as its default."""


@dataclass
class Bench:
    """A store with one volume, all that a daemon has of it but the tree, and what it has been told."""

    store: Path
    appliance: Appliance
    engine: PassThroughEngine
    scheduler: Scheduler
    watch: Watch
    reloading: Reloading

    def in_effect(self) -> list[Any]:
        """Return all that the configuration decides while the daemon runs."""
        return [
            self.scheduler._policy,
            self.scheduler._schedule,
            self.appliance.rules,
            self.engine.tick_s,
            self.engine.goes_on,
            self.engine.checking.bytes_per_s,
            self.engine.volume.clones.allowance.quota,
            self.watch._table,
            self.watch._teller._command,
            self.watch._teller._timeout_s,
        ]

    async def reload(self, text: str) -> None:
        """Load what the file says now."""
        (self.store / "dmafs.conf").write_text(text)
        with trio.move_on_after(5) as scope:
            async with trio.open_nursery() as nursery:
                engines: Mapping[str, Engine] = {"disk": self.engine}
                nursery.start_soon(self.reloading.run, self.appliance, engines, self.scheduler, self.watch)
                before = self.told()
                self.reloading.want()
                while self.told() == before:  # noqa: ASYNC110 - what is waited for has no event
                    await trio.sleep(0.005)
                nursery.cancel_scope.cancel()
        assert not scope.cancelled_caught

    def told(self) -> tuple[str, list[Any]]:
        report = self.reloading.report()
        return report["loaded"], self.appliance.alarms.report()

    def alarms(self) -> list[str]:
        return [alarm["message"] for alarm in self.appliance.alarms.report()]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    source = tmp_path / "disk.raw"
    source.write_bytes(bytes(1 << 16))
    path = tmp_path / "store"
    create_volume(path, "disk", source=source, tap="fuse")
    store = Store(path)
    loaded = load(path)
    volume = store.volumes["disk"]
    tap = PassThroughTap(volume, open_source(source, writable=True))
    engine = PassThroughEngine(volume, tap, tick_s=1, limiter=trio.CapacityLimiter(4))
    adjust_engine(engine, loaded.configuration)
    appliance = Appliance(store, {"disk": engine}, rules=loaded.configuration.retention.rules(path))
    scheduler = Scheduler(
        {"disk": engine},
        appliance,
        loaded.configuration.sync.policy(),
        loaded.configuration.snapshots.schedule(),
        environment={},
    )
    watch = Watch(appliance, {"disk": engine}, loaded.configuration.alarms, {})
    yield Bench(path, appliance, engine, scheduler, watch, Reloading(path, loaded))
    await engine.close()
    store.close()
    choose_machine_file(None)


def set_otherwise(key: tuple[str, ...]) -> str:
    """Return a file that sets one key, and nothing else than that, to another value than its default."""
    kind: Any = Configuration
    for name in key[:-1]:
        kind = next(entry for entry in fields(kind) if entry.name == name).metadata["table"]
    entry = next(entry for entry in fields(kind) if entry.name == key[-1])
    value = "false" if entry.metadata["default"] is True else OTHER[entry.metadata["kind"]]
    header = "".join(f"[{name}]\n" for name in key[:-1])
    return f"{header}{key[-1]} = {value}\n"


def test_of_every_key_it_is_said_whether_it_is_live() -> None:
    """A new key has to be put into one of the lists, and only one."""
    assert sorted(LIVE + RESTART) == sorted(entry.name for entry in fields(Configuration))
    of_stores = {entry.name for entry in fields(StoreTable)} - {entry.name for entry in fields(Configuration)}
    assert {*OF_THE_MACHINE, "path"} == of_stores  # another path is another store


@pytest.mark.parametrize("key", setting_keys(), ids=".".join)
async def test_each_key_is_live_or_told_of(
    bench: Bench, key: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """A live one changes what is in effect; any other doesn't, but is in the log and the report until it is back."""
    before = bench.in_effect()
    await bench.reload(set_otherwise(key))
    name, report = ".".join(key), bench.reloading.report()
    setting = report["settings"][name]
    if key[0] in LIVE:
        assert bench.in_effect() != before
        assert setting["origin"] == f"{bench.store}/dmafs.conf:{len(key)}"
        assert (report["after_restart"], "after_restart" in setting) == ([], False)
        assert not [
            record for record in caplog.records if "restart" in record.message and "hooks" not in record.message
        ]
    else:
        assert bench.in_effect() == before
        assert (setting["origin"], report["after_restart"]) == ("default", [name])
        assert setting["after_restart"] != setting["value"]
        assert f"needs a restart of the daemon: {name}" in caplog.text
    await bench.reload("")
    assert bench.in_effect() == before
    assert bench.reloading.report()["after_restart"] == []


async def test_a_bad_file_changes_nothing(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Not even what is right in it; an alarm tells of it, each time, until a good one is loaded."""
    await bench.reload('tick_s = 3\n[sync]\nage = "5h"\nexact = 0\n')
    before, loaded = bench.in_effect(), bench.reloading.report()["loaded"]
    for text, problem in (("tick_s = 2\nticks = 2", ":2: unknown key ticks"), ("tick_s = ", ":1: no TOML: Invalid")):
        await bench.reload(text)
        assert bench.in_effect() == before
        [alarm] = bench.alarms()
        assert f"{bench.store}/dmafs.conf{problem}" in alarm
        assert alarm.endswith("as it was stays in effect")
        assert caplog.records[-1].levelno == logging.ERROR
        report = bench.reloading.report()
        assert (report["loaded"], report["settings"]["tick_s"]["value"]) == (loaded, 3)
        assert problem in report["problem"]
    await bench.reload("tick_s = 2")
    assert bench.alarms() == []
    assert bench.reloading.report()["problem"] == ""
    assert bench.engine.tick_s == 2


async def test_the_files_may_change_places(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A store can be moved into the machine's file while it is served; both at once are refused."""
    caplog.set_level(logging.INFO)
    machine = bench.store.parent / "machine.toml"
    machine.write_text(f'[[store]]\npath = "{bench.store}"\ntick_s = 4\n[store.retention]\ndaily = 3\n')
    choose_machine_file(machine)
    await bench.reload("tick_s = 3")
    assert f"and there is {bench.store}/dmafs.conf" in bench.alarms()[0]
    assert bench.engine.tick_s == 1
    (bench.store / "dmafs.conf").unlink()
    bench.store.joinpath("dmafs.conf").symlink_to(bench.store / "none")  # a link that leads nowhere counts, too
    bench.reloading.want()
    (bench.store / "dmafs.conf").unlink()
    async with trio.open_nursery() as nursery:
        engines: Mapping[str, Engine] = {"disk": bench.engine}
        nursery.start_soon(bench.reloading.run, bench.appliance, engines, bench.scheduler, bench.watch)
        with trio.fail_after(5):
            while bench.alarms():  # noqa: ASYNC110 - what is waited for has no event
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()
    assert (bench.engine.tick_s, bench.appliance.rules.daily) == (4, 3)
    assert f"configuration {machine} loaded again; changed: tick_s, retention.daily" in caplog.text


async def test_first_hooks_may_lack_rights(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A daemon that was started without any has given up what becoming another user takes."""
    await bench.reload('[snapshots]\nbefore = ["runuser"]')
    assert "hooks that become another user need a restart" in caplog.text


async def test_a_followed_log_settles_within_another_tick(tmp_path: Path) -> None:
    """What is set for an engine is set for its tap, too."""
    source, log = tmp_path / "disk.raw", tmp_path / "disk.log"
    source.write_bytes(bytes(1 << 16))
    log.write_bytes(b"")
    create_volume(tmp_path / "store", "disk", source=source, tap="log", log_path=log)
    store = Store(tmp_path / "store")
    tap = LogTap(store.volumes["disk"], open_source(source, writable=False))
    engine = Engine(store.volumes["disk"], tap, tick_s=1, limiter=trio.CapacityLimiter(1))
    adjust_engine(engine, Configuration(tick_s=0.25))
    assert (engine.tick_s, tap.settle_s) == (0.25, 0.25)
    tap.close()
    store.close()
