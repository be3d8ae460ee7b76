"""The control interface: HTTP over the unix socket ``control.sock`` in the store, for the commands of the same machine.

=======  ================  ==================================================  =============================
method   path              parameters                                          answer
=======  ================  ==================================================  =============================
GET      /status                                                               JSON
GET      /points                                                               JSON
GET      /moment           at, volume (optional)                               JSON
GET      /metrics                                                              text, Prometheus' format 0.0.4
POST     /snapshots        name                                                JSON
POST     /marks            name                                                JSON
POST     /sync                                                                 JSON
POST     /pin              id                                                  JSON
POST     /unpin            id                                                  JSON
POST     /thin             dry_run (0 or 1)                                    JSON
GET      /clones                                                               JSON
POST     /clones           name, at (optional)                                 JSON
DELETE   /clones           name                                                JSON
GET      /read             volume, at, offset, length                          bytes, all of one moment
GET      /diff             volume, a, b                                        JSON
POST     /verify           volume, rate (optional)                             lines of JSON
POST     /resync           volume, rate (optional)                             lines of JSON
POST     /scrub            volume, rate (optional)                             lines of JSON
POST     /tap              action (attach, detach, status), volume (optional)  JSON
=======  ================  ==================================================  =============================

A verify, resync or scrub tells how far it is often, a line each time; the last line is {result} or {error,
message, hint}. Who goes away before that gives it up.

An error is a JSON object {error, message, hint}: the class's name in the error tree and its texts; status 400 for
what the caller got wrong, 404 for what isn't there, 500 for the rest; 403 and 503 for whom isn't admitted, see
``admission``. The socket has mode 0600 in a directory of mode 0700. What can be asked is bounded in size and time.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Final

import trio
from hypercorn.config import Config
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.h11 import H2CProtocolRequiredError, H2ProtocolAssumedError, H11Protocol
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from dmafs.errors import ControlError, DmafsError, InputError, NotFoundError
from dmafs.service.admission import CONNECTIONS_MAX, Admission, Connection
from dmafs.service.appliance import Appliance
from dmafs.service.checking import RESYNC, SCRUB, VERIFY, Check
from dmafs.service.devices import ACTIONS
from dmafs.service.exposition import CONTENT_TYPE, Exposition
from dmafs.service.moment import moment_of
from dmafs.service.report import Report, check_range, differences_of, image_at, scrubbed_of
from dmafs.units import check_name

log = logging.getLogger(__name__)

TOLD_S: Final = 0.2
"""How often somebody who waits is told how far it is."""

HEAD_BYTES_MAX: Final = 16 << 10
"""Of a request, which is all there is to it: none has a body."""

_NUMBER: Final = re.compile(r"-?[0-9]{1,18}", re.ASCII)  # fits 63 bits


def application(appliance: Appliance, exposition: Exposition | None = None) -> Starlette:
    """Return the application that serves *appliance*, and its metrics where somebody has them."""
    handlers = Handlers(appliance)
    routes = [
        ("GET", "/status", handlers.status),
        ("GET", "/points", handlers.points),
        ("GET", "/moment", handlers.moment),
        ("POST", "/snapshots", handlers.take_snapshot),
        ("POST", "/marks", handlers.mark),
        ("POST", "/sync", handlers.sync),
        ("POST", "/pin", handlers.pin),
        ("POST", "/unpin", handlers.unpin),
        ("POST", "/thin", handlers.thin),
        ("GET", "/clones", handlers.list_clones),
        ("POST", "/clones", handlers.create_clone),
        ("DELETE", "/clones", handlers.drop_clone),
        ("GET", "/read", handlers.read),
        ("GET", "/diff", handlers.diff),
        ("POST", "/verify", handlers.verify),
        ("POST", "/resync", handlers.resync),
        ("POST", "/scrub", handlers.scrub),
        ("POST", "/tap", handlers.tap),
    ]
    shown = [] if exposition is None else metrics_routes(exposition)
    plain = [Route(path, _answering(handler), methods=[method]) for method, path, handler in routes]
    return Starlette(routes=[*plain, *shown])


def metrics_routes(exposition: Exposition) -> list[Route]:
    """Return what serves metrics, and nothing else."""

    async def answer(_request: Request) -> Response:
        return Response(await exposition.text(), media_type=CONTENT_TYPE)

    route = Route("/metrics", _answering(answer))
    route.methods = {"GET"}  # not HEAD, which it would add
    return [route]


class Handlers:
    """What answers requests; see the table above."""

    def __init__(self, appliance: Appliance) -> None:
        """Answer for *appliance*."""
        self._appliance = appliance

    async def status(self, _request: Request) -> Response:
        """Answer with the state of everything."""
        return JSONResponse(self._appliance.status())

    async def points(self, _request: Request) -> Response:
        """Answer with the recoverable points."""
        return JSONResponse(self._appliance.points())

    async def moment(self, request: Request) -> Response:
        """Answer with what a time means."""
        query = request.query_params
        return JSONResponse(moment_of(self._appliance.volumes, query.get("at", ""), query.get("volume")))

    async def take_snapshot(self, request: Request) -> Response:
        """Take a snapshot."""
        name = check_name(request.query_params.get("name", ""), "snapshot")
        await self._appliance.take_snapshot(name)
        return JSONResponse({"name": name})

    async def mark(self, request: Request) -> Response:
        """Set a mark."""
        name = check_name(request.query_params.get("name", ""), "mark")
        await self._appliance.mark(name)
        return JSONResponse({"name": name})

    async def sync(self, _request: Request) -> Response:
        """Sync."""
        return JSONResponse(await self._appliance.sync())

    async def pin(self, request: Request) -> Response:
        """Pin a snapshot."""
        identifier = request.query_params.get("id", "")
        await self._appliance.pin(identifier)
        return JSONResponse({"id": identifier, "pinned": True})

    async def unpin(self, request: Request) -> Response:
        """Take a pin off."""
        identifier = request.query_params.get("id", "")
        await self._appliance.unpin(identifier)
        return JSONResponse({"id": identifier, "pinned": False})

    async def thin(self, request: Request) -> Response:
        """Thin the snapshots, or say what that would do."""
        return JSONResponse(await self._appliance.thin(dry_run=_flag(request.query_params.get("dry_run"))))

    async def tap(self, request: Request) -> Response:
        """Attach, detach or show mapped devices."""
        action = request.query_params.get("action", "")
        if action not in ACTIONS:
            raise InputError(f"action {action!r} is none of {', '.join(ACTIONS)}")
        return JSONResponse(await self._appliance.tap(action, request.query_params.get("volume")))

    async def list_clones(self, _request: Request) -> Response:
        """Answer with all clones."""
        return JSONResponse(self._appliance.list_clones())

    async def create_clone(self, request: Request) -> Response:
        """Make a clone."""
        name = check_name(request.query_params.get("name", ""), "clone")
        await self._appliance.create_clone(name, request.query_params.get("at"))
        return JSONResponse({"name": name})

    async def drop_clone(self, request: Request) -> Response:
        """Drop a clone."""
        name = check_name(request.query_params.get("name", ""), "clone")
        await self._appliance.drop_clone(name)
        return JSONResponse({"name": name})

    async def read(self, request: Request) -> Response:
        """Answer with bytes of an image."""
        query = request.query_params
        offset, length = _number(query.get("offset")), _number(query.get("length"))
        image = image_at(self._appliance.volumes, query.get("volume", ""), query.get("at", ""))
        check_range(image, offset, length)
        parts = self._appliance.read_at(image, offset, length)
        first = await anext(parts, b"")  # from here on the image is held, and most errors would have come
        headers = {"content-length": str(length)}
        return StreamingResponse(_joined(first, parts), headers=headers, media_type="application/octet-stream")

    async def diff(self, request: Request) -> Response:
        """Answer with what was written between two moments."""
        query = request.query_params
        found = await self._appliance.diff(query.get("volume", ""), query.get("a", ""), query.get("b", ""))
        return Response(found, media_type="application/json")

    async def verify(self, request: Request) -> Response:
        """Verify, and tell how far that is until it is done."""
        return self._check(VERIFY, request)

    async def resync(self, request: Request) -> Response:
        """Resync, likewise."""
        return self._check(RESYNC, request)

    async def scrub(self, request: Request) -> Response:
        """Scrub, likewise."""
        return self._check(SCRUB, request)

    def _check(self, kind: str, request: Request) -> Response:
        query = request.query_params
        rate = query.get("rate")
        return _Told(self._appliance.begin_check(kind, query.get("volume", ""), None if rate is None else _rate(rate)))


class _Told(StreamingResponse):
    """How far a check is, to its end; it is given up when nobody listens any more."""

    def __init__(self, check: Check) -> None:
        super().__init__(_lines(check), media_type="application/x-ndjson")
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._check.abandon()


async def _lines(check: Check) -> AsyncIterator[str]:
    while not check.done.is_set():
        yield json.dumps(check.report()) + "\n"
        with trio.move_on_after(TOLD_S):
            await check.done.wait()
    if check.scrubbed is not None:
        yield json.dumps({"result": scrubbed_of(check.volume, check.scrubbed)}) + "\n"
    elif check.found is not None:
        yield json.dumps({"result": differences_of(check.volume, check.found)}) + "\n"
    else:
        failure = check.failure or ControlError(f"volume {check.volume}: the {check.kind} was given up")
        yield json.dumps(_shown(failure)) + "\n"


async def _joined(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        yield first
        async for part in rest:
            yield part


def _number(text: str | None) -> int:
    if text is None or not _NUMBER.fullmatch(text):
        raise InputError(f"{text!r} is not a number of bytes", hint="give a decimal number")
    return int(text)


def _rate(text: str) -> int:
    rate = _number(text)
    if rate < 0:
        raise InputError(f"rate {rate} is negative", hint="give bytes a second, or 0 for no limit")
    return rate


def _flag(text: str | None) -> bool:
    if text not in {"0", "1"}:
        raise InputError(f"{text!r} is neither 0 nor 1", hint="1 means yes")
    return text == "1"


def _answering(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Turn errors of the tree into answers."""

    async def wrapper(request: Request) -> Response:
        try:
            if request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers:
                raise InputError("a request to the control interface has a body", hint="all it says is in its URL")
            return await handler(request)
        except DmafsError as error:
            status = 404 if isinstance(error, NotFoundError) else 400 if isinstance(error, InputError) else 500
            return JSONResponse(_shown(error), status_code=status)

    return wrapper


