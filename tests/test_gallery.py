"""Images that another tool made: their order, the captions beside them, their identity."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest

from sbrush.console import SbrushError
from sbrush.evaluate.coco.gallery import Gallery
from sbrush.evaluate.coco.protocols import Coco
from sbrush.sampling.image_folder import read_captions


def fill(folder: Path, *names: str, **texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode())
    for name, text in texts.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return folder


def names(gallery: Gallery) -> list[str]:
    return [file.name for file in gallery.files]


def coco(count: int = 12, step: int = 37) -> Coco:
    """COCO as it is: sparse image numbers, in no order."""
    order = [(7 * i) % count for i in range(count)]
    files = [Path(f"COCO_val2014_{42 + step * i:012d}.jpg") for i in order]
    return Coco([f"caption {i}" for i in range(count)], files)


@pytest.mark.parametrize(
    "pattern",
    [
        "{}.png", "{:05d}.jpg", "sample_{}.png", "IMG-{:04d}.JPEG", "step-000500_seed7_{}.webp", "({}) of 12.png",
        "2024-01-02 é {}.tiff", "{}_x4.png", "a{}b.bmp",
    ],
)  # fmt: skip
def test_numbers_anywhere_in_the_name_are_captions_numbers(tmp_path: Path, pattern: str) -> None:
    """In their order as numbers, 10 behind 9, whatever is hidden or no image beside them."""
    expected = [pattern.format(i) for i in range(12)]
    fill(tmp_path, *reversed(expected), "._" + expected[0], ".DS_Store", "Thumbs.db", ".hidden.png", "notes.md")
    (tmp_path / "folder.png").mkdir()
    read = Gallery.read(tmp_path)
    assert read.captions is None
    paired = read.with_coco(coco(), captioned=True)
    assert names(paired) == expected and paired.captions == coco().captions
    assert paired.source == "COCO's own" and paired.rule == "the numbers in the file names, from 0"


def test_zeros_may_lead_in_some_names_and_capitals_differ(tmp_path: Path) -> None:
    expected = [f"Image{i:05d}.png" if i % 2 else f"image{i}.PNG" for i in range(12)]
    assert names(Gallery.read(fill(tmp_path, *expected)).with_coco(coco(), captioned=True)) == expected


@pytest.mark.parametrize(
    "given, says",
    [
        (["1.png", "2.png"], "has no image 0: 1.png comes there"),
        (["0.png", "2.png"], "has no image 1: 2.png comes there"),
        (["0.png", "1.png", "00001.jpg"], "two images with the number 1: 00001.jpg and 1.png"),
        (["a_0.png", "a_1.png", "grid.png"], "names like a_0.png, and grid.png"),
        (["img-0.png", "img-1.png", "img-1 (1).png"], r"names like img-0.png, and img-1 \(1\).png"),
        (["0-77.png", "1-90.png"], "two numbers differ from image to image in .*: 0-77.png and 1-90.png"),
        (["0.5.png", "1.7.png"], "two numbers differ"),
        (["cat.png", "dog.png"], "nothing tells which caption cat.png is of"),
    ],
)
def test_names_that_would_shift_captions(tmp_path: Path, given: list[str], says: str) -> None:
    read = Gallery.read(fill(tmp_path, *given))
    with pytest.raises(SbrushError, match=says) as problem:
        read.with_coco(coco(), captioned=True)
    assert problem.value.code == 2 and problem.value.hint
    unscored = read.with_coco(coco(), captioned=False)  # FID alone takes them in any order
    assert names(unscored) == sorted(given) and "no score depends" in unscored.rule


@pytest.mark.parametrize(
    "pattern", ["COCO_val2014_{:012d}.png", "{:012d}.png", "{}.jpg", "out/COCO_val2014_{:012d}_x2.png"]
)
def test_cocos_names_are_its_images(tmp_path: Path, pattern: str) -> None:
    """Each has the caption of COCO's image of that name, in COCO's order; all, or some of them."""
    everything, pattern = coco(), pattern.split("/")[-1]
    images = [int(file.stem.split("_")[-1]) for file in everything.files]
    expected = [pattern.format(image) for image in images]
    read = Gallery.read(fill(tmp_path / "all", *expected)).with_coco(everything, captioned=True)
    assert names(read) == expected and read.captions == everything.captions and read.source == "COCO's own"
    assert read.rule.startswith("COCO's ")
    some = Gallery.read(fill(tmp_path / "some", *expected[3:9])).with_coco(everything, captioned=True)
    assert names(some) == expected[3:9] and some.captions == everything.captions[3:9]
    assert some.source == "COCO's own, of the images that the files are named for"
    fill(tmp_path / "some", pattern.format(10**6))
    with pytest.raises(SbrushError, match=r"names of COCO's images, and|has no image 0"):
        Gallery.read(tmp_path / "some").with_coco(everything, captioned=True)


ROWS = [("b.png", "a dog,\nbrown"), ("a.png", "a cat")]
CELLS = "".join(f'"{text}",{name}\n' for name, text in ROWS)
TABLES = {
    "metadata_jsonl": "".join(json.dumps({"file_name": n, "text": t}) + "\n" for n, t in ROWS),
    "captions_csv": "text,file_name\n" + CELLS,
    "captions_tsv": "text\tfile_name\tn\n" + "".join(f'"{t}"\t./{n}\t1\n' for n, t in ROWS),
    "metadata_csv": "\ufeffCaption;Filename\r\n" + CELLS.replace(",b", ";b").replace(",a", ";a"),
    "captions_json": json.dumps([{"image": n, "prompt": t} for n, t in ROWS]),
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_goes_by_names(tmp_path: Path, table: str) -> None:
    read = Gallery.read(fill(tmp_path, "a.png", "b.png", "._a.png", **{table: TABLES[table]}))
    assert [(f.name, c) for f, c in zip(read.files, read.captions or [], strict=True)] == ROWS
    assert read.source == f"{table.replace('_', '.')} beside the images" and read.rule.startswith("the file names in")
    given = read_captions(tmp_path / table.replace("_", "."))
    (tmp_path / "captions.txt").write_text("another\ntwo\n")
    assert Gallery.read(tmp_path, given).files == read.files  # --captions goes by names as well, and goes first


def test_a_table_of_captions_has_a_column_of_choice(tmp_path: Path) -> None:
    table = "file_name,title,text\na.png,one,three\nb.png,two,four\n"
    read = Gallery.read(fill(tmp_path, "a.png", "b.png", metadata_csv=table), column="title")
    assert read.captions == ["one", "two"]
    for beside in ({}, {"captions_txt": "one\ntwo\n"}):
        folder = fill(tmp_path / f"{len(beside)}", "a.png", "b.png", **beside)
        with pytest.raises(SbrushError, match="column"):
            Gallery.read(folder, column="title")


def test_names_are_compared_in_one_normal_form(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "é.png")
    fill(tmp_path, decomposed, "b.png", metadata_csv="file_name,text\né.png,one\nb.png,two\n")
    assert names(Gallery.read(tmp_path)) == [decomposed, "b.png"]
    fill(tmp_path, "é.png")
    with pytest.raises(SbrushError, match=r"differ, as in é\.png"):
        Gallery.read(tmp_path)


@pytest.mark.parametrize(
    "content", ["first\nsecond\n", "first\rsecond\r", "\ufefffirst\r\nsecond\r\n\r\n", "first\nsecond"]
)
@pytest.mark.parametrize(
    "given", [["a.png", "b.png"], ["x0.png", "x1.png"], ["1.png", "2.png"], ["é 0 x.jpg", "é 1 x.jpg"]]
)
def test_lines_go_with_the_images_order(tmp_path: Path, content: str, given: list[str]) -> None:
    fill(tmp_path, *reversed(given), "._" + given[0])
    (tmp_path / "captions.txt").write_bytes(content.encode())
    read = Gallery.read(tmp_path)
    assert names(read) == given and read.captions == ["first", "second"]
    assert read.source == "captions.txt beside the images" and "line i of captions.txt" in read.rule
    (tmp_path / "captions.txt").rename(tmp_path / "list.csv.txt")
    listed = Gallery.read(tmp_path, read_captions(tmp_path / "list.csv.txt"))
    assert names(listed) == given and listed.source == str(tmp_path / "list.csv.txt")


def test_a_text_beside_each_image(tmp_path: Path) -> None:
    fill(tmp_path, "cat.png", "10.jpg", "9.jpg", cat_txt="a cat\n", **{"10_txt": "ten", "9_txt": "\nnine\n"})
    read = Gallery.read(tmp_path)
    assert dict(zip(names(read), read.captions or [], strict=True)) == {
        "cat.png": "a cat",
        "10.jpg": "ten",
        "9.jpg": "nine",
    }
    fill(tmp_path, **{"9_txt": "a cat\nSteps: 20\n"})
    with pytest.raises(SbrushError, match=r"9\.txt has 2 lines, and is a caption by its name"):
        Gallery.read(tmp_path)
    (tmp_path / "9.txt").unlink()
    with pytest.raises(SbrushError, match=r"9\.jpg has no caption 9\.txt beside it"):
        Gallery.read(tmp_path)


@pytest.mark.parametrize(
    "texts, says",
    [
        ({"captions_txt": "one\n"}, "captions.txt has 1 caption for 2 images"),
        ({"captions_txt": "one\n\n"}, "1 caption for 2"),
        ({"captions_txt": "one\n\ntwo\n"}, "line 2 of .*captions.txt is empty"),
        ({"captions_txt": "one\ntwo\nthree\n"}, "3 captions for 2"),
        ({"captions_txt": "\n"}, "captions.txt is empty"),
        ({"metadata_jsonl": '{"file_name": "a.png", "text": "a"}\n'}, "differ, as in b.png"),
        ({"metadata_jsonl": TABLES["metadata_jsonl"] * 2}, "differ, as in a.png"),
        ({"metadata_csv": "file_name,text\na.png,x\nb.png,y\n../c.png,z\n"}, "differ, as in ../c.png"),
        ({"metadata_jsonl": '{"file_name": "a.png"'}, "is no JSON: line 1"),
        ({"metadata_jsonl": '{"file_name": "a.png", "text": 3}\n'}, "row 1 .* its 'text' is a number, not text"),
        ({"metadata_csv": "name,title\na.png,x\n"}, "no column called prompt, caption or text; it has 'name', 'title'"),
        ({"metadata_csv": "name,caption\na.png,x\nb.png,y\n"}, "other columns than captions, and none of file names"),
        ({"metadata_csv": "file_name,text\na.png,x\nb.png\n"}, "row 2 of .*metadata.csv is empty"),
        ({"metadata_csv": "file_name,text\na.png\n"}, "column 'text' of .* is empty"),
        ({"captions_txt": "one\ntwo\n", "captions_csv": TABLES["captions_csv"]}, "captions.csv and captions.txt"),
    ],
)
def test_captions_that_do_not_fit(tmp_path: Path, texts: dict[str, str], says: str) -> None:
    with pytest.raises(SbrushError, match=says) as problem:
        Gallery.read(fill(tmp_path, "a.png", "b.png", **texts))
    assert problem.value.code == 2 and "Error" not in str(problem.value)


def test_lines_do_not_go_with_numbers_that_have_gaps(tmp_path: Path) -> None:
    fill(tmp_path, "0.png", "2.png", captions_txt="one\ntwo\n")
    with pytest.raises(SbrushError, match="has no image 1"):
        Gallery.read(tmp_path)


def test_fewer_images_than_captions_are_counted_from_0_or_refused(tmp_path: Path) -> None:
    """Numbers from 1 on may be captions 1, 2 as well as the first two."""
    folder = fill(tmp_path / "images", "1.png", "2.png")
    (tmp_path / "list.txt").write_text("one\ntwo\nthree\n", encoding="utf-8")
    with pytest.raises(SbrushError, match="has no image 0"):
        Gallery.read(folder, read_captions(tmp_path / "list.txt"))


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    fill(tmp_path, "notes.md", "._0.png", captions_txt="one\n")
    with pytest.raises(SbrushError, match="has no images") as problem:
        Gallery.read(tmp_path)
    assert problem.value.code == 2 and f"--images {tmp_path}/train" in problem.value.hint


def test_what_is_passed_over_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Gallery.read(fill(tmp_path, "0.png", ".DS_Store", "Thumbs.db", "notes.md", "x.npz", captions_txt="one\n"))
    told = capsys.readouterr().err
    assert told.count("note:") == 1 and told.splitlines()[0].endswith("notes.md, x.npz") and "1 caption from" in told


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SbrushError, match="cannot read"):
        Gallery.read(tmp_path / "none")
    for name in ("captions.txt", "metadata.csv"):
        folder = fill(tmp_path / name, "a.png")
        (folder / name).write_bytes(b"\xff\xfe\x00")
        with pytest.raises(SbrushError, match="begins as UTF-16"):
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
