"""Claims about metrics: what is counted, who may ask, and that dashboard and man page name what there is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from dmafs.core.ondisk import RECORD_DTYPE, Flag
from dmafs.core.statistics import Durations, Statistics
from dmafs.service import admission
from dmafs.service.admission import SCRAPERS_MAX
from dmafs.service.appliance import Appliance
from dmafs.service.engine import Engine
from dmafs.service.exposition import Exposition
from dmafs.service.metrics import FIGURES, HISTOGRAMS
from dmafs.service.scraping import serve_metrics
from tests.unit.rig import Rig
from tests.unit.target import Kernel
from tests.unit.test_admission import answer, parted
from tests.unit.test_engine import until
from tests.unit.tools import copied_volume, fill

ROOT = Path(__file__).parents[2]
GET = b"GET /metrics HTTP/1.1\r\nhost: dmafs\r\n"
END = b"connection: close\r\n\r\n"


class Told:
    """An exposition that says always the same."""

    async def text(self) -> bytes:
        return b"dmafs_x 1\n"


def test_durations_are_counted_in_the_first_class_that_holds_them() -> None:
    """Upper bounds are included; what is longer than all is in the last one."""
    durations = Durations((0.1, 1.0))
    for seconds in (0.0, 0.1, 0.11, 1.0, 1.1, 100.0):
        durations.add(seconds)
    assert durations.counts == [2, 2, 2]
    assert durations.total_s == pytest.approx(102.31)


def test_events_are_counted_by_kind(tmp_path: Path) -> None:
    """Writes and discards, one by one and captured together; indicators aren't events."""
    volume = copied_volume(tmp_path / "v", fill(1, 16))
    volume.statistics = statistics = Statistics()
    volume.write(0, fill(2, 3))
    volume.write(4, fill(2))
    volume.discard(8, 5)
    assert (statistics.data.events, statistics.data.sectors) == (2, 4)
    assert (statistics.zeros.events, statistics.zeros.sectors) == (1, 5)
    records = np.zeros(4, RECORD_DTYPE)
    records["flags"] = [Flag.DATA, Flag.ZERO, Flag.DATA, Flag.FLUSH]
    records["length"] = [7, (1 << 32) - 1, 1, 0]
    statistics.note_events(records)
    assert (statistics.data.events, statistics.data.sectors) == (4, 12)
    assert (statistics.zeros.events, statistics.zeros.sectors) == (2, 5 + (1 << 32) - 1)
    volume.close()


def test_the_lag_is_the_age_of_what_is_not_durable(tmp_path: Path) -> None:
    """0 when all is."""
    volume = copied_volume(tmp_path / "v", fill(1, 16))
    assert volume.journal.pending_ns() == 0
    volume.write(0, fill(2))
    written = volume.journal.head_time_ns
    volume.write(1, fill(3))
    assert volume.journal.pending_ns() == volume.clock() - 10 - written
    for call in volume.flush():
        call()
    assert volume.journal.pending_ns() == 0
    volume.close()


async def test_the_lag_of_a_follower_counts_what_may_be_in_the_log_only(
    tmp_path: Path, nursery: trio.Nursery, kernel: Kernel
) -> None:
    """From when somebody began to wait for it; events captured together are counted, too."""
    rig = Rig(tmp_path / "volume", kernel, nursery)
    engine = await rig.start()
    await engine.settle()
    await until(lambda: not engine._barriers)
    assert engine.volume.journal.pending_ns() == 0
    rig.device.held.clear()
    kernel.write(0, fill(7))
    async with trio.open_nursery() as waiting:
        waiting.start_soon(engine.settle)
        await until(lambda: engine._barriers)
        await until(lambda: engine.lag_s > 0.05)
        rig.device.held.set()
    await engine.flush()
    await until(lambda: not engine._barriers and engine.volume.journal.is_clean())
    assert engine.lag_s == 0
    assert (engine.volume.statistics.data.events, engine.volume.statistics.data.sectors) == (1, 1)
    await rig.stop()


