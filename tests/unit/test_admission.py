"""Claims about dmafs.service.admission and the limits of the control interface, through its real socket."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import cast

import pytest
import trio
import trio.testing

from dmafs.service import admission, control
from dmafs.service.admission import CONNECTIONS_MAX
from dmafs.service.appliance import Appliance
from dmafs.service.control import HEAD_BYTES_MAX, serve_control
from dmafs.service.exposition import Exposition

GET = b"GET /status HTTP/1.1\r\nhost: dmafs\r\n"
WEBSOCKET = b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-key: x\r\n\r\n"


class Facts:
    """Of an appliance only what ``GET /status`` needs."""

    answer = "fine"
    asked = 0

    def status(self) -> dict[str, str]:
        self.asked += 1
        return {"state": self.answer}


facts = Facts()
NO_METRICS = Exposition(cast("Appliance", facts), {})


@pytest.fixture
async def path(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Path]:
    """Return the path of a socket that is served."""
    socket = tmp_path / "control.sock"
    facts.answer, facts.asked = "fine", 0
    await nursery.start(serve_control, cast("Appliance", facts), socket, NO_METRICS)
    yield socket
    nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[trio.SocketStream]:
    async with await trio.open_unix_socket(path) as stream:
        yield stream


async def answer(stream: trio.SocketStream, request: bytes = GET + b"connection: close\r\n\r\n") -> bytes:
    """Send what is given, and return the answer, up to the end of the connection; whoever ends it."""
    received = bytearray()
    with trio.fail_after(10), contextlib.suppress(trio.BrokenResourceError):
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(request)
        async for chunk in stream:
            received += chunk
    return bytes(received)


def parted(received: bytes) -> tuple[int, bytes]:
    """Return status and body of an answer."""
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


async def is_served(path: Path) -> bool:
    async with connected(path) as stream:
        status, body = parted(await answer(stream))
        return status == 200 and json.loads(body) == {"state": "fine"}


def test_the_socket_is_private_whatever_the_umask(tmp_path: Path) -> None:
    """Its mode is 0600 from the beginning on."""
    for number, mask in enumerate((0, 0o777, 0o022)):
        path = tmp_path / str(number)
        before = os.umask(mask)
        try:
            control.socket_of(path).close()
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 & ~mask


async def test_connections_are_bounded(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One more than the limit is told so at once; when the others have gone there is room again."""
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(connected(path)) for _ in range(CONNECTIONS_MAX)]
        for stream in streams:
            await stream.send_all(GET)  # no end yet, so it is waited for
        async with connected(path) as one_more:
            status, body = parted(await answer(one_more))
        assert status == 503
        assert json.loads(body)["error"] == "ControlError"
        assert "64 connections" in json.loads(body)["message"]
        for stream in streams:
            assert parted(await answer(stream, b"connection: close\r\n\r\n"))[0] == 200
    assert "64 connections" in caplog.text
    caplog.clear()
    assert await is_served(path)


