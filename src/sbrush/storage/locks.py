"""One process at a time: a lock on a file, also where a file system has no locks of its own."""

from __future__ import annotations

import errno
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, SoftFileLock

SOFT = ".soft"  # ends the name of a lock that is held by being there
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def hold(path: Path, *, wait: bool = True) -> AbstractContextManager[object]:
    """Takes the lock `path`; it is held from now on, to the end of a `with` of what is returned.

    Where the file system cannot lock files (some network and FUSE mounts), the lock is a file that is there while it
    is held: `path` with SOFT behind it. A process that was killed leaves that one behind.

    Raises filelock.Timeout if another process holds it and `wait` is not set, OSError if the file cannot be written.
    """
    timeout = -1 if wait else 0
    try:
        return FileLock(path).acquire(timeout=timeout)
    except (NotImplementedError, OSError) as problem:
        if isinstance(problem, OSError) and problem.errno not in NO_LOCKS:
            raise
    return SoftFileLock(path.with_name(path.name + SOFT)).acquire(timeout=timeout)
