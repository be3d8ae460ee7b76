"""The control interface: HTTP over the unix socket ``control.sock`` in the store, for programs of the same machine.

What can be asked, with which parameters and for which answers, is the table in ``operations``; ``GET /openapi.json``
answers it as an OpenAPI document. A request has no body.

A verify, resync or scrub answers a stream of server-sent events: ``progress`` often, to which a listener needn't
listen, then one ``result`` or ``error``. Who goes away before that gives it up.

An error is a JSON object {error, message, hint}: the class's name in the error tree and its texts; status 400 for what
the caller got wrong, 404 for what isn't there, 409 for what isn't possible now, 507 for a store that is full, 500 for
the rest; 403 and 503 for whom isn't admitted, see ``admission``. The socket has mode 0600 in a directory of mode 0700.
What can be asked is bounded in size and time.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import trio
from hypercorn.config import Config
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.h11 import H2CProtocolRequiredError, H2ProtocolAssumedError, H11Protocol
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from dmafs import answers
from dmafs.errors import ControlError, DmafsError, InputError, NotFoundError, TapError
from dmafs.service.admission import CONNECTIONS_MAX, Admission, Connection
from dmafs.service.appliance import Appliance
from dmafs.service.checking import RESYNC, SCRUB, VERIFY, Check
from dmafs.service.exposition import CONTENT_TYPE, Exposition
from dmafs.service.moment import moment_of
from dmafs.service.operations import BYTES, EVENTS, OPERATIONS, Operation
from dmafs.service.report import check_range, clones_of, differences_of, image_at, points_of, scrubbed_of, snapshots_of

log = logging.getLogger(__name__)

TOLD_S: Final = 0.2
"""How often somebody who waits is told how far it is."""

HEAD_BYTES_MAX: Final = 16 << 10
"""Of a request, which is all there is to it: none has a body."""

_STATUS: Final = {
    errno.EINVAL: 400,
    errno.EACCES: 403,
    errno.ENOENT: 404,
    errno.EBUSY: 409,
    errno.EEXIST: 409,
    errno.ENOSPC: 507,
}

Answer = Mapping[str, Any] | Response
Endpoint = Callable[[Request], Awaitable[Response]]


def application(appliance: Appliance, exposition: Exposition) -> Starlette:
    """Return the application that serves *appliance* and its metrics."""
    handlers = Handlers(appliance, exposition)
    return _serving((operation, getattr(handlers, operation.name)) for operation in OPERATIONS)


def metrics_application(exposition: Exposition) -> Starlette:
    """Return the application that serves metrics, and nothing else."""
    handlers = _Metrics(exposition)
    return _serving((operation, handlers.metrics) for operation in OPERATIONS if operation.name == "metrics")


def _serving(answered: Iterable[tuple[Operation, Callable[..., Awaitable[Answer]]]]) -> Starlette:
    paths: dict[str, dict[str, Endpoint]] = {}
    for operation, handler in answered:
        paths.setdefault(operation.path, {})[operation.method] = _answering(operation, handler)
    served = Starlette(
        routes=[_route(path, methods) for path, methods in paths.items()],
        exception_handlers={HTTPException: _unknown, Exception: _failed},
    )
    served.router.redirect_slashes = False
    return served


def _route(path: str, methods: Mapping[str, Endpoint]) -> Route:
    async def answer(request: Request) -> Response:
        return await methods[request.method](request)

    route = Route(path, answer)
    route.methods = set(methods)  # not HEAD, which it would add
    return route


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = NotFoundError(f"there is no {request.method} {request.url.path}", hint="GET /openapi.json says what is")
    return JSONResponse(_shown(problem), status_code=error.status_code, headers=error.headers)


async def _failed(_request: Request, error: Exception) -> Response:
    """Answer after a bug of ours, which is logged."""
    problem = DmafsError(f"bug: {type(error).__name__}", hint="the daemon's log has it, please report this")
    return JSONResponse(_shown(problem), status_code=500)


class _Metrics:
    """Answers with metrics."""

    def __init__(self, exposition: Exposition) -> None:
        self._exposition = exposition

    async def metrics(self) -> Response:
        """Answer with all metrics."""
        return Response(await self._exposition.text(), media_type=CONTENT_TYPE)


class Handlers(_Metrics):
    """What answers requests: a method for each operation, with its parameters."""

    def __init__(self, appliance: Appliance, exposition: Exposition) -> None:
        """Answer for *appliance*."""
        super().__init__(exposition)
        self._appliance = appliance

    async def openapi(self) -> Answer:
        """Answer with the OpenAPI document."""
        return await trio.to_thread.run_sync(_document)

    async def status(self) -> answers.Status:
        """Answer with the state of everything."""
        return self._appliance.status()

    async def points(self) -> answers.Points:
        """Answer with the recoverable points."""
        return points_of(self._appliance.volumes)

    async def moment(self, *, at: str, volume: str | None) -> answers.Moment:
        """Answer with what a time means."""
        return moment_of(self._appliance.volumes, at, volume)

    async def snapshots(self) -> answers.Snapshots:
        """Answer with all snapshots."""
        return snapshots_of(self._appliance.volumes)

    async def take_snapshot(self, *, name: str) -> answers.Named:
        """Take a snapshot."""
        await self._appliance.take_snapshot(name)
        return {"name": name}

    async def drop_snapshot(self, *, id: str) -> answers.Dropped:  # noqa: A002 - the parameter's name
        """Drop a snapshot."""
        await self._appliance.drop_snapshot(id)
        return {"id": id}

    async def rename_snapshot(self, *, id: str, name: str) -> answers.Renamed:  # noqa: A002 - the parameter's name
        """Rename a snapshot."""
        await self._appliance.rename_snapshot(id, name)
        return {"id": id, "name": name}

    async def mark(self, *, name: str) -> answers.Named:
        """Set a mark."""
        await self._appliance.mark(name)
        return {"name": name}

    async def sync(self) -> answers.Syncs:
        """Sync."""
        return await self._appliance.sync()

    async def pin(self, *, id: str) -> answers.Pinned:  # noqa: A002 - the parameter's name
        """Pin a snapshot."""
        await self._appliance.pin(id)
        return {"id": id, "pinned": True}

    async def unpin(self, *, id: str) -> answers.Pinned:  # noqa: A002 - the parameter's name
        """Take a pin off."""
        await self._appliance.unpin(id)
        return {"id": id, "pinned": False}

    async def thin(self, *, dry_run: bool) -> answers.Thinned:
        """Thin the snapshots, or say what that would do."""
        return await self._appliance.thin(dry_run=dry_run)

    async def tap(self, *, action: str, volume: str | None) -> answers.Taps:
        """Attach, detach or show mapped devices."""
        return await self._appliance.tap(action, volume)

    async def clones(self) -> answers.Clones:
        """Answer with all clones."""
        return clones_of(self._appliance.volumes)

    async def create_clone(self, *, name: str, at: str | None) -> answers.Named:
        """Make a clone."""
        await self._appliance.create_clone(name, at)
        return {"name": name}

    async def drop_clone(self, *, name: str) -> answers.Named:
        """Drop a clone."""
        await self._appliance.drop_clone(name)
        return {"name": name}

    async def read(self, *, volume: str, at: str, offset: int, length: int) -> Response:
        """Answer with bytes of an image."""
        image = image_at(self._appliance.volumes, volume, at)
        check_range(image, offset, length)
        parts = self._appliance.read_at(image, offset, length)
        first = await anext(parts, b"")  # from here on the image is held, and most errors would have come
        return StreamingResponse(_joined(first, parts), headers={"content-length": str(length)}, media_type=BYTES)

    async def diff(self, *, volume: str, a: str, b: str) -> Response:
        """Answer with what was written between two moments."""
        return Response(await self._appliance.diff(volume, a, b), media_type="application/json")

    async def verify(self, *, volume: str, rate: int | None) -> Response:
        """Verify, and tell how far that is until it is done."""
        return _Told(self._appliance.begin_check(VERIFY, volume, rate))

    async def resync(self, *, volume: str, rate: int | None) -> Response:
        """Resync, likewise."""
        return _Told(self._appliance.begin_check(RESYNC, volume, rate))

    async def scrub(self, *, volume: str, rate: int | None) -> Response:
        """Scrub, likewise."""
        return _Told(self._appliance.begin_check(SCRUB, volume, rate))


def _document() -> Answer:
    from dmafs.service.openapi import document  # noqa: PLC0415 - a daemon that nobody asks for it never needs it

    return document()


class _Told(StreamingResponse):
    """How far a check is, to its end; it is given up when nobody listens any more."""

    def __init__(self, check: Check) -> None:
        super().__init__(_events(check), media_type=EVENTS, headers={"cache-control": "no-store"})
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._check.abandon()


async def _events(check: Check) -> AsyncIterator[str]:
    while not check.done.is_set():
        yield _event("progress", check.report())
        with trio.move_on_after(TOLD_S):
            await check.done.wait()
    if check.scrubbed is not None:
        yield _event("result", scrubbed_of(check.volume, check.scrubbed))
    elif check.found is not None:
        yield _event("result", differences_of(check.volume, check.found))
    else:
        failure = check.failure or ControlError(f"volume {check.volume}: the {check.kind} was given up")
        yield _event("error", _shown(failure))


def _event(name: str, data: Mapping[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"  # JSON as dumps writes it has no line breaks


async def _joined(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        yield first
        async for part in rest:
            yield part


def _answering(operation: Operation, handler: Callable[..., Awaitable[Answer]]) -> Endpoint:
    """Check what is asked for, and turn answers and errors of the tree into responses."""

    async def answer(request: Request) -> Response:
        try:
            if request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers:
                raise InputError("a request to the control interface has a body", hint="all it says is in its URL")
            answered = await handler(**operation.read(request.query_params.multi_items()))
        except DmafsError as error:
            return JSONResponse(_shown(error), status_code=_status_of(error))
        return answered if isinstance(answered, Response) else JSONResponse(answered)

    return answer


def _status_of(error: DmafsError) -> int:
    """Return the status; a tap that can't is outside of the daemon: nothing of its own has failed."""
    return _STATUS.get(error.errno, 409 if isinstance(error, TapError) else 500)


def _shown(error: DmafsError) -> answers.Error:
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
    exposition: Exposition,
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
