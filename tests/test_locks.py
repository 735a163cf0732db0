"""File systems that cannot do everything: no locks, no flushing of folders, a disk that was full at the start."""

import errno
import os

import pytest
from filelock import Timeout

from conftest import sbrush
from sbrush.console import SbrushError
from sbrush.storage import checkpoint, locks
from sbrush.storage.files import CANNOT_FLUSH, atomic_folder, atomic_write, check_room, flush, size_text
from sbrush.training.folder import LOCK, check_folder


@pytest.mark.parametrize("refusal", [NotImplementedError(), OSError(errno.ENOTSUP, ""), OSError(errno.ENOLCK, "")])
def test_a_lock_where_the_file_system_has_none(tmp_path, monkeypatch, refusal):
    """NotImplementedError is what filelock 3.20 raises, the oldest that sbrush takes."""

    class NoLock:
        def __init__(self, path):
            pass

        def acquire(self, timeout):
            raise refusal

    monkeypatch.setattr(locks, "FileLock", NoLock)
    with locks.hold(tmp_path / ".lock", wait=False):
        with pytest.raises(Timeout):
            locks.hold(tmp_path / ".lock", wait=False)
    with locks.hold(tmp_path / ".lock"):  # free again
        pass


def test_a_lock_that_cannot_be_written_is_no_soft_lock(tmp_path, monkeypatch):
    with pytest.raises(OSError):
        locks.hold(tmp_path / "missing" / "\0" / ".lock") if os.name == "nt" else locks.hold("/proc/none/.lock")


def test_a_run_without_locks_says_which_file_a_killed_one_leaves(tmp_path, tiny_teacher, prompt_file, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    command = ["distill", prompt_file, "--teacher", tiny_teacher, "--steps", 1, "--batch", 2, "--grid-every", 0]
    assert sbrush(*command, "--out", tmp_path / "run").returncode == 0
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / f"{LOCK}{locks.SOFT}").write_text("")  # of a run that was killed
    done = sbrush(*command, "--out", tmp_path / "two")
    assert done.returncode == 2 and f"if there is none, remove {tmp_path}/two/.lock.soft" in done.stderr


@pytest.mark.parametrize("number", CANNOT_FLUSH)
def test_a_folder_that_cannot_be_flushed(tmp_path, monkeypatch, number):
    def refuse(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    checkpoint.save(tmp_path, 3, {})
    found = checkpoint.newest(tmp_path)
    assert found and found.step == 3


def test_a_disk_that_fails_in_flushing_is_not_passed_over(tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError):
        flush(tmp_path)


def test_a_folder_with_what_a_full_disk_leaves_is_empty(tmp_path, tiny_teacher, prompt_file, monkeypatch):
    run = tmp_path / "run"
    command = ["distill", prompt_file, "--teacher", tiny_teacher, "--steps", 1, "--batch", 2, "--grid-every", 0]
    monkeypatch.setattr(
        "sbrush.training.run.write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    full = sbrush(*command, "--out", run)
    assert full.returncode == 1 and "error: cannot write to" in full.stderr and "make room" in full.stderr
    assert [file.name for file in run.iterdir()] == [LOCK]
    monkeypatch.undo()
    (run / ".config.json.123.partial").write_text("{")  # of a kill
    assert sbrush(*command, "--out", run).returncode == 0
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / ".bashrc").write_text("mine")
    with pytest.raises(SbrushError, match="no run of sbrush"):
        check_folder(tmp_path / "foreign")


def test_room_is_told_as_it_is(tmp_path, monkeypatch):
    assert [size_text(n) for n in (0, 999, 1000, 2**20, 3_670_016, 10**12)] == [
        "0 bytes", "999 bytes", "0.977 KiB", "1 MiB", "3.5 MiB", "931 GiB",
    ]  # fmt: skip
    free = 2 * 2**20
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))
    check_room(tmp_path, 2**19, "it", "h")
    with pytest.raises(SbrushError, match=r"no room for it in .*: 2\.01 MiB needed, 2 MiB free"):
        check_room(tmp_path, 2**20, "it", "h")


def test_a_long_name_a_device_and_a_link(tmp_path):
    name = "x" * 251 + ".txt"
    with atomic_write(tmp_path / name) as partial:
        partial.write_text("whole")
    assert (tmp_path / name).read_text() == "whole"
    with atomic_write(tmp_path / ("\u732b" * 85)) as partial:  # 255 bytes
        partial.write_text("whole")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with atomic_write(tmp_path / "pipe") as partial:
        partial.write_bytes(b"whole")
    assert os.read(reader, 10) == b"whole" and not (tmp_path / "pipe").is_file()
    os.close(reader)
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as partial:
        partial.write_text("whole")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 5


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(OSError) as refused, atomic_write(tmp_path / "missing" / "a.txt") as partial:
        partial.write_text("x")
    assert refused.value.filename == str(tmp_path / "missing" / "a.txt")


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder"
    with atomic_folder(target) as partial:
        (partial / "a").write_text("one")
    with pytest.raises(RuntimeError), atomic_folder(target) as partial:
        (partial / "b").write_text("two")
        raise RuntimeError
    assert [file.read_text() for file in target.iterdir()] == ["one"] and list(tmp_path.iterdir()) == [target]
    with atomic_folder(target) as partial:
        (partial / "b").write_text("two")
    assert [file.read_text() for file in target.iterdir()] == ["two"] and list(tmp_path.iterdir()) == [target]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    target = tmp_path / "folder"
    target.mkdir()
    rename = os.rename

    def refuse(source, to):
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, to)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError), atomic_folder(target):
        pass
    assert list(tmp_path.iterdir()) == [target]
