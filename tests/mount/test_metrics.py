"""What a daemon measures, beside what was done with it; alarms, and the command that is told of them."""

from __future__ import annotations

import errno
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dmafs.errors import ControlError
from dmafs.service.metrics import FIGURES, HISTOGRAMS
from tests.mount.harness import DMAFS, MIB, REDONE, Rig, forget, opened, pread, pwrite, run, wait_until
from tests.mount.test_gap import GAP_BEGINS, GAP_ENDS, pretend_other_boot
from tests.mount.test_scrub import damage

pytestmark = pytest.mark.mount

PAGE = 4096

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    """Return the values by name and labels, sorted by name; each metric has a HELP text."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


class Meter:
    """Looks at the metrics of a rig's daemon."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig

    def look(self) -> Meter:
        self.found = samples(self.rig.dmafs("metrics", self.rig.store).stdout)
        return self

    def __call__(self, name: str, **labels: str) -> float:
        key = {"volume": "disk", **labels}
        return self.found[f"dmafs_{name}", tuple(sorted((label, value) for label, value in key.items()))]

    def of_store(self, name: str) -> float:
        return self.found[f"dmafs_{name}", ()]


def told(path: Path) -> list[dict[str, str]]:
    """Return what the command was told, call by call, once the last call is complete."""
    text = path.read_text() if path.exists() else ""
    calls = text.split("\n\n")[:-1]
    return [dict(line.split("=", 1) for line in call.splitlines() if line) for call in calls]


def with_command(path: Path, more: str = "") -> str:
    script = f"{{ env | grep ^DMAFS_; echo; }} >> {path}"
    return f'[alarms]\ncommand = ["sh", "-c", "{script}"]\nfree = "0%"\n{more}'


def test_metrics_are_what_was_done(rig: Rig) -> None:
    """What writes, flushes, reads, snapshots, clones and syncs change; counters are 0 at each start."""
    rig.create(size=16 * MIB, content=os.urandom(MIB))
    rig.start()
    meter = Meter(rig).look()
    names = {name for name, _ in meter.found}
    families = {family.name for family in text_string_to_metric_families(rig.dmafs("metrics", rig.store).stdout)}
    assert {figure.name.removesuffix("_total") for figure in FIGURES} <= families
    assert {f"{classes.name}_count" for classes in HISTOGRAMS} <= names
    assert meter("captured_events_total", kind="data") == 0
    assert (meter("read_duration_seconds_count"), meter("copy_progress_ratio")) == (0, 1)
    for number in range(50):
        pwrite(rig.tap(), os.urandom(PAGE), number * PAGE)
    pwrite(rig.tap(), os.urandom(3 * PAGE), 8 * MIB, sync=True)
    flushes = meter("flushes_total")
    meter.look()
    assert (meter("captured_events_total", kind="data"), meter("captured_events_total", kind="zero")) == (51, 0)
    assert (meter("captured_bytes_total", kind="data"), meter("capture_lag_seconds")) == (53 * PAGE, 0)
    assert (meter("forward_journal_events"), meter("forward_journal_bytes")) == (51, 53 * PAGE)
    assert meter("flushes_total") > flushes
    assert meter("commits_total") > 0
    with opened(rig.live(), os.O_RDONLY) as live:
        for number in range(40):
            assert len(os.pread(live, PAGE, number * PAGE)) == PAGE
    meter.look()
    assert meter("read_duration_seconds_count") == 40
    assert 0 < meter("read_duration_seconds_sum") < 40
    reads, read = (
        meter(name, answered="at_once") + meter(name, answered="by_thread")
        for name in ("reads_total", "read_bytes_total")
    )
    assert (reads, read) == (40, 40 * PAGE)
    rig.dmafs("snapshot", "create", rig.store, "one")
    rig.dmafs("clone", "create", rig.store, "copy")
    rig.dmafs("sync", rig.store)
    with opened(rig.snapshot("one"), os.O_RDONLY):
        meter.look()
        assert (meter("snapshots"), meter("clones"), meter("sync_duration_seconds_count")) == (2, 1, 1)
        assert meter("open_images") >= 1
    assert meter("backward_journal_bytes") >= 50 * PAGE, "what was a hole is kept without data"
    assert meter("forward_journal_events") == 0
    assert 0 < meter("history_seconds") < 600
    assert 0 < meter.of_store("store_free_bytes") < meter.of_store("store_size_bytes")
    rig.restart()
    meter.look()
    for name, labels in meter.found:
        if name.endswith(("_total", "_count")):
            label = dict(labels).get("kind") or dict(labels).get("answered")
            assert meter.found[name, labels] == 0 or name in {"dmafs_flushes_total", "dmafs_commits_total"}, (
                name,
                label,
            )
    assert meter("snapshots") == 2


