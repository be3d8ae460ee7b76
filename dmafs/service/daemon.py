"""The daemon: the composition root. Opens the store, mounts the tree, runs engines and control interface.

Order of starting: configuration, volumes that it names and that aren't there, lock and recovery, privileges dropped,
checks, redo onto the primaries, engines, control socket, mount, scheduler and keeper. Order of ending, on SIGTERM,
SIGINT or an unmount from outside: scheduler and keeper, unmount, control socket, tasks of engines, flush, clean mark,
unlock. SIGHUP has the configuration loaded again; a daemon that has a terminal ends then, too, since that is gone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import pyfuse3
import trio

from dmafs.core.names import SOCKET_NAME
from dmafs.core.resync import needs_resync
from dmafs.core.storage import boot_id
from dmafs.core.store import Store, is_inside, require_apart
from dmafs.errors import MountError, PlacementError
from dmafs.service.appliance import Appliance
from dmafs.service.control import serve_control
from dmafs.service.datasyncs import Datasyncs
from dmafs.service.engine import Engine
from dmafs.service.exposition import Exposition
from dmafs.service.keeper import Keeper
from dmafs.service.logs import name_store
from dmafs.service.making import find, make_missing
from dmafs.service.memory import share_arena
from dmafs.service.mounting import abort, mount_source, prepare_mount_point, tune
from dmafs.service.privileges import drop_privileges, needed
from dmafs.service.progress import show_progress
from dmafs.service.reloading import Reloading
from dmafs.service.report import summary_of
from dmafs.service.scheduler import Scheduler
from dmafs.service.scraping import serve_metrics
from dmafs.service.supervision import Listener, Manager, look_up, supervise
from dmafs.service.tapping import open_engine
from dmafs.service.watching import Watch
from dmafs.tree import requests
from dmafs.tree.around import ReadAround
from dmafs.tree.operations import Tree

log = logging.getLogger(__name__)

FUSE_TASKS: Final = 32
"""Requests of the tree handled at once; more wait in the kernel."""
GRACE_S: Final = 5.0
"""How long requests that are under way may take when the daemon ends."""


def serve(store_path: Path | None, mount_point: Path | None, manager: Listener | None = None) -> None:
    """Serve a store at a mount point until SIGTERM, SIGINT or unmounting; what isn't given is in the machine's file.

    *manager* hears how it goes; without it the one that the environment tells of, if it does.
    """
    share_arena()
    faulthandler.enable(2)  # a watchdog's SIGABRT tells where it hangs
    told = Manager.of(os.environ, os.getpid())  # taken out of the environment in any case
    store_path, mount_point, loaded = find(store_path, mount_point)
    name_store(store_path)
    mount_point = mount_point.resolve()  # by lstat: a dead mount there does no harm
    configuration = loaded.configuration
    make_missing(loaded)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each segment of a journal is two open files
    store = Store(store_path, limits=configuration.volume_limits())
    try:
        taps = {volume.info.tap for volume in store.volumes.values()}
        drop_privileges(needed(taps, hooks=configuration.has_hooks))
        prepare_mount_point(store.path, mount_point)
        _check_sources(store, mount_point)
        trio.run(_run, store, mount_point, Reloading(store.path, loaded), manager or told)
    finally:
        store.close()


def _check_sources(store: Store, mount_point: Path) -> None:
    """Refuse sources that are on the store or below the mount point."""
    for volume in store.volumes.values():
        source = Path(volume.info.source)
        if is_inside(source, mount_point):
            raise PlacementError(
                f"source {source} is below the mount point {mount_point}", hint="give another mount point"
            )
        require_apart(store.path, source)


async def _run(store: Store, mount_point: Path, reloading: Reloading, manager: Listener | None) -> None:
    configuration = reloading.started
    limiter = trio.CapacityLimiter(configuration.threads)
    engines = {}
    with contextlib.ExitStack() as opened:
        for name, volume in store.volumes.items():
            engines[name] = engine = open_engine(volume, store.path / name, configuration, limiter)
            engine.datasyncs = Datasyncs.open()
            if engine.datasyncs is not None:
                opened.callback(engine.datasyncs.close)
        await _serve_engines(store, engines, mount_point, reloading, manager)


async def _serve_engines(
    store: Store, engines: dict[str, Engine], mount_point: Path, reloading: Reloading, manager: Listener | None
) -> None:
    """Recover the engines, serve them, and close them."""
    hung_up = None if _ends_on_hang_up() else reloading.want
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            ending = Ending(nursery.cancel_scope.cancel, manager, hung_up)
            nursery.start_soon(ending.watch, signals)
            try:
                for name, engine in engines.items():
                    await _recover(name, engine)
                await _serve_mount(store, engines, mount_point, ending, reloading)
            finally:
                for engine in engines.values():
                    await engine.close()
            nursery.cancel_scope.cancel()


def _ends_on_hang_up() -> bool:
    """Say whether SIGHUP tells that the terminal is gone: there is one, and the daemon wasn't started to outlive it."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


