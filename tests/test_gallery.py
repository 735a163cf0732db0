"""Images that another tool made: their order, the captions beside them, their identity."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sbrush.console import SbrushError
from sbrush.evaluate.coco.gallery import Gallery


def fill(folder: Path, *names: str, **texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode())
    for name, text in texts.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return folder


def test_numbers_are_captions_numbers(tmp_path: Path) -> None:
    names = [f"{i:05d}.png" if i % 2 else f"{i}.png" for i in range(12)]
    read = Gallery.read(fill(tmp_path, *reversed(names), "notes.txt"))
    assert [f.name for f in read.files] == names and read.captions is None


@pytest.mark.parametrize("names", [["1.png", "2.png"], ["0.png", "2.png"], ["0.png", "1.png", "00001.jpg"]])
def test_numbers_that_would_shift_captions(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(SbrushError, match="has no image") as problem:
        Gallery.read(fill(tmp_path, *names))
    assert problem.value.code == 2
    with pytest.raises(SbrushError, match=r"and grid\.png"):
        Gallery.read(fill(tmp_path, "grid.png"))


ROWS = [("b.png", "a dog, brown"), ("a.png", "a cat")]
TABLES = {
    "metadata_jsonl": "".join(json.dumps({"file_name": n, "text": t}) + "\n" for n, t in ROWS),
    "captions_csv": "text,file_name\n" + "".join(f'"{t}",{n}\n' for n, t in ROWS),
}


def test_lines_go_with_the_images_order(tmp_path: Path) -> None:
    read = Gallery.read(fill(tmp_path, "b.png", "a.png", captions_txt="first\nsecond\n"))
    assert [(f.name, c) for f, c in zip(read.files, read.captions or [], strict=True)] == [
        ("a.png", "first"),
        ("b.png", "second"),
    ]
    assert read.source == "captions.txt"


@pytest.mark.parametrize("table", TABLES)
def test_a_table_goes_by_names(tmp_path: Path, table: str) -> None:
    read = Gallery.read(fill(tmp_path, "a.png", "b.png", **{table: TABLES[table]}))
    assert [(f.name, c) for f, c in zip(read.files, read.captions or [], strict=True)] == ROWS


@pytest.mark.parametrize(
    "texts, says",
    [
        ({"captions_txt": "one\n"}, "1 captions for 2"),
        ({"captions_txt": "one\n\n"}, "1 captions for 2"),
        ({"captions_txt": "one\ntwo\nthree\n"}, "3 captions for 2"),
        ({"metadata_jsonl": '{"file_name": "a.png", "text": "a"}\n'}, "differ, as in b.png"),
        ({"metadata_jsonl": TABLES["metadata_jsonl"] * 2}, "differ, as in a.png"),
        ({"metadata_csv": "file_name,text\na.png,x\nb.png,y\n../c.png,z\n"}, "differ, as in ../c.png"),
        ({"metadata_jsonl": '{"file_name": "a.png"'}, "no table"),
        ({"metadata_jsonl": '{"file_name": "a.png", "text": 3}\n'}, "no table"),
        ({"metadata_csv": "name,caption\na.png,x\n"}, "no table"),
        ({"metadata_csv": "file_name,text\na.png\n"}, "no table"),
        ({"captions_txt": "one\ntwo\n", "captions_csv": TABLES["captions_csv"]}, "captions.txt and captions.csv"),
    ],
)
def test_captions_that_do_not_fit(tmp_path: Path, texts: dict[str, str], says: str) -> None:
    with pytest.raises(SbrushError, match=says) as problem:
        Gallery.read(fill(tmp_path, "a.png", "b.png", **texts))
    assert problem.value.code == 2 and "Error" not in says


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SbrushError, match="cannot read"):
        Gallery.read(tmp_path / "none")
    for name in ("captions.txt", "metadata.csv"):
        folder = fill(tmp_path / name, "a.png")
        (folder / name).write_bytes(b"\xff\xfe\x00")
        with pytest.raises(SbrushError, match="cannot read"):
            Gallery.read(folder)


def test_identity_is_the_bytes_in_order(tmp_path: Path) -> None:
    """Not the names or times; read once while these stay; and again once they change."""
    cache = tmp_path / "cache"
    one, two = (Gallery.read(fill(tmp_path / name, "0.png", "1.png")) for name in ("one", "two"))
    assert one.digest(2, cache) == two.digest(2, cache) != one.digest(1, cache)
    for file in cache.iterdir():
        file.write_text("0" * 64)
    assert one.digest(2, cache) == "0" * 64  # remembered
    time = one.files[1].stat().st_mtime_ns
    one.files[1].write_bytes(b"2.png")
    os.utime(one.files[1], ns=(time, time + 10**9))
    assert one.digest(2, cache) not in ("0" * 64, two.digest(2, tmp_path / "anew"))