def test_nobody_imports_the_library_before_metrics_are_asked_for() -> None:
    """Neither commands nor the daemon: it takes long and much memory."""
    script = "import sys, dmafs.cli.main, dmafs.service.daemon; print('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"


async def test_the_port_serves_a_few_and_only_metrics(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More connections than the limit, requests with bodies, long and slow ones are refused; none is logged."""
    monkeypatch.setattr(admission, "HEAD_S", 0.5)
    with trio.socket.socket() as probe:
        await probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    await nursery.start(serve_metrics, cast("Exposition", Told()), address)

    async def ask(request: bytes) -> tuple[int, bytes]:
        async with await trio.open_tcp_stream(*address) as stream:
            return parted(await answer(stream, request))

    assert await ask(GET + END) == (200, b"dmafs_x 1\n")
    assert (await ask(GET + b"content-length: 1\r\n" + END + b"x"))[0] == 400
    assert (await ask(b"GET /status HTTP/1.1\r\nhost: x\r\n" + END))[0] == 404
    assert (await ask(b"POST /metrics HTTP/1.1\r\nhost: x\r\n" + END))[0] == 405
    assert (await ask(GET + b"x: " + b"y" * (1 << 20) + b"\r\n" + END))[0] in {400, 431}
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(await trio.open_tcp_stream(*address)) for _ in range(SCRAPERS_MAX)]
        for stream in streams:
            await stream.send_all(GET)
        status, body = await ask(GET + END)
        assert (status, b"the port for metrics has 8 connections open" in body) == (503, True)
        answers = [await answer(stream, b"") for stream in streams]
        assert b"" in answers, "who says nothing for a while is cut off"
    assert (await ask(GET + END))[0] == 200
    assert not [record for record in caplog.records if record.name.startswith("dmafs")]
    nursery.cancel_scope.cancel()


def test_names_are_as_prometheus_wants_them() -> None:
    """Of the family's prefix, each once; a unit, or a total, or a number of things; each has a sentence."""
    names = [figure.name for figure in FIGURES] + [classes.name for classes in HISTOGRAMS]
    assert len(names) == len(set(names))
    for name, text in [(one.name, one.text) for one in (*FIGURES, *HISTOGRAMS)]:
        assert re.fullmatch(r"dmafs_[a-z]+(_[a-z]+)*", name), name
        assert text.endswith("."), name
        assert not re.search(r"(_ms|_kb|_mb|_percent|_count|_sum|_bucket)$", name), name


# -- the dashboard ----------------------------------------------------------------------------------------------------


def expressions(value: Any) -> list[str]:
    """Return all queries of a dashboard."""
    if isinstance(value, dict):
        own = [value["expr"]] if isinstance(value.get("expr"), str) else []
        return own + [found for entry in value.values() for found in expressions(entry)]
    return [found for entry in value for found in expressions(entry)] if isinstance(value, list) else []


async def test_the_dashboard_asks_for_what_there_is(tmp_path: Path, nursery: trio.Nursery, kernel: Kernel) -> None:
    """Each metric and label that it names is in a daemon's output; so is each that the man page explains."""
    rig = Rig(tmp_path / "volume", kernel, nursery)
    engine: Engine = await rig.start()

    class Store:
        path = tmp_path
        volumes = {"disk": rig.volume}  # noqa: RUF012 - never changed

    appliance = Appliance(cast("Any", Store()), {"disk": engine})
    text = (await Exposition(appliance, {"disk": engine}).text()).decode()
    samples = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    families = set(re.findall(r"^# HELP (\S+)", text, re.MULTILINE))
    dashboard = json.loads((ROOT / "contrib" / "grafana" / "dmafs.json").read_text())
    asked = {name for line in expressions(dashboard) for name in re.findall(r"\bdmafs_[a-z_]+", line)}
    assert asked
    assert asked <= samples | families
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["title"] and panel["targets"] for panel in panels)
    page = (ROOT / "man" / "dmafs-metrics.1").read_text()
    assert set(re.findall(r"^\.It Li (dmafs_[a-z_]+)", page, re.MULTILINE)) == families
    await rig.stop()
