"""A server of `sbrush serve` within the tests' own process, on a real port or as an ASGI app."""

from __future__ import annotations

import contextlib
import json
import socket
import threading

from sbrush.sampling.files import SampleRequest, load_artist
from sbrush.sampling.targets import Images, Target
from sbrush.serving.address import Access, bind, url
from sbrush.serving.server import Capacity, create_server, warm_service


def load(student, runtime="torch"):
    """The artist of a student's folder, as `sbrush serve` loads it; None is the built-in student."""
    source = None if student is None else str(student)
    return load_artist(SampleRequest(Images(["a cat"], [0]), Target(None), student=source, runtime=runtime))


@contextlib.contextmanager
def listening(artist, access=Access(), capacity=Capacity(), **options):  # noqa: B008
    """The address of a server on a free port, and its service; stopped as by SIGTERM at the end."""
    with bind("127.0.0.1", 0) as sock, warm_service(artist, capacity, **options) as service:
        server = create_server(service, access)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        address = url(sock)
        thread.start()
        try:
            yield address, service
        finally:
            server.should_exit = True
            thread.join()


def send(address, *pieces, seconds=20):
    """A connection to a server on which these bytes are sent."""
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    connection = socket.create_connection((host, int(port)), timeout=seconds)
    for piece in pieces:
        connection.sendall(piece)
    return connection


def answer(connection):
    """Whatever a server answers on a connection, until it closes it."""
    found = b""
    with connection, contextlib.suppress(ConnectionResetError):
        while some := connection.recv(65536):
            found += some
    return found


def raw(address, *pieces, seconds=20):
    """Whatever a server answers to bytes, until it closes the connection."""
    return answer(send(address, *pieces, seconds=seconds))


def draw_body(**fields):
    return json.dumps({"prompt": "a cat", "seed": 1} | fields).encode()
