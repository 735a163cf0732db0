"""`sbrush sample` and its files: names, grids, what is there already, work that was stopped, stdout."""

import io
import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import build_tiny_teacher, sbrush
from sbrush.console import SbrushError
from sbrush.models import load
from sbrush.models.load import load_teacher
from sbrush.sampling import artist, files, images
from sbrush.sampling.files import SampleRequest, sample_to_files
from sbrush.sampling.targets import MOST_IN_GRID, Images, Target, read_record, slug


def assert_refused(done, said, code=2):
    assert done.returncode == code, done.stderr
    assert f"error: {said}" in done.stderr and "hint: " in done.stderr, done.stderr


@pytest.fixture
def student(tmp_path, tiny_teacher) -> Path:
    """A folder that says of itself that it is a student of the tiny teacher."""
    folder = tmp_path / "student"
    shutil.copytree(tiny_teacher, folder)
    (folder / "sbrush.json").write_text(json.dumps({"format": 1, "teacher": str(tiny_teacher), "recipe": {}}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- names


@given(st.lists(st.text(st.characters(exclude_characters="\x00"), min_size=1, max_size=300), max_size=12))
def test_names_are_distinct_short_and_in_the_prompts_order(prompts):
    asked = Images(prompts, [3, 10])
    names = [asked.name(i) for i in range(len(asked))]
    folded = [name.casefold() for name in names]  # as file systems compare that do not tell cases apart
    assert len(set(folded)) == len(names)
    assert [name[:4] for name in names] == [f"{i:04d}" for i in range(1, len(prompts) + 1) for _ in range(2)]
    assert all(len(os.fsencode(name)) <= 120 and "/" not in name and name.isprintable() for name in names)


def test_a_name_tells_place_prompt_and_seed():
    assert Images(["a cat", "A cat"], [3]).name(1) == "0002-a-cat-seed3.png"
    assert Images([str(i) for i in range(12_345)], [0]).name(6) == "00007-6-seed0.png"
    assert len(os.fsencode(Images(["\U00020000" * 300], [10**18 - 1]).name(0))) <= 120
    assert slug("../../etc/passwd") == "etc-passwd" and slug("?!") == "prompt"
    assert slug("e\u0301te\u0301") == slug("\u00e9t\u00e9") == "\u00e9t\u00e9"  # one form of Unicode's two


def test_a_file_system_that_has_no_such_letters(monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("latin-1"))
    monkeypatch.setattr(os, "fsdecode", lambda name: name.decode("latin-1"))
    assert slug("a \u732b caf\u00e9") == "a---caf\u00e9"


def test_prompts_that_are_alike_and_a_prompt_of_wide_letters(tmp_path, tiny_teacher):
    wide = "\U00020000" * 60  # four bytes each
    done = sbrush("sample", "a cat", "A cat", "a cat 1", wide, "--student", tiny_teacher, "-o", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    paths = [Path(line) for line in done.stdout.splitlines()]
    assert len(paths) == len(set(paths)) == len(list((tmp_path / "o").iterdir())) == 4 and all(
        p.is_file() for p in paths
    )
    assert [read_record(p)["prompt"] for p in paths] == ["a cat", "A cat", "a cat 1", wide]


# --- one at a time


class Stub:
    """A student without networks: an image says its seed. `alive`: the images that are in memory."""

    name, image_size, about = "stub", (8, 8), {"recipe": {}}
    loras = ()
    guidance_input, runtime, negative, decoder, fingerprint, sampler_name = None, None, None, None, "f" * 16, "Stub"

    def __init__(self, monkeypatch):
        self.alive, self.calls = weakref.WeakSet(), []
        monkeypatch.setattr(files, "open_student", lambda *_, **__: self)
        monkeypatch.setattr(artist, "student_images", self.draw)

    def rungs(self, steps):
        return (999,)

    def truncated_prompts(self, texts):
        return 0

    def draw(self, student, prompts, seeds, *, batch, **_):
        self.calls.append(list(seeds))
        for seed in seeds:
            image = torch.full((1, 3, 8, 8), seed % 256, dtype=torch.uint8)
            self.alive.add(image)
            yield image


def test_each_image_is_written_when_it_is_drawn_and_none_is_kept(tmp_path, monkeypatch):
    stub, most, written = Stub(monkeypatch), 0, 0
    request = SampleRequest(Images([f"prompt {i}" for i in range(50)], [0, 1]), Target(tmp_path, folder=True), batch=4)
    for saved in sample_to_files(request):
        written += 1
        most = max(most, len(stub.alive))
        assert saved.path.is_file() and len(stub.calls) == (written + 3) // 4  # nothing is drawn ahead
        assert len(list(tmp_path.iterdir())) == written
    assert written == 100 and most <= 5


def test_naming_is_not_quadratic(tmp_path, monkeypatch):
    """Each name is asked for a fixed number of times, however many there are."""
    Stub(monkeypatch)
    asked, name = [], Images.name
    monkeypatch.setattr(Images, "name", lambda self, index: asked.append(index) or name(self, index))
    list(sample_to_files(SampleRequest(Images([f"a cat {i}" for i in range(300)], [0]), Target(tmp_path, folder=True))))
    assert len(asked) <= 3 * 300


# --- what is there already


def test_the_same_command_goes_on_and_the_result_is_the_same_to_the_bit(tmp_path, student, monkeypatch):
    prompts, options = ["a cat", "a red dog", "a fish", "a star", "a tree"], ["--student", student, "--batch", 3]
    whole = sbrush("sample", *prompts, *options, "-o", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    save, saved = files.save_png, []

    def save_four(path, *arguments):
        if len(saved) == 4:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, *arguments)

    monkeypatch.setattr(files, "save_png", save_four)
    command = ["sample", *prompts, *options, "-o", tmp_path / "stopped"]
    stopped = sbrush(*command)
    assert stopped.returncode == 130 and "error" not in stopped.stderr
    assert "stopped: 4 of 5 images are written; to go on: sbrush sample 'a cat' 'a red dog'" in stopped.stderr
    assert len(stopped.stdout.splitlines()) == 4
    monkeypatch.undo()
    again = sbrush(*command)
    assert again.returncode == 0 and "has 4 of 5 images already" in again.stderr
    assert len(again.stdout.splitlines()) == 5  # all that were asked for
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_nothing_is_drawn_for_what_is_there(tmp_path, monkeypatch):
    stub, request = (
        Stub(monkeypatch),
        SampleRequest(Images(["a", "b", "c"], [0, 1]), Target(tmp_path, folder=True), batch=2),
    )
    assert all(saved.new for saved in sample_to_files(request))
    stub.calls.clear()
    assert not any(saved.new for saved in sample_to_files(request)) and stub.calls == []
    (tmp_path / "0002-b-seed1.png").unlink()
    again = list(sample_to_files(request))
    assert [saved.new for saved in again] == [False, False, False, True, False, False] and stub.calls == [[0, 1]]
    more = SampleRequest(Images(["a", "b", "c", "d"], [0, 1]), Target(tmp_path, folder=True))
    assert [saved.new for saved in sample_to_files(more)] == [False] * 6 + [True] * 2


@pytest.mark.parametrize("metadata", [True, False])
def test_what_was_drawn_otherwise_is_never_replaced_but_by_overwrite(tmp_path, tiny_teacher, student, metadata):
    other = build_tiny_teacher(tmp_path / "other", seed=1)
    keep = [] if metadata else ["--no-metadata"]
    folder = tmp_path / "o"

    def draw(prompt, student, *options):
        return sbrush("sample", prompt, "--student", student, "-o", folder, *keep, *options)

    assert draw("a cat", student).returncode == 0
    before = contents(folder)
    assert draw("a cat", tiny_teacher).returncode == 0  # the same weights by another name: nothing to do
    shown = f"{folder}/0001-a-cat-seed0.png is there already"
    for prompt, student_, options in [("A cat", student, ()), ("a cat", other, ()), ("a cat", student, ("--compare",))]:
        assert_refused(draw(prompt, student_, *options), shown)
    assert_refused(draw("a cat", student, "--precision", "bfloat16"), shown)
    other_way = sbrush("sample", "a cat", "--student", student, "-o", folder, *([] if keep else ["--no-metadata"]))
    assert_refused(other_way, shown)
    assert contents(folder) == before
    assert draw("a cat", other, "--overwrite").returncode == 0
    assert contents(folder).keys() == before.keys() and contents(folder) != before


def test_images_that_a_stopped_overwrite_has_left_are_not_taken_for_its_own(tmp_path, tiny_teacher):
    """Their files say nothing of how they were drawn, so the folder must not say it of them before it is so."""
    other, asked = build_tiny_teacher(tmp_path / "other", seed=1), Images(["a cat"], [0, 1, 2])

    def request(student, **more):
        return SampleRequest(asked, Target(tmp_path / "o", folder=True), str(student), metadata=False, batch=1, **more)

    assert len(list(sample_to_files(request(tiny_teacher)))) == 3
    stopped = sample_to_files(request(other, overwrite=True))
    next(stopped), next(stopped)
    stopped.close()
    with pytest.raises(SbrushError, match="is there already"):
        list(sample_to_files(request(other)))
    assert [saved.new for saved in sample_to_files(request(other, overwrite=True))] == [True] * 3
    assert [saved.new for saved in sample_to_files(request(other))] == [False] * 3


@pytest.mark.parametrize("kind", ["text", "photo", "folder", "huge chunk"])
def test_a_file_of_other_origin_is_never_replaced(tmp_path, tiny_teacher, kind):
    file = tmp_path / "0001-a-cat-seed0.png"
    if kind == "text":
        file.write_text("mine")
    elif kind == "photo":
        Image.new("RGB", (8, 8)).save(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffiTXtsbrush\0\0\0\0\0{}")
    assert read_record(file) is None
    before = None if kind == "folder" else file.read_bytes()
    done = sbrush("sample", "a cat", "--student", tiny_teacher, "-o", tmp_path)
    assert_refused(done, f"{file} is there already, and does not say how it was drawn")
    assert "loading" not in done.stderr  # which is seen at once
    assert before is None or file.read_bytes() == before


def test_a_single_file_is_replaced_and_that_is_said_but_not_without_o(tmp_path, tiny_teacher, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("out.png", "out-2.png"):
        done = sbrush("sample", "a cat", "--student", tiny_teacher)
        assert done.stdout == f"{name}\n", done.stderr
    done = sbrush("sample", "a dog", "--student", tiny_teacher, "-o", "out.png")
    assert done.stdout == "out.png\n" and "note: out.png was there, and is replaced" in done.stderr
    assert read_record(Path("out.png"))["prompt"] == "a dog"


def test_a_link_stays_a_link(tmp_path, tiny_teacher):
    real, link, loop = tmp_path / "real.png", tmp_path / "link.png", tmp_path / "loop.png"
    link.symlink_to("real.png")
    for _ in range(2):  # the file that it names is missing, then there
        assert sbrush("sample", "a cat", "--student", tiny_teacher, "-o", link).returncode == 0
        assert link.is_symlink() and real.is_file() and not real.is_symlink()
    loop.symlink_to("loop.png")
    assert_refused(sbrush("sample", "a cat", "--student", tiny_teacher, "-o", loop), f"cannot write {loop}", code=1)
    assert loop.is_symlink()


# --- grids, stdout, JSON


def test_many_seeds_are_wrapped_and_too_many_images_are_refused(tmp_path, tiny_teacher):
    out = tmp_path / "grid.png"
    assert sbrush("sample", "a cat", "--seed", "1-20", "--student", tiny_teacher, "-o", out).returncode == 0
    with Image.open(out) as image:
        assert 8 * 128 < image.width < 9 * 140 + 100 and 3 * 128 < image.height < 3 * 170
    done = sbrush("sample", "a cat", "--seed", f"0-{MOST_IN_GRID}", "--student", tiny_teacher, "-o", out)
    assert_refused(done, f"{MOST_IN_GRID + 1} images are too many for one grid")
    assert "loading" not in done.stderr and "-o images/" in done.stderr


def test_a_grid_of_large_images_is_refused_before_they_are_drawn(tmp_path, monkeypatch):
    stub = Stub(monkeypatch)
    stub.image_size = (1024, 1024)
    with pytest.raises(SbrushError, match="too large to look at"):
        list(sample_to_files(SampleRequest(Images(["a"], range(100)), Target(tmp_path / "x.png"))))
    assert stub.calls == []


def test_every_cell_of_a_wrapped_grid_is_the_image_of_its_seed(tmp_path, monkeypatch):
    Stub(monkeypatch)
    cells = []
    monkeypatch.setattr(
        files, "image_grid", lambda rows, **labels: cells.append((rows, labels)) or images.image_grid(rows)
    )
    list(sample_to_files(SampleRequest(Images(["a", "b"], list(range(10, 21))), Target(tmp_path / "x.png"))))
    rows, labels = cells[0]
    shown = [[f"seed {int(cell[0, 0, 0])}" for cell in row] for row in rows]
    assert shown == labels["cell_labels"] and [len(row) for row in rows] == [8, 3, 8, 3]
    assert labels["row_labels"] == ["a", "", "b", ""]


def test_a_label_is_cut_where_it_would_make_the_grid_wide():
    red = torch.zeros(3, 8, 8, dtype=torch.uint8)
    assert images.image_grid([[red]], row_labels=["cat " * 10_000]).width < 600


def test_one_png_on_stdout_and_nothing_else(tmp_path, tiny_teacher, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["a cat"], ["a cat", "a dog", "--seed", "1-2"]):
        done = sbrush("sample", *arguments, "--student", tiny_teacher, "-o", "-")
        assert done.returncode == 0, done.stderr
        with Image.open(io.BytesIO(done.stdout.encode(errors="surrogateescape"))) as image:
            image.load()
            assert json.loads(image.text["sbrush"])["prompt"].startswith("a cat")
    assert list(tmp_path.iterdir()) == []
    assert_refused(sbrush("sample", "a cat", "-o", "-", "--json"), "--json and -o - both want stdout")


def test_json_lists_every_image(tmp_path, tiny_teacher):
    options = ["--seed", "1,2,2", "--student", tiny_teacher, "--json"]
    done = sbrush("sample", "a cat", "a \u732b", *options, "-o", tmp_path / "o")
    many = json.loads(done.stdout)
    assert "a seed that is given twice is drawn once" in done.stderr
    assert [(x["prompt"], x["seed"]) for x in many] == [(p, s) for p in ("a cat", "a \u732b") for s in (1, 2)]
    assert all(read_record(Path(x["path"]))["seed"] == x["seed"] for x in many)
    grid = json.loads(sbrush("sample", "a cat", *options, "-o", tmp_path / "grid.png").stdout)
    assert [(x["path"], x["seed"]) for x in grid] == [(str(tmp_path / "grid.png"), s) for s in (1, 2)]


@pytest.mark.parametrize(
    ("out", "path", "folder"),
    [("-", None, False), ("a.png", "a.png", False), ("A.PNG", "A.PNG", False), ("a", "a", True), ("a.b/", "a.b", True),
     ("there.v2", "there.v2", True), ("/dev/null", "/dev/null", False), ("/dev/stdout", None, False)],
)  # fmt: skip
def test_what_o_means(tmp_path, monkeypatch, out, path, folder):
    monkeypatch.chdir(tmp_path)
    Path("there.v2").mkdir()
    assert Target.parse(out) == Target(Path(path) if path else None, folder)


@pytest.mark.parametrize("out", ["", "a.jpg", "there.png", "file", "file/", "x" * 300])
def test_what_o_cannot_mean(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    Path("there.png").mkdir()
    Path("file").write_text("mine")
    with pytest.raises(SbrushError):
        Target.parse(out).check(1)
    assert Path("file").read_text() == "mine"


# --- the teacher beside the student


def test_compare_takes_the_teacher_that_the_student_names(tmp_path, student, tiny_teacher, monkeypatch):
    loaded = []
    monkeypatch.setattr(load, "load_teacher", lambda source, **_: loaded.append(source) or load_teacher(source))

    options = ["--student", student, "--compare", "--teacher-steps", 2, "-o", tmp_path / "x.png"]
    assert sbrush("sample", "a cat", *options).returncode == 0 and loaded == [str(tiny_teacher)]
    for about, said in [
        ({"teacher": str(tmp_path / "gone")}, f"the teacher {tmp_path / 'gone'} is not there"),
        ({}, f"{student} does not say who its teacher is"),
    ]:
        (student / "sbrush.json").write_text(json.dumps({"format": 1, "recipe": {}} | about))
        done = sbrush("sample", "a cat", *options)
        assert_refused(done, said)
        assert "--teacher MODEL" in done.stderr


def test_flags_of_the_teacher_are_refused_where_none_draws():
    for flag in (["--teacher-steps", 3], ["--teacher-guidance", 2], ["--teacher", "a/b"], ["--teacher-config", "a/b"]):
        assert_refused(sbrush("sample", "a cat", *flag), f"{flag[0]} is for the teacher")


def test_a_student_that_does_not_say_how_it_was_made_is_noted(tmp_path, tiny_teacher, student):
    for folder, noted in ((tiny_teacher, True), (student, False)):
        done = sbrush("sample", "a cat", "--student", folder, "-o", tmp_path / "x.png")
        assert ("has no sbrush.json" in done.stderr) == noted
