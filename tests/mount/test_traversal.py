"""Names with paths in them, and numbers out of any range, in requests and commands: they lead nowhere."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Final

import pytest

from tests.mount.harness import MIB, Rig

pytestmark = [pytest.mark.mount]

SIZE: Final = 4 * MIB

TRAVERSALS: Final = [
    "../x",
    "..",
    ".",
    "",
    "/etc",
    "a/b",
    "a/../../b",
    "disk/../..",
    "x\0y",
    "..%2fx",
    "x" * 300,
    "-x",
    "é",
    "a\nb",
]


def ask(rig: Rig, method: str, target: str) -> tuple[int, dict[str, str]]:
    """Send a request as it is, without a library that would mend it; return status and error."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(rig.store / "control.sock"))
        connection.sendall(f"{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body) if b"application/json" in head else {}


def quoted(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())


def everything(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def test_requests_lead_nowhere(rig: Rig) -> None:
    """No name in a request leads out of the store: all are refused, and no file appears anywhere."""
    rig.create(size=SIZE)
    rig.start()
    before = everything(rig.store)
    targets = [
        ("POST", "/snapshots?name={}"),
        ("POST", "/marks?name={}"),
        ("POST", "/clones?name={}"),
        ("DELETE", "/clones?name={}"),
        ("POST", "/pin?id={}"),
        ("POST", "/verify?volume={}"),
        ("GET", "/read?volume={}&at=latest&offset=0&length=1"),
        ("GET", "/read?volume=disk&at={}&offset=0&length=1"),
        ("GET", "/diff?volume={}&a=latest&b=latest"),
        ("POST", "/tap?action=status&volume={}"),
        ("GET", "/{}"),
        ("GET", "/../{}"),
    ]
    for method, target in targets:
        for name in TRAVERSALS:
            status, error = ask(rig, method, target.format(quoted(name)))
            assert 400 <= status < 500, (method, target, name, status, error)
    for number in ("-1", "1e9", "9" * 19, "0x10", "٣", "9" * 5000, str(SIZE + 1)):
        status, _ = ask(rig, "GET", f"/read?volume=disk&at=0s%20ago&offset={quoted(number)}&length=1")
        assert status == 400, number
        status, _ = ask(rig, "GET", f"/read?volume=disk&at=0s%20ago&offset=0&length={quoted(number)}")
        assert status == 400, number
    assert everything(rig.store) == before


def test_options_lead_nowhere(rig: Rig) -> None:
    """A volume, snapshot, mark or clone by a name with a path in it is refused, and nothing is made."""
    rig.create()
    before = everything(rig.root)
    for name in ("../x", "..", "/etc", "a/../../b"):
        source = rig.root / "disk.primary"
        made = rig.dmafs("create", "--source", source, "--", rig.store, name, code=3)
        assert "volume name" in made.stderr, name
        for command in (["snapshot", "create"], ["mark"]):
            assert rig.dmafs(*command, "--", rig.store, name, code=3).stderr.startswith("dmafs: error: "), name
    assert everything(rig.root) == before
    (rig.store / "..hidden").mkdir()
    (rig.store / "..hidden" / "volume.json").write_text("{}")
    assert [report["name"] for report in json.loads(rig.dmafs("status", "--json", rig.store).stdout)["volumes"]] == [
        "disk"
    ]
    (rig.store / "..hidden" / "volume.json").unlink()
