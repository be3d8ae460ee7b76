"""The port for metrics: HTTP over TCP, for who collects them; off unless the configuration names an address.

It serves ``GET /metrics`` and nothing else, to anybody who reaches it, with the control interface's limits and fewer
connections (``admission``).
"""

from __future__ import annotations

import errno
import socket

import trio

from dmafs.errors import ControlError
from dmafs.service.admission import SCRAPERS_MAX, ScraperAdmission
from dmafs.service.control import metrics_application, serve_requests
from dmafs.service.exposition import Exposition


async def serve_metrics(
    exposition: Exposition, address: tuple[str, int], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve at an address until cancelled; ControlError if it can't be had."""
    listener = listen(address)
    task_status.started()
    await serve_requests(listener, metrics_application(exposition), ScraperAdmission)


def listen(address: tuple[str, int]) -> socket.socket:
    """Return a socket that listens at an address, a numeric one and a port."""
    host, port = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(SCRAPERS_MAX)
    except OSError as error:
        listener.close()
        hint = "give a free one in [metrics] listen, or leave that out"
        if error.errno == errno.EACCES:
            hint = "give a port from 1024 on in [metrics] listen: the daemon has no right to lower ones"
        raise ControlError(
            f"port {port} of {host} can't be had for metrics: {(error.strerror or '').lower()}",
            hint=hint,
        ) from error
    return listener
