"""COCO's archives from a server of our own: resumed, checked, unpacked; what is wrong with them, each told."""

from __future__ import annotations

import errno
import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sbrush.console import SbrushError
from sbrush.evaluate.coco import download
from sbrush.evaluate.coco.download import ARCHIVES, Archive, fetch_coco
from sbrush.evaluate.coco.protocols import Coco

IMAGES = {"val2014/": b"", "val2014/a.jpg": bytes(range(256)) * 8000, "val2014/b.jpg": b"b", "other/c.jpg": b"c"}
CAPTIONS = {"annotations/captions_val2014.json": b"{}", "annotations/instances_val2014.json": b"[]"}


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serves `content` under any name; keeps what was asked for."""

    content: bytes
    cut: int | None = None  # bytes after which the connection ends
    ranges: bool = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []

    def archive(self, members: dict[str, bytes], pattern: str = "val2014/*.jpg") -> Archive:
        self.content = zipped(members)
        url = f"http://127.0.0.1:{self.server_address[1]}/it.zip"
        return Archive(url, len(self.content), hashlib.md5(self.content).hexdigest(), pattern, 3 * 10**6)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        whole = self.server.content
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.send_header("Content-Length", str(len(whole) - start))
        self.end_headers()
        self.wfile.write(whole[start : self.server.cut])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as it:
        thread = threading.Thread(target=it.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield it
        it.shutdown()
        thread.join()


def test_fetches_what_is_wanted_and_once(server: Server, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "mine.json").write_text("kept")
    captions = server.archive(CAPTIONS, ARCHIVES[0].members)
    fetch_coco(tmp_path, [captions])
    (tmp_path / captions.name).unlink()
    images = server.archive(IMAGES, ARCHIVES[1].members)
    fetch_coco(tmp_path, [captions, images])
    there = {str(f.relative_to(tmp_path)): f.read_bytes() for f in tmp_path.rglob("*.j*") if f.is_file()}
    assert there == {
        "annotations/mine.json": b"kept",
        "annotations/captions_val2014.json": b"{}",
        "val2014/a.jpg": IMAGES["val2014/a.jpg"],
        "val2014/b.jpg": b"b",
    }
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*.partial"))
    fetch_coco(tmp_path, [captions, images])
    assert server.asked == [None, None]


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(server: Server, tmp_path: Path, ranges: bool) -> None:
    """With a server that can go on in the middle, and with one that answers 200 with everything."""
    archive = server.archive(IMAGES)
    server.cut = 1_500_000
    with pytest.raises(SbrushError, match="broke off") as stopped:
        fetch_coco(tmp_path, [archive])
    assert "goes on" in stopped.value.hint and not (tmp_path / "val2014").exists()
    have = (tmp_path / "it.zip.partial").stat().st_size
    assert 0 < have <= 1_500_000
    server.cut, server.ranges = None, ranges
    fetch_coco(tmp_path, [archive])
    assert server.asked == [None, f"bytes={have}-"]
    assert (tmp_path / "val2014" / "a.jpg").read_bytes() == IMAGES["val2014/a.jpg"]


def test_a_wrong_checksum_is_thrown_away_but_not_ones_own_file(server: Server, tmp_path: Path) -> None:
    archive = server.archive(IMAGES)
    server.content = server.content[:-1] + b"?"
    with pytest.raises(SbrushError, match="has MD5"):
        fetch_coco(tmp_path, [archive])
    assert not list(tmp_path.glob("it.zip*")) and not (tmp_path / "val2014").exists()
    (tmp_path / "it.zip").write_bytes(server.content)
    with pytest.raises(SbrushError, match="has MD5"):
        fetch_coco(tmp_path, [archive])
    assert (tmp_path / "it.zip").exists() and len(server.asked) == 1


@pytest.mark.parametrize("name", ["val2014/../../out.jpg", "val2014/sub/a.jpg", "val2014/..\\out.jpg"])
def test_a_member_that_leads_elsewhere(server: Server, tmp_path: Path, name: str) -> None:
    archive = server.archive({"val2014/a.jpg": b"a", name: b"out"})
    with pytest.raises(SbrushError, match="outside its folder"):
        fetch_coco(tmp_path / "coco", [archive])
    assert not (tmp_path / "coco" / "val2014").exists() and not list(tmp_path.rglob("*out.jpg"))


def test_more_than_there_should_be(server: Server, tmp_path: Path) -> None:
    archive = server.archive({"val2014/a.jpg": bytes(4 * 10**6)})
    with pytest.raises(SbrushError, match="holds more"):
        fetch_coco(tmp_path, [archive])
    with pytest.raises(SbrushError, match="holds less"):
        fetch_coco(tmp_path, [replace(archive, members="train2014/*.jpg")])


def test_no_room_and_no_server(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = server.archive(IMAGES)
    with pytest.raises(SbrushError, match=r"needs .* MB"):
        fetch_coco(tmp_path, [replace(archive, unpacked=10**18)])
    with pytest.raises(SbrushError, match="cannot fetch"):
        fetch_coco(tmp_path, [replace(archive, url="http://127.0.0.1:1/it.zip")])
    assert server.asked == []

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.shutil, "copyfileobj", full)  # as when another fills the disk
    with pytest.raises(SbrushError, match="No space left"):
        fetch_coco(tmp_path, [archive])
    assert not (tmp_path / "val2014").exists() and (tmp_path / "it.zip").exists()


def test_nothing_is_fetched_unasked_and_what_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(SbrushError, match=r"captions_val2014\.json") as missing:
        Coco.read(tmp_path)
    for words in ("--download", "zips/val2014.zip (6,645 MB)", "annotations_trainval2014.zip (253 MB)", "--coco-root"):
        assert words in missing.value.hint
    assert not list(tmp_path.iterdir())
