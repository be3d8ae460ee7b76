"""The metrics of a daemon: a table of what there is, and its collector for the library that writes Prometheus' text.

All is read from the state when somebody asks; what isn't state is counted where it happens (``core.statistics``), and
begins at 0 with the daemon. Names follow Prometheus' rules: base units, ``_total`` for what only grows. Only the daemon
imports this module, and only when it is asked (``exposition``).
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from itertools import accumulate
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from dmafs.core.points import oldest_point
from dmafs.core.resync import needs_resync
from dmafs.core.statistics import Durations
from dmafs.core.volume import Volume
from dmafs.service.alarms import OF_STORE, OF_VOLUMES
from dmafs.service.appliance import Appliance
from dmafs.service.engine import Engine
from dmafs.units import SECTOR

Value = float | int | None | Mapping[str, float | int]


class Figure(NamedTuple):
    """A metric of each volume; one with a *label* has a value for each of the label's values. None is left out."""

    name: str
    text: str
    value: Callable[[Engine], Value]
    label: str = ""


class Classes(NamedTuple):
    """A histogram of each volume."""

    name: str
    text: str
    value: Callable[[Engine], Durations]


def _history_s(volume: Volume) -> float | None:
    """Return how far the newest recoverable moment is from the oldest: now, or where a gap that lasts has begun."""
    if not volume.pointers.now.copied:
        return None
    newest = volume.journal.gaps[-1].begin_time_ns if needs_resync(volume) else volume.clock()
    return max(0, newest - oldest_point(volume).time_ns) / 1e9


def _copied(engine: Engine) -> float:
    return 1.0 if engine.volume.pointers.now.copied else engine.progress.fraction


def _checked(engine: Engine) -> Mapping[str, float]:
    check = engine.checking.current
    return {check.kind: check.progress.fraction} if check else {}


def _damaged_places(engine: Engine) -> int | None:
    found = engine.checking.last_scrub
    return found.left if found else None


FIGURES: Final = (
    Figure("dmafs_volume_size_bytes", "Size of the volume.", lambda one: one.volume.info.size_sectors * SECTOR),
    Figure(
        "dmafs_capture_lag_seconds",
        "Age of the oldest write that isn't durable in the journal, as far as that is known; 0 if all are.",
        lambda one: one.lag_s,
    ),
    Figure(
        "dmafs_captured_events_total",
        "Events journaled: writes (data), and discards and zeros (zero).",
        lambda one: {"data": one.volume.statistics.data.events, "zero": one.volume.statistics.zeros.events},
        "kind",
    ),
    Figure(
        "dmafs_captured_bytes_total",
        "Bytes of the volume that these events wrote, discarded or zeroed.",
        lambda one: {
            "data": one.volume.statistics.data.sectors * SECTOR,
            "zero": one.volume.statistics.zeros.sectors * SECTOR,
        },
        "kind",
    ),
    Figure(
        "dmafs_forward_journal_bytes",
        "Data in the segments of the forward journal.",
        lambda one: one.volume.journal.data_bytes(),
    ),
    Figure(
        "dmafs_forward_journal_events",
        "Events in the forward journal since the mirror.",
        lambda one: one.volume.journal.head - one.volume.pointers.now.mirror_seq,
    ),
    Figure(
        "dmafs_forward_journal_segments",
        "Segments of the forward journal.",
        lambda one: len(one.volume.journal.parts),
    ),
    Figure(
        "dmafs_backward_journal_bytes",
        "Data and descriptors that snapshots hold.",
        lambda one: sum(one.volume.snapshots.held_bytes(each) for each in one.volume.snapshots),
    ),
    Figure(
        "dmafs_history_seconds",
        "From the oldest to the newest moment that can be had.",
        lambda one: _history_s(one.volume),
    ),
    Figure("dmafs_snapshots", "Snapshots.", lambda one: len(one.volume.snapshots)),
    Figure(
        "dmafs_open_images",
        "Moments of the past that somebody has open.",
        lambda one: sum(1 for image in one.volume.images() if image.pins),
    ),
    Figure("dmafs_clones", "Writable clones.", lambda one: sum(1 for _ in one.volume.clones)),
    Figure(
        "dmafs_reads_total",
        "Reads of images by how they were answered, read-ahead included: at once, or by a thread that waits.",
        lambda one: {
            "at_once": one.volume.statistics.at_once.count,
            "by_thread": one.volume.statistics.by_thread.count,
        },
        "answered",
    ),
    Figure(
        "dmafs_read_bytes_total",
        "Bytes of these reads.",
        lambda one: {
            "at_once": one.volume.statistics.at_once.bytes,
            "by_thread": one.volume.statistics.by_thread.bytes,
        },
        "answered",
    ),
    Figure(
        "dmafs_checksum_failures_total",
        "Reads that failed since a checksum was wrong: I/O errors.",
        lambda one: one.volume.statistics.damaged_reads,
    ),
    Figure(
        "dmafs_damaged_places",
        "Places that the last scrub found damaged and couldn't repair.",
        _damaged_places,
    ),
    Figure(
        "dmafs_flushes_total", "Times that somebody asked for all writes to be made durable.", lambda one: one.flushes
    ),
    Figure("dmafs_commits_total", "Times that there was something to make durable then.", lambda one: one.commits),
    Figure("dmafs_gaps_total", "Gaps that have begun.", lambda one: one.volume.journal.gaps_begun),
    Figure("dmafs_gap", "1 while a gap lasts.", lambda one: int(needs_resync(one.volume))),
    Figure("dmafs_read_only", "1 if the volume takes no more writes.", lambda one: int(bool(one.volume.failure))),
    Figure("dmafs_copy_progress_ratio", "How much of the initial copy is done.", _copied),
    Figure(
        "dmafs_check_progress_ratio",
        "How much of a verify, resync or scrub that is under way is done.",
        _checked,
        "kind",
    ),
)
HISTOGRAMS: Final = (
    Classes(
        "dmafs_read_duration_seconds",
        "Reads of images, clones and taps through the tree that the kernel asked for, by how long they took.",
        lambda one: one.volume.statistics.read_durations,
    ),
    Classes(
        "dmafs_sync_duration_seconds",
        "Syncs that have ended, by how long they took.",
        lambda one: one.volume.statistics.sync_durations,
    ),
)