class Ending:
    """How the daemon is asked to end: once; what that does depends on how far it is. Later signals change nothing."""

    def __init__(
        self, act: Callable[[], object], manager: Listener | None, hung_up: Callable[[], object] | None
    ) -> None:
        """Tell *manager* and do *act* at the first signal; at SIGHUP *hung_up* if there is one, each time."""
        self.act = act
        self.manager = manager
        self._hung_up = hung_up

    async def watch(self, signals: AsyncIterator[int]) -> None:
        """Take all signals until cancelled."""
        asked = False
        async for number in signals:
            if number == signal.SIGHUP and self._hung_up is not None:
                self._hung_up()
                continue
            log.info("ending on %s", signal.Signals(number).name)
            if not asked:
                if self.manager is not None:
                    self.manager.tell("STOPPING=1", "STATUS=ending")
                self.act()
            asked = True


async def _recover(name: str, engine: Engine) -> None:
    redone = await engine.recover(boot_id())
    if redone:
        log.warning("volume %s: not closed in order; %d events written to its source again", name, redone)
    if needs_resync(engine.volume):
        log.warning("volume %s: a gap is open; it lasts until the resync ends", name)


async def _serve_questions(
    appliance: Appliance,
    engines: dict[str, Engine],
    path: Path,
    address: tuple[str, int],
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    """Serve the control interface, and the metrics at their own address if there is one."""
    exposition = Exposition(appliance, engines)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, appliance, path, exposition)
        if address[1]:
            await nursery.start(serve_metrics, exposition, address)
        task_status.started()


async def _serve_mount(
    store: Store, engines: dict[str, Engine], mount_point: Path, ending: Ending, reloading: Reloading
) -> None:
    """Run the engines, the control interface and the mount until the mount ends."""
    configuration = reloading.started
    options = {"default_permissions", f"fsname={mount_source(store.path)}", "subtype=dmafs", "auto_unmount"}
    if configuration.allow_other:
        options.add("allow_other")
    appliance = Appliance(store, engines, rules=configuration.retention.rules(store.path))
    environment = {
        "DMAFS_STORE": str(store.path),
        "DMAFS_VOLUMES": " ".join(engines),
        "DMAFS_MOUNT": str(mount_point),
    }
    policy, schedule = configuration.sync.policy(), configuration.snapshots.schedule()
    scheduler = Scheduler(engines, appliance, policy, schedule, environment=environment)
    watch = Watch(appliance, engines, configuration.alarms, environment)
    appliance.schedule, appliance.configured = scheduler.report, reloading.report
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        for engine in engines.values():
            await nursery.start(engine.run)
        await nursery.start(
            _serve_questions, appliance, engines, store.path / SOCKET_NAME, configuration.metrics.listen
        )
        try:
            tree = Tree(appliance, appliance.started_ns)
            requests.install(tree.around.step)
            pyfuse3.init(tree, str(mount_point), options)
        except RuntimeError as error:
            raise MountError(
                f"mount point {mount_point} can't be mounted on: {error}", hint="is fuse3 installed, and /dev/fuse?"
            ) from error
        try:
            scheduled, mounted = trio.CancelScope(), trio.CancelScope()
            ending.act = scheduled.cancel
            tasks: list[Callable[[], Awaitable[None]]] = [scheduler.run, Keeper(appliance).run]
            if ending.manager is not None:
                told = partial(summary_of, store.volumes)
                tasks.append(partial(supervise, ending.manager, partial(look_up, mount_point), told))
            nursery.start_soon(_run_until, scheduled, tasks, tree.around, mounted)
            nursery.start_soon(trio.to_thread.run_sync, tune, mount_point)
            nursery.start_soon(show_progress, engines)
            nursery.start_soon(reloading.run, appliance, engines, scheduler, watch)
            if ending.manager is None or not ending.manager.quiet:
                with contextlib.suppress(OSError):  # the terminal may be gone already
                    print(f"dmafs: serving {store.path} at {mount_point}", file=sys.stderr, flush=True)  # noqa: T201
            nursery.start_soon(tree.around.run)
            try:
                with mounted:
                    await pyfuse3.main(min_tasks=1, max_tasks=FUSE_TASKS)
            except BaseException:
                abort(mount_point)
                raise
            finally:  # the session must not end before
                with trio.CancelScope(shield=True):
                    await tree.around.close()
        finally:
            pyfuse3.close(unmount=True)
        nursery.cancel_scope.cancel()


async def _run_until(
    asked: trio.CancelScope,
    tasks: Sequence[Callable[[], Awaitable[None]]],
    around: ReadAround,
    mounted: trio.CancelScope,
) -> None:
    """Run scheduler, keeper and what else needs the tree until the daemon is *asked* to end, and end the mount then.

    In this order, since a hook that thaws a filesystem writes to the disk behind it, which is in the mount. Requests
    that are under way are answered, but for those that wait for something long, such as room in a full store.
    """
    with asked:
        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(task)
    await around.close()
    mounted.deadline = trio.current_time() + GRACE_S
    pyfuse3.terminate()
