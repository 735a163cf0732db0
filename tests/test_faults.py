"""Disks that fail: whichever write of a command fails, and however, it ends in one error and one hint.

Nothing half-made stays behind, and the same command, given again on a disk that works, does its work.
"""

import builtins
import errno
import io
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import safetensors.torch
from PIL import Image
from safetensors import SafetensorError

from conftest import sbrush

ERRORS = [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EINVAL, errno.EIO, errno.EMFILE]


class FailingDisk:
    """Lets `good` writes below a folder succeed and fails the others; `writes` counts them all.

    A write is whatever changes the disk: a file opened for writing, a folder made, a name changed, tensors saved.
    """

    def __init__(self, folder: Path, good: int = 10**9, number: int = 0) -> None:
        self.folder, self.good, self.number, self.writes = str(folder), good, number, 0

    def write(self, path: object) -> None:
        name = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        if name.startswith(self.folder):
            self.writes += 1
            if self.writes > self.good:
                raise OSError(self.number, os.strerror(self.number), name)

    def __enter__(self) -> "FailingDisk":
        real = {f: getattr(os, f) for f in ("open", "replace", "rename", "mkdir")}
        real_open, real_save = io.open, safetensors.torch.serialize_file

        def open_(file, mode="r", *arguments, **options):
            if set(mode) & set("wax+"):
                self.write(file)
            return real_open(file, mode, *arguments, **options)

        def os_open(path, flags, *arguments, **options):
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.write(path)
            return real["open"](path, flags, *arguments, **options)

        def changing(name):
            def change(path, *arguments, **options):
                self.write(path)
                return real[name](path, *arguments, **options)

            return change

        def serialize_file(tensors, path, *arguments, **options):
            try:
                self.write(path)
            except OSError as problem:
                text = f"Error while serializing: I/O error: {problem.strerror} (os error {problem.errno})"
                raise SafetensorError(text) from None
            return real_save(tensors, path, *arguments, **options)

        self.patch = pytest.MonkeyPatch()
        for module in (builtins, io):
            self.patch.setattr(module, "open", open_)
        self.patch.setattr(os, "open", os_open)
        for name in ("replace", "rename", "mkdir"):
            self.patch.setattr(os, name, changing(name))
        self.patch.setattr(safetensors.torch, "serialize_file", serialize_file)
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def assert_ended_well(done, folder: Path, what: str) -> None:
    assert "Traceback" not in done.stderr and "this is a bug" not in done.stderr, f"{what}\n{done.stderr}"
    assert done.returncode in (0, 1, 2), what
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "hint: "))]
        assert [line.split(":")[0] for line in said] == ["error", "hint"], f"{what}\n{done.stderr}"
        assert done.stderr.splitlines()[-2:] == said, what
    half_made = [p for p in folder.rglob("*") if "partial" in p.name or p.name.endswith(".old")]
    assert not half_made, f"{what} left {half_made}"
    for file in folder.rglob("*.png"):
        with Image.open(file) as image:
            image.load()


def every_write_fails_once(folder: Path, cases: int, *command: object, **environment: str) -> None:
    """Runs a command on a disk that fails at `cases` of its writes, each time in an empty folder, then once more."""

    def run(disk: FailingDisk):
        with disk:
            return sbrush(*command, **environment)

    folder.mkdir()
    counted = FailingDisk(folder)
    assert (whole := run(counted)).returncode == 0, whole.stderr
    assert counted.writes > 1
    chance = random.Random(0)
    places = sorted(chance.sample(range(counted.writes), min(cases, counted.writes)))
    for case, good in enumerate(places):
        number = ERRORS[case % len(ERRORS)]
        shutil.rmtree(folder)
        folder.mkdir()
        what = f"{command[0]}, {errno.errorcode[number]} after {good} of {counted.writes} writes"
        assert_ended_well(run(FailingDisk(folder, good, number)), folder, what)
        if case == len(places) - 1:
            again = sbrush(*command, **environment)
            assert again.returncode == 0, f"{what}, then again\n{again.stderr}"


def test_sample(tmp_path, tiny_teacher):
    folder = tmp_path / "disk"
    command = ["sample", "a cat", "a dog", "--student", tiny_teacher, "--batch", 1, "-o", f"{folder}/images/"]
    every_write_fails_once(folder, 8, *command)
    every_write_fails_once(tmp_path / "other", 8, *command[:-1], f"{tmp_path}/other/deep/grid.png", "--no-metadata")


def test_distill(tmp_path, tiny_teacher, prompt_file):
    folder = tmp_path / "disk"
    command = ["distill", prompt_file, "--teacher", tiny_teacher, "--steps", 1, "--batch", 2, "--student-lora", 2]
    every_write_fails_once(folder, 8, *command, "--grid-every", 0, "--out", folder / "run")


def test_merge(tmp_path, tiny_teacher, prompt_file):
    done = sbrush("distill", prompt_file, "--teacher", tiny_teacher, "--steps", 1, "--batch", 2, "--grid-every", 0,
                  "--out", tmp_path / "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "disk"
    every_write_fails_once(folder, 8, "merge", tmp_path / "run", tmp_path / "run", "-o", folder / "a" / "merged")


def test_eval(tmp_path, tiny_stickers):
    folder = tmp_path / "disk"
    folder.mkdir()
    with FailingDisk(folder, 0, errno.ENOSPC):  # neither what it caches nor its report can be written
        done = sbrush("eval", "--student", tiny_stickers, "--teacher", tiny_stickers, "--limit", 100,
                      "--diversity", 2, "--teacher-steps", 1, "--report", folder / "report.html",
                      XDG_CACHE_HOME=str(folder / "cache"))  # fmt: skip
    assert_ended_well(done, folder, "eval")
    assert done.returncode == 1 and os.strerror(errno.ENOSPC) in done.stderr


@pytest.mark.parametrize("size", [0, 1000, 60_000])
def test_files_that_cannot_grow(tmp_path, tiny_teacher, prompt_file, size):
    """What a full disk does to a file that is open: the system itself fails the write, whoever writes."""
    x, small = tmp_path / "x", ["--steps", 1, "--batch", 2, "--grid-every", 0]
    commands = [
        ("sample", "a cat", "--student", tiny_teacher, "-o", x / "cat.png"),
        ("distill", prompt_file, "--teacher", tiny_teacher, *small, "--out", x / "run"),
    ]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for command in commands:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            done = sbrush(*command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert_ended_well(done, tmp_path, f"{command[0]} with files of {size} bytes")
        assert done.returncode == 1 or size
        again = sbrush(*command)
        assert again.returncode == 0, again.stderr
        shutil.rmtree(x)