async def test_who_does_not_say_what_it_wants_is_cut_off(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither nothing nor half a request keeps a connection for long."""
    monkeypatch.setattr(admission, "HEAD_S", 0.1)
    path = tmp_path / "control.sock"
    await nursery.start(serve_control, cast("Appliance", facts), path, NO_METRICS)
    for part in (b"", GET, b"G"):
        async with connected(path) as stream:
            assert await answer(stream, part) == b""
    for part in (b"\r\n", b"upgrade: h2c\r\nconnection: upgrade\r\n\r\n", WEBSOCKET):
        async with connected(path) as stream:
            assert (await answer(stream, GET + part)).startswith(b"HTTP/1.1 ")
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "part",
    [b"x: " + b"y" * 5 * HEAD_BYTES_MAX, b"x: y\r\n" * HEAD_BYTES_MAX, b"\0" * 100],
    ids=["long", "many", "zeros"],
)
async def test_heads_are_bounded(path: Path, part: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request longer than the limit, or one that is none, is refused, and the connection closed."""
    monkeypatch.setattr(admission, "HEAD_S", 0.2)
    async with connected(path) as stream:
        received = await answer(stream, GET + part)
        assert not received or parted(received)[0] in {400, 431}  # what closes first can't be told
    assert await is_served(path)


@pytest.mark.parametrize(
    "head", [b"content-length: 5\r\n", b"transfer-encoding: chunked\r\n"], ids=["sized", "chunked"]
)
async def test_bodies_are_refused(path: Path, head: bytes) -> None:
    """Whatever their length, before any of them has come."""
    async with connected(path) as stream:
        status, body = parted(await answer(stream, GET + head + b"connection: close\r\n\r\n"))
    assert status == 400
    assert "has a body" in json.loads(body)["message"]


async def test_who_does_not_read_is_cut_off(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that nobody takes ends the connection after a while; the others are served meanwhile and after."""
    monkeypatch.setattr(admission, "STALL_S", 0.1)
    monkeypatch.setattr(admission, "HEAD_S", 0.2)
    hung_up = select.poll()
    facts.answer = "x" * (8 << 20)
    async with connected(path) as deaf:
        await deaf.send_all(GET + b"\r\n")
        while facts.asked < 1:  # noqa: ASYNC110 - it is the server that is waited for
            await trio.sleep(0.01)
        facts.answer = "fine"
        assert await is_served(path)
        hung_up.register(deaf.socket.fileno(), 0)
        with trio.fail_after(10):
            while not hung_up.poll(0):  # noqa: ASYNC110 - it is the server that is waited for
                await trio.sleep(0.01)
        assert len(await answer(deaf, b"")) < 8 << 20
    assert await is_served(path)


async def test_any_bytes_end_one_connection_at_most(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise, requests with bytes changed, and attempts at other protocols: the next one is served."""
    monkeypatch.setattr(admission, "HEAD_S", 2.0)
    monkeypatch.setattr(admission, "CONNECTIONS_MAX", 1000)
    random = Random(int(os.environ.get("DMAFS_TEST_SEED", "1")))
    special = [
        GET + b"upgrade: h2c\r\nconnection: upgrade\r\n\r\n",
        GET + WEBSOCKET,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(200),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + random.randbytes(2000),
        b"GET http://other/../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /../../etc/passwd HTTP/1.0\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /status HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n",
    ]
    for number in range(200):
        mutant = bytearray(special[number % len(special)])
        for _ in range(random.randint(1, 8) if number >= len(special) else 0):
            mutant[random.randrange(len(mutant))] = random.randrange(256)
        async with connected(path) as stream:
            received = bytearray()
            with trio.fail_after(10), contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(bytes(mutant))
                await stream.send_eof()
                async for chunk in stream:
                    received += chunk
            assert len(received) < 1 << 16
    assert await is_served(path)
    assert "report this" not in caplog.text, caplog.text


async def test_what_is_sent_at_once_goes_out_one_after_the_other() -> None:
    """A server that finds fault with a request sends that while the answer to the one before still goes out."""
    near, far = socket.socketpair()
    first, second = b"a" * (4 << 20), b"b" * 100
    async with trio.SocketStream(trio.socket.from_stdlib_socket(near)) as stream:
        connection = admission.Connection(stream, trio.CancelScope())
        received = bytearray()

        async def receive() -> None:
            async with trio.SocketStream(trio.socket.from_stdlib_socket(far)) as other:
                async for part in other:
                    received.extend(part)

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.send_all, first)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(connection.send_all, second)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(connection.send_eof)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(receive)
    assert received == first + second


async def test_the_end_waits_for_nobody(tmp_path: Path) -> None:
    """Neither for one who doesn't read nor for one who doesn't write."""
    path = tmp_path / "control.sock"
    facts.answer = "x" * (8 << 20)
    facts.asked = 0
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, cast("Appliance", facts), path, NO_METRICS)
        async with connected(path), connected(path) as deaf:
            await deaf.send_all(GET + b"\r\n")
            while facts.asked < 1:  # noqa: ASYNC110 - it is the server that is waited for
                await trio.sleep(0.01)
            begun = trio.current_time()
            nursery.cancel_scope.cancel()
    assert trio.current_time() - begun < 5
    assert not path.exists()


async def test_another_user_is_refused() -> None:
    """The kernel says whose process it is; the answer says so, too, and nothing is served."""
    served: list[object] = []

    async def serve(connection: object) -> None:
        served.append(connection)

    os.seteuid(65534)
    try:
        ours, theirs = socket.socketpair()
    finally:
        os.seteuid(0)
    with theirs:
        await admission.Admission(serve).handle(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        theirs.settimeout(10)
        answer = theirs.recv(1 << 16)
    assert b" 403 " in answer.splitlines()[0]
    assert b"of user 65534 may not ask" in answer
    assert not served