def test_there_are_no_metrics_without_a_daemon(rig: Rig) -> None:
    """The error says what to do, and the store isn't touched."""
    rig.create()
    done = rig.dmafs("metrics", rig.store, code=ControlError.exit_code)
    assert f"no daemon serves store {rig.store}" in done.stderr
    assert "dmafs serve" in done.stderr
    rig.dmafs("metrics", rig.root / "nowhere", code=11)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def fetch(port: int, path: str = "/metrics", method: str = "GET") -> tuple[int, str, str]:
    """Return status, type and text of what a port answers."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310 - it is http
            return answer.status, answer.headers["content-type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, "", ""


def test_a_port_serves_metrics_and_nothing_else(rig: Rig) -> None:
    """If the configuration names one; it says what the command says. One that is taken is an error at the start."""
    port = free_port()
    rig.create()
    rig.configure(f'[metrics]\nlisten = "127.0.0.1:{port}"')
    rig.start()
    status, kind, text = fetch(port)
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert samples(text).keys() == samples(rig.dmafs("metrics", rig.store).stdout).keys()
    assert [fetch(port, path)[0] for path in ("/", "/status", "/points", "/sync", "/metrics/x")] == [404] * 5
    assert [fetch(port, method=method)[0] for method in ("POST", "HEAD", "DELETE", "PUT")] == [405] * 4
    assert fetch(port)[0] == 200
    rig.stop()
    with socket.create_server(("127.0.0.1", port)):
        done = run(DMAFS, "serve", rig.store, rig.mnt, code=ControlError.exit_code)
    assert f"port {port} of 127.0.0.1 can't be had for metrics: address already in use" in done.stderr
    assert "Traceback" not in done.stderr
    rig.configure("")
    rig.start()
    with pytest.raises(urllib.error.URLError):
        fetch(port)


def test_a_gap_is_an_alarm_that_is_told_and_over(rig: Rig) -> None:
    """The command finds in its environment what has begun and what has ended; metrics and status count it."""
    rig.allow(REDONE, GAP_BEGINS, GAP_ENDS)
    path = rig.root / "told"
    rig.create(size=16 * MIB)
    rig.configure(with_command(path))
    rig.start()
    pwrite(rig.tap(), b"flushed".ljust(PAGE), 0, sync=True)
    rig.kill()
    pretend_other_boot(rig)
    pwrite(rig.primary(), b"only on the primary".ljust(PAGE), MIB)
    rig.start()
    wait_until(lambda: len(told(path)) == 2, "the command to be told twice")
    raised, cleared = told(path)
    assert (raised["DMAFS_ALARM"], raised["DMAFS_STATE"], raised["DMAFS_VOLUME"]) == ("gap", "raised", "disk")
    assert raised["DMAFS_MESSAGE"].startswith("volume disk: a gap is open, it has begun at 20")
    assert cleared == {**raised, "DMAFS_STATE": "cleared"}
    assert raised["DMAFS_STORE"] == str(rig.store)
    meter = Meter(rig).look()
    assert (meter("gaps_total"), meter("gap"), meter("alarm", kind="gap")) == (1, 0, 0)
    assert meter.of_store("alarms_total") == 1
    assert rig.log().count("a gap is open, it has begun") == 2, "raised and cleared"


def test_damage_is_counted_and_an_alarm_until_a_scrub_has_repaired_it(rig: Rig) -> None:
    """A byte that has changed on the store's disk: an I/O error, a count, an alarm that status and command tell."""
    rig.allow("is damaged|doesn't match|wrong checksum")
    path = rig.root / "told"
    rig.create(size=4 * MIB, content=os.urandom(4 * MIB))
    rig.configure(with_command(path))
    rig.start()
    meter = Meter(rig).look()
    assert (meter("checksum_failures_total"), meter("alarm", kind="damage")) == (0, 0)
    damage(rig.store / "disk" / "mirror.img", 7 * PAGE + 11)
    forget(rig.store / "disk" / "mirror.img")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        pread(rig.live(), PAGE, 7 * PAGE)
    meter.look()
    assert (meter("checksum_failures_total"), meter("alarm", kind="damage")) == (1, 1)
    shown = rig.dmafs("status", rig.store, code=1).stdout
    assert "alarm     volume disk: a read has found a wrong checksum; find what is damaged with: dmafs scrub" in shown
    rig.dmafs("scrub", rig.store)
    rig.dmafs("status", rig.store)
    meter.look()
    assert (meter("alarm", kind="damage"), meter("damaged_places"), meter.of_store("alarms_total")) == (0, 0, 1)
    wait_until(lambda: len(told(path)) == 2, "the command to be told twice")
    assert [(one["DMAFS_ALARM"], one["DMAFS_STATE"]) for one in told(path)] == [
        ("damage", "raised"),
        ("damage", "cleared"),
    ]


def test_a_command_that_fails_is_logged_once(rig: Rig) -> None:
    """However often it is run; the daemon goes on, and tells of the alarms itself."""
    rig.allow("hook sh", "is nearly full", "is damaged|doesn't match|wrong checksum")
    path = rig.root / "runs"
    rig.create(size=4 * MIB, content=os.urandom(4 * MIB))
    rig.configure(f'[alarms]\ncommand = ["sh", "-c", "echo >> {path}; exit 3"]\nfree = "99.9%"\n')
    rig.start()
    wait_until(lambda: "exit 3 ended with 3" in rig.log(), "the command to fail")
    damage(rig.store / "disk" / "mirror.img", PAGE)
    forget(rig.store / "disk" / "mirror.img")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        pread(rig.live(), PAGE, PAGE)
    wait_until(lambda: path.read_text().count("\n") == 2, "the command to run again")
    text = rig.dmafs("status", rig.store, code=1).stdout
    assert "the file system of the store is nearly full" in text
    assert "wrong checksum" in text
    rig.stop()
    assert rig.log().count("ended with 3") == 1