class StateCollector(Collector):
    """Reads the state of a daemon when it is asked."""

    def __init__(self, appliance: Appliance, engines: Mapping[str, Engine]) -> None:
        """Tell of *appliance* and its *engines*."""
        self._appliance = appliance
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        self._appliance.look()
        yield from self._of_the_daemon()
        yield from self._alarms()
        for figure in FIGURES:
            yield self._family(figure)
        for classes in HISTOGRAMS:
            yield self._histogram(classes)

    def _of_the_daemon(self) -> Iterator[Metric]:
        labels = {"version": version("dmafs"), "python": platform.python_version()}
        build = GaugeMetricFamily("dmafs_build_info", "Always 1; the labels say what runs.", labels=[*labels])
        build.add_metric([*labels.values()], 1)
        yield build
        begun = self._appliance.started_ns / 1e9
        yield GaugeMetricFamily("dmafs_start_time_seconds", "When the daemon began, as a Unix time.", value=begun)
        space = self._appliance.space()
        text = "Space of the store's file system that the daemon can still take."
        yield GaugeMetricFamily("dmafs_store_free_bytes", text, value=space.available)
        yield GaugeMetricFamily("dmafs_store_size_bytes", "Size of the store's file system.", value=space.total)

    def _alarms(self) -> Iterator[Metric]:
        alarms = self._appliance.alarms
        lasting = GaugeMetricFamily(
            "dmafs_alarm", "1 while an alarm lasts; the store's own have an empty volume.", labels=["kind", "volume"]
        )
        known = [(kind, name) for kind in OF_VOLUMES for name in self._engines] + [(kind, "") for kind in OF_STORE]
        for kind, name in known:
            lasting.add_metric([kind, name], int(alarms.is_on(kind, name)))
        yield lasting
        yield CounterMetricFamily("dmafs_alarms_total", "Alarms that have been raised.", value=alarms.raised)

    def _family(self, figure: Figure) -> Metric:
        names = ["volume", figure.label] if figure.label else ["volume"]
        family = CounterMetricFamily if figure.name.endswith("_total") else GaugeMetricFamily
        metric = family(figure.name, figure.text, labels=names)
        for name, engine in self._engines.items():
            value = figure.value(engine)
            if isinstance(value, Mapping):
                for label, one in value.items():
                    metric.add_metric([name, label], one)
            elif value is not None:
                metric.add_metric([name], value)
        return metric

    def _histogram(self, classes: Classes) -> Metric:
        metric = HistogramMetricFamily(classes.name, classes.text, labels=["volume"])
        for name, engine in self._engines.items():
            found = classes.value(engine)
            bounds = [*(f"{bound:g}" for bound in found.bounds_s), "+Inf"]
            metric.add_metric([name], list(zip(bounds, accumulate(found.counts), strict=True)), found.total_s)
        return metric


def metrics_of(appliance: Appliance, engines: Mapping[str, Engine]) -> Callable[[], bytes]:
    """Return what makes the text of all metrics, each time it is called."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StateCollector(appliance, engines))
    return lambda: generate_latest(registry)
