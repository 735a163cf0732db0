"""The process behind `sbrush serve`: loads the student, listens, and on SIGTERM finishes the requests in progress."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import uvicorn

from sbrush import console
from sbrush.console import count, info, printable
from sbrush.onnx.model import is_exported
from sbrush.sampling.artist import Artist
from sbrush.sampling.files import SampleRequest, load_artist
from sbrush.serving.address import BACKLOG, Access, url
from sbrush.serving.app import create_app
from sbrush.serving.connection import Connection
from sbrush.serving.counters import Counters
from sbrush.serving.engine import Engine
from sbrush.serving.guard import LARGEST_HEADERS
from sbrush.serving.requests import image_requests
from sbrush.serving.service import Service

CONNECTIONS = 1024  # at most; more are answered with 503
IDLE_SECONDS = 15  # that a connection is kept open between two requests
STOP_SECONDS = 60  # for what is under way when the server stops
SWITCH = 0.0005  # seconds
WARM_UP = "a small red cat"


@dataclass(frozen=True)
class Capacity:
    """`batch`: images that the networks draw at once. `waiting`: images that may wait."""

    batch: int = 16
    waiting: int = 256


@contextmanager
def warm_service(artist: Artist, capacity: Capacity, *, log_prompts: bool = False) -> Iterator[Service]:
    """A service whose engine runs while this lasts and has drawn once; SbrushError if it cannot."""
    counters = Counters()
    with Engine(artist, batch=capacity.batch, waiting=capacity.waiting, on_batch=counters.count_batch) as engine:
        service = Service(artist, engine, counters, log_prompts)
        engine.submit(image_requests(WARM_UP, 0, 1, service.check_settings(None)))[0].result()
        yield service


def create_server(service: Service, access: Access) -> uvicorn.Server:
    """uvicorn with the limits that it does not set by itself."""
    config = uvicorn.Config(
        create_app(service, access), http=Connection, ws="none", lifespan="off", log_config=None, log_level="error",
        access_log=False, server_header=False, proxy_headers=False, backlog=BACKLOG, limit_concurrency=CONNECTIONS,
        h11_max_incomplete_event_size=LARGEST_HEADERS, timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=STOP_SECONDS,
    )  # fmt: skip
    return uvicorn.Server(config)


def serve(
    request: SampleRequest, sock: socket.socket, access: Access, capacity: Capacity, *, log_prompts: bool = False
) -> None:
    """Serves until a signal ends it. `request` says which student; prints the address when it is ready.

    SbrushError if the student cannot be loaded, or draws no image.
    """
    if request.runtime == "auto" and not is_exported(request.student):
        # A server starts once and draws batches: torch drew 16 stickers in two thirds of onnxruntime's processor time.
        request = replace(request, runtime="torch")
    artist = load_artist(request)
    # The engine's thread and the server's share Python's lock. By default one that wants it waits 5 ms, which is longer
    # than most of a network's layers take.
    sys.setswitchinterval(SWITCH)
    with warm_service(artist, capacity, log_prompts=log_prompts) as service:
        server = create_server(service, access)
        info(f"{printable(artist.student.name)} is ready; Ctrl-C stops")
        console.out(url(sock))
        try:
            server.run(sockets=[sock])
        except (KeyboardInterrupt, SystemExit):  # by which uvicorn passes a signal on after it has stopped
            if not server.should_exit:
                raise
        drawn = int(service.counters.registry.get_sample_value("sbrush_images_total") or 0) - 1
    info(f"stopped; {count(drawn, 'image')} drawn")
