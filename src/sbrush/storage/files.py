"""Files written completely or not at all: under a temporary name, then renamed. Imports nothing heavy."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from sbrush.console import SbrushError, is_text, printable

LONGEST_NAME = 255  # bytes, on the file systems that people have
# What file systems answer that cannot flush a folder, or at all: SMB, FUSE, Windows.
CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to it at the end, removed if anything goes wrong before.

    So a reader sees the old file or the new one, never half of either. A symbolic link stays, and the file that it
    names is written; a device or a pipe, such as /dev/stdout, gets the content. The file's permissions follow the
    umask.

    Raises OSError as any writing may, with `path` as its filename.
    """
    target = _behind_links(path)
    special = target.exists() and not target.is_file() and not target.is_dir()
    with tempfile.TemporaryDirectory() if special else nullcontext() as aside:
        partial = Path(aside) / "content" if aside else target.with_name(_partial_name(target.name))
        try:
            yield partial
            if special:
                with partial.open("rb") as content, target.open("wb") as stream:
                    shutil.copyfileobj(content, stream)
            else:
                follow_umask(partial)
                partial.replace(target)
        except Exception as problem:
            cause = os_error(problem)
            if cause is None:
                raise
            if cause.errno is not None and cause.filename in (None, str(partial)):
                cause.filename, cause.filename2 = str(path), None  # as people know it
            if cause is problem:
                raise
            raise cause from problem
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to fill; takes its place at the end, removed if anything goes wrong before.

    An older folder at that place stays until the new one is complete. Permissions follow the umask.
    """
    partial, old = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        follow_umask(partial)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def check_new(folder: Path, *, empty: bool = False) -> None:
    """SbrushError if something is at `folder` already, or nothing can be written there.

    `empty`: whether an empty folder may be there.
    """
    check_name(folder)
    if empty and folder.is_dir() and not folder.is_symlink():
        if any(folder.iterdir()):
            raise SbrushError(f"{printable(folder)} is not empty", "name a new folder with -o", code=2)
    elif folder.exists() or folder.is_symlink():
        raise SbrushError(f"{printable(folder)} is there already", "name a new folder with -o", code=2)
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        why = "Permission denied" if above.is_dir() else "it is not a folder"
        raise SbrushError(f"cannot write to {printable(above)}: {why}", "name another folder with -o")


def follow_umask(path: Path) -> None:
    """Gives a file, or every file within a folder, the permissions that the umask leaves a new one.

    safetensors writes files that nobody but their owner can read, whatever the umask: no other user's program could
    load a student, nor another user of a group resume a run.
    """
    umask = os.umask(0o077)  # setting it is the only way to read it
    os.umask(umask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            with suppress(OSError):  # file systems without permissions refuse, and have nothing to set
                file.chmod(0o666 & ~umask)


def flush(path: Path) -> None:
    """Waits until a file or folder is on the disk itself; goes on where its file system cannot do that."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as problem:
        if problem.errno not in CANNOT_FLUSH:
            raise


def os_error(problem: BaseException) -> OSError | None:
    """The OSError that an exception is, or that it wraps as safetensors' exceptions do; None if it is none."""
    if isinstance(problem, OSError):
        return problem
    if type(problem).__name__ == "SafetensorError":
        if found := re.search(r"os error (\d+)|Os \{ code: (\d+)", str(problem)):
            number = int(found[1] or found[2])
            return OSError(number, os.strerror(number))
    return None


def check_room(folder: Path, size: int, what: str, hint: str) -> None:
    """SbrushError if the disk of `folder`, which exists, has no room for `size` bytes of `what` and some to spare."""
    needed, free = size + size // 100 + 2**20, shutil.disk_usage(folder).free
    if free < needed:
        raise SbrushError(
            f"no room for {what} in {printable(folder)}: {size_text(needed)} needed, {size_text(free)} free", hint
        )


def check_name(folder: Path) -> None:
    """SbrushError if a model's folder has a name that the libraries which load models cannot open."""
    if not is_text(str(folder)):
        raise SbrushError(
            f"the name {printable(folder)} is not UTF-8, and models cannot be loaded from there",
            "give the folder a name in UTF-8",
            code=2,
        )


def size_text(size: int) -> str:
    """A number of bytes as people read it, to three digits: "3.42 GiB", "980 KiB"."""
    value, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"


def user_cache() -> Path | None:
    """The folder for what can be made again; None where there is none, as without a home. It need not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sbrush"
    except RuntimeError:  # no home
        return None


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, whole.

    A file name that is not UTF-8 reaches Python as lone surrogates; they are written as JSON and Python escape them,
    "\\udce9".
    """
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, data: Any) -> None:
    """Writes indented JSON, whole; NaN and infinities are refused (ValueError), for they are not JSON."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _behind_links(path: Path) -> Path:
    """The file that a symbolic link names, which need not exist; OSError if links lead in a circle."""
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def _partial_name(name: str) -> str:
    """The name of a file while it is written: hidden, and no longer than names may be."""
    ending = f".{os.getpid()}.partial"
    room = LONGEST_NAME - len(ending) - 1
    return "." + os.fsdecode(os.fsencode(name)[:room]) + ending
