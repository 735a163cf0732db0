"""`sbrush serve` on a true port: clients that are slow, hostile or gone; a port in use; SIGTERM."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest

from conftest import sbrush
from sbrush.serving import connection, guard
from sbrush.serving.server import Capacity
from serving import answer, draw_body, listening, load, raw, send
from test_serve_engine import SECONDS, Gated

JSON = b"Content-Type: application/json\r\n"


def post(body=None, *headers, length=None):
    """The bytes of a request for an image."""
    body = draw_body() if body is None else body
    length = len(body) if length is None else length
    head = b"POST /api/draw HTTP/1.1\r\nHost: localhost\r\n" + JSON + b"Content-Length: %d\r\n" % length
    return head + b"".join(header + b"\r\n" for header in headers) + b"\r\n" + body


@pytest.fixture(scope="module")
def artist(tiny_teacher):
    one = load(tiny_teacher)
    gated = Gated(one.student, one.precision)
    gated.gate.set()
    return gated


@pytest.fixture
def server(artist):
    with listening(artist) as whole:
        yield whole


def status(answer):
    return int(answer.split()[1]) if answer else None


def until(condition, seconds=SECONDS):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n", 400),  # TLS
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 10_000 + b"\r\n", 431),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n", 400),
        (post(b"", length=10**12), 413),
        (post(b"0\r\n\r\n", b"Transfer-Encoding: chunked"), 400),
        (b"GET /../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (b"GET /%00%ff%2f..%2f HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", 403),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n", 200),
    ],
    ids=range(14),
)  # fmt: skip
def test_requests_that_are_none(server, sent, code):
    assert status(raw(server[0], sent)) == code
    assert status(raw(server[0], post(None, b"Connection: close"))) == 200  # and the server goes on


def test_headers_that_never_end(server, monkeypatch):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.3)
    for sent in ((), (b"GET / HTTP/1.1\r\nHost: loc",)):
        start = time.monotonic()
        answer = raw(server[0], *sent)
        assert b"408 Request Timeout" in answer and time.monotonic() - start < 10, sent


def test_a_body_that_never_ends(server, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    assert status(raw(server[0], post(b'{"prompt": ', length=100))) == 408


def test_a_client_that_does_not_read(artist, monkeypatch):
    monkeypatch.setattr(connection, "READING_SECONDS", 0.3)
    with listening(artist) as (address, _):
        host, port = address.removeprefix("http://").rstrip("/").split(":")
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.connect((host, int(port)))
            page = b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n"

            def send_until_cut():
                with pytest.raises(OSError):
                    while True:
                        client.sendall(page * 100)

            sending = threading.Thread(target=send_until_cut)
            sending.start()
            sending.join(SECONDS)
            assert not sending.is_alive()


def test_a_client_that_goes_away_drops_its_work(artist):
    with listening(artist, capacity=Capacity(batch=1)) as (address, service):
        artist.gate.clear()
        artist.batches.clear()  # of the warming up, and of other tests
        host, port = address.removeprefix("http://").rstrip("/").split(":")
        clients = [socket.create_connection((host, int(port))) for _ in range(3)]
        for number, client in enumerate(clients):
            client.sendall(post(draw_body(prompt=f"client {number}")))
            until(lambda number=number: service.engine.waiting == number)
        clients[1].close()
        until(lambda: service.engine.waiting == 1)
        artist.gate.set()
        for client in (clients[0], clients[2]):
            assert b"200 OK" in client.recv(65536)
            client.close()
        assert ["client 2"] in artist.batches and ["client 1"] not in artist.batches
        until(
            lambda: service.counters.registry.get_sample_value("sbrush_dropped_total", {"reason": "disconnected"}) == 1
        )


def test_a_full_queue_says_when_to_try_again(artist):
    with listening(artist, capacity=Capacity(batch=1, waiting=1)) as (address, service), httpx2.Client() as client:
        artist.gate.clear()
        artist.batches.clear()  # of the warming up, and of other tests
        threads = []
        for waiting in (0, 1):
            threads.append(threading.Thread(target=raw, args=(address, post(None, b"Connection: close"))))
            threads[-1].start()
            until(lambda waiting=waiting: ["a cat"] in artist.batches and service.engine.waiting == waiting)
        for path, fields in (("api/draw", {}), ("v1/images/generations", {}), ("sdapi/v1/txt2img", {})):
            answer = client.post(address + path, json={"prompt": "a cat", **fields})
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "queue_full"
        assert client.get(f"{address}health").json() == {"status": "ok", "waiting": 1}
        artist.gate.set()
        for thread in threads:
            thread.join()


def test_a_newer_keystroke_replaces_what_waits(artist):
    with listening(artist, capacity=Capacity(batch=1)) as (address, service):
        artist.gate.clear()
        artist.batches.clear()  # of the warming up, and of other tests
        answers = {}

        def ask(turn):
            body = draw_body(prompt=f"turn {turn}", client="me", turn=turn)
            answers[turn] = status(raw(address, post(body, b"Connection: close")))

        threads = [threading.Thread(target=ask, args=(turn,)) for turn in (1, 2, 3)]
        for waiting, thread in zip((0, 1, 1), threads, strict=True):
            thread.start()
            until(lambda waiting=waiting: service.engine.waiting == waiting and len(artist.batches) > 0)
            time.sleep(0.3)
        threads[1].join()
        artist.gate.set()
        for thread in threads:
            thread.join()
    assert answers == {1: 200, 2: 204, 3: 200}


# ---- the process


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = sbrush("serve", "--port", port)
    assert done.returncode == 1 and done.stderr.splitlines()[0] == f"error: port {port} is in use"
    assert f"--port {port + 1}" in done.stderr and "loading" not in done.stderr


def test_a_student_that_is_none(tmp_path):
    (tmp_path / "unet").mkdir()
    done = sbrush("serve", "--port", 0, "--student", tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "has no tokenizer/" in done.stderr


def test_sigterm_finishes_what_is_under_way(tiny_teacher):
    """A true process: 12 requests are under way when it is told to stop; all are answered, and it ends with 0."""
    command = [sys.executable, "-m", "sbrush", "serve", "--port", "0", "--student", str(tiny_teacher), "--batch", "1"]
    environment = {**os.environ, "SBRUSH_API_KEY": "correct-horse"}
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        address = started.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address), started.stderr.read()
        request = post(None, b"Authorization: Bearer correct-horse", b"Connection: close")
        connections = [send(address, request) for _ in range(12)]
        # A server takes connections in their order: when a later one has its answer, these are all under way.
        raw(address, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        started.send_signal(signal.SIGTERM)
        codes = [status(answer(connection)) for connection in connections]
        out, err = started.communicate(timeout=SECONDS)
    finally:
        started.kill()
    assert codes == [200] * 12 and started.returncode == 0, err
    assert out == "" and "stopped; 12 images drawn" in err and "cat" not in err
