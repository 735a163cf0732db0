"""COCO itself, fetched when asked: resumed, checked, and only what is wanted of it unpacked."""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import stat
import urllib.request
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from sbrush.console import SbrushError, info, printable, progress
from sbrush.storage.locks import hold

MB = 10**6
SILENCE = 60  # seconds without a byte after which a server is given up


@dataclass(frozen=True)
class Archive:
    """A .zip on a server, and what is wanted of it: `members`, a pattern FOLDER/NAME."""

    url: str
    size: int  # bytes
    md5: str
    members: str
    unpacked: int  # bytes that its wanted members take at most

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.url} ({self.size / MB:,.0f} MB)"


# MD5 against damage on the way, as public lists have them: val2014.zip in salesforce/LAVIS, download_coco.py; the
# annotations' in PaddlePaddle's list of 2019, and it is the ETag that the server gives. Sizes: the server's own.
ARCHIVES = (
    Archive(
        "http://images.cocodataset.org/annotations/annotations_trainval2014.zip", 252_872_794,
        "0a379cfc70b0e71301e0f377548639bd", "annotations/captions_val2014.json", 100 * MB,
    ),
    Archive(
        "http://images.cocodataset.org/zips/val2014.zip", 6_645_013_297,
        "a3d79f5ed8d289b7a7554ce06a5782b3", "val2014/*.jpg", 7_000 * MB,
    ),
)  # fmt: skip
SOURCE = " and ".join(map(str, ARCHIVES))


def fetch_coco(root: Path, archives: Sequence[Archive] = ARCHIVES) -> None:
    """Fetches and unpacks into `root` what of COCO is missing there; processes that ask at once wait for the first.

    The same call goes on where one was stopped. An archive that lies in `root` already is taken. SbrushError if
    something cannot be fetched or written, or is not what it should be.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with hold(root / ".download.lock"):
            missing = [archive for archive in archives if not _there(root, archive)]
            _check_room(root, missing)
            for archive in missing:
                unpack(archive, fetch(archive, root), root)
    except OSError as problem:
        raise SbrushError(
            f"cannot write to {printable(root)}: {problem.strerror or printable(problem)}",
            "make room or choose another --coco-root; the same command goes on",
        ) from problem


def fetch(archive: Archive, folder: Path) -> Path:
    """The archive's file in `folder`, whole and with the right checksum; what is there already is not fetched again."""
    file, partial = folder / archive.name, folder / f"{archive.name}.partial"
    if not file.exists():
        if partial.exists() and partial.stat().st_size > archive.size:
            partial.unlink()
        if not partial.exists() or partial.stat().st_size < archive.size:
            _get(archive, partial)
        _check(archive, partial)
        partial.rename(file)
        info(f"{printable(file)} may be removed once it is unpacked")
    else:
        _check(archive, file)
    return file


def unpack(archive: Archive, file: Path, root: Path) -> None:
    """Puts the wanted members into their folder in `root`: a new folder is there whole or not at all."""
    try:
        with zipfile.ZipFile(file) as opened:
            wanted = _wanted(archive, opened)
            name = PurePosixPath(archive.members).parts[0]
            folder, partial = root / name, root / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            with progress(f"unpacking {archive.name}", len(wanted), unit="files") as bar:
                for member in wanted:
                    target = partial / PurePosixPath(member.filename).name
                    with opened.open(member) as source, target.open("wb") as to:
                        shutil.copyfileobj(source, to, MB)  # never more than the directory says, and its CRC is checked
                    bar.advance()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as problem:
        raise SbrushError(
            f"{printable(file)} cannot be unpacked: {printable(problem)}", "remove it and fetch it again"
        ) from problem
    if not folder.exists():
        partial.rename(folder)
        return
    for done in partial.iterdir():
        done.replace(folder / done.name)
    partial.rmdir()


def _there(root: Path, archive: Archive) -> bool:
    """Whether the archive's members are in `root`: the file, or for a pattern the folder, which is whole if it is."""
    pattern = PurePosixPath(archive.members)
    return (root / (pattern.parent if "*" in pattern.name else pattern)).exists()


def _check_room(root: Path, missing: Sequence[Archive]) -> None:
    """SbrushError if the disk has no room for what is to be fetched and unpacked."""
    need = 0
    for archive in missing:
        here = [f.stat().st_size for f in (root / archive.name, root / f"{archive.name}.partial") if f.exists()]
        need += max(0, archive.size - sum(here)) + archive.unpacked
    free = shutil.disk_usage(root).free
    if free < need:
        raise SbrushError(
            f"COCO needs {need / MB:,.0f} MB in {printable(root)}, and {free / MB:,.0f} MB are free",
            "make room, or choose another --coco-root",
        )


def _get(archive: Archive, partial: Path) -> None:
    """Fetches the rest of the archive onto `partial`; from the start if the server cannot go on in the middle."""
    have = partial.stat().st_size if partial.exists() else 0
    info(f"fetching {archive}" + (f", going on from {have / MB:,.0f} MB" if have else ""))
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
    again = "check the network; the same command goes on where it stopped"
    try:
        response = urllib.request.urlopen(request, timeout=SILENCE)
    except (OSError, HTTPException) as problem:
        raise SbrushError(f"cannot fetch {archive.url}: {printable(problem)}", again) from problem
    with response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0
        with (
            partial.open("ab" if have else "wb") as file,
            progress(archive.name, -(-archive.size // MB), done=have // MB, unit="MB") as bar,
        ):
            while have <= archive.size:  # one that is too long is no longer read, and found out by its size
                try:
                    part = response.read(MB)
                except (OSError, HTTPException) as problem:
                    raise SbrushError(
                        f"{archive.url} broke off after {have / MB:,.0f} MB: {printable(problem)}", again
                    ) from problem
                if not part:
                    break
                file.write(part)
                have += len(part)
                bar.advance()
    if have < archive.size:
        raise SbrushError(f"{archive.url} broke off after {have:,} of {archive.size:,} bytes", again)


def _check(archive: Archive, file: Path) -> None:
    """SbrushError if a file is not the archive, byte for byte; one that was fetched only in part is then removed."""
    info(f"checking {printable(file.name)} ...")
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != archive.md5:
        if file.suffix == ".partial":
            file.unlink()
        raise SbrushError(
            f"{printable(file)} has MD5 {found}, and {archive.name} has {archive.md5}",
            "the same command fetches it again" if file.suffix == ".partial" else "remove it: it is another or damaged",
        )


def _wanted(archive: Archive, opened: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The members that are wanted. SbrushError if there are none, one leads elsewhere, or they are too large."""
    wanted = [m for m in opened.infolist() if fnmatch.fnmatchcase(m.filename, archive.members) and not m.is_dir()]
    for member in wanted:
        parts = member.filename.split("/")
        if len(parts) != 2 or ".." in parts or "\\" in member.filename or stat.S_ISLNK(member.external_attr >> 16):
            raise SbrushError(
                f"{archive.name} names {printable(member.filename)}, a place outside its folder",
                "it is not COCO's: remove it",
            )
    if not wanted or sum(member.file_size for member in wanted) > archive.unpacked:
        raise SbrushError(
            f"{archive.name} holds {'more' if wanted else 'less'} than it should", "it is not COCO's: remove it"
        )
    return wanted