def _shown(error: DmafsError) -> Report:
    return {"error": type(error).__name__, "message": error.message, "hint": error.hint}


class _Server(TCPServer):
    """Hypercorn's server of one connection, without HTTP/2: there, answers to who has hung up are never done."""

    @property  # type: ignore[override]  # an attribute of the base class
    def protocol(self) -> H11Protocol:
        """What is spoken."""
        return self._protocol

    @protocol.setter
    def protocol(self, switching: ProtocolWrapper) -> None:
        assert isinstance(switching.protocol, H11Protocol)
        self._protocol = switching.protocol


async def serve_requests(listener: socket.socket, routes: Starlette, door: type[Admission]) -> None:
    """Serve what connects to *listener*, as far as *door* admits it, until cancelled."""
    config = Config()
    config.loglevel = "WARNING"
    config.accesslog = None
    config.h11_max_incomplete_size = HEAD_BYTES_MAX
    context, state = WorkerContext(None), ConnectionState({})

    async def serve_one(connection: Connection) -> None:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            with connection.answering():
                await routes(scope, receive, send)

        asgi = wrap_app(answer, 0, "asgi")  # type: ignore[arg-type]  # an ASGI application by another library's types
        try:
            await _Server(asgi, config, context, state, connection)  # type: ignore[arg-type]  # as good as a stream
        except* (H2CProtocolRequiredError, H2ProtocolAssumedError):
            log.log(door.level, "a connection to %s was closed: it asked for HTTP/2", door.where)

    sockets = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
    await trio.serve_listeners(door(serve_one).handle, [sockets])


async def serve_control(
    appliance: Appliance,
    path: Path,
    exposition: Exposition | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve on a unix socket until cancelled. One left by an earlier daemon is replaced: the store's lock is ours."""
    path.unlink(missing_ok=True)  # noqa: ASYNC240 - at once, on a local filesystem
    listener = socket_of(path)
    task_status.started()
    try:
        await serve_requests(listener, application(appliance, exposition), Admission)
    finally:
        try:
            path.unlink(missing_ok=True)  # noqa: ASYNC240 - at once, on a local filesystem
        except OSError as error:  # a file system that has failed is read-only; the next daemon replaces it
            log.warning("the control socket is left behind: %s", error)


def socket_of(path: Path) -> socket.socket:
    """Return a socket listening at *path*, mode 0600. Unix socket names are short, so it is bound by its directory."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        os.fchmod(listener.fileno(), 0o600)  # the file that bind makes has this mode from its beginning on
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
        listener.listen(CONNECTIONS_MAX)
    finally:
        os.close(directory)
    return listener
