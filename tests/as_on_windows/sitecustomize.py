"""Loaded by the Python of an elf.py under test (PYTHONPATH): takes away what Windows lacks, and brings what it has.

Gone are fcntl, resource, fork, SIGTERM, SIGPIPE and O_NOFOLLOW. There is an msvcrt whose locks are Windows' own: ranges
of bytes that belong to an open file. A file that is open somewhere can't be removed nor replaced.
"""

import errno
import fcntl
import os
import signal
import struct
import sys
import types
from multiprocessing import resource_tracker  # noqa: F401 - which needs SIGTERM at its import
from pathlib import Path

LK_UNLCK, LK_NBLCK = 0, 2
FLOCK = "hhqqi"  # type, whence, start, length, process


def locking(descriptor: int, mode: int, length: int) -> None:
    """Lock the bytes from the current position on, or unlock them, or fail at once: they are locked, by this very file
    maybe, or were not locked."""
    start = os.lseek(descriptor, 0, os.SEEK_CUR)
    with Path(f"/proc/self/fd/{descriptor}").open() as other:  # which sees the locks of `descriptor` as another's
        lock = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        found = struct.unpack(FLOCK, fcntl.fcntl(other, fcntl.F_OFD_GETLK, lock))
    if (found[0] == fcntl.F_UNLCK) != (mode == LK_NBLCK):
        raise PermissionError(errno.EACCES, "Permission denied")
    kind = fcntl.F_WRLCK if mode == LK_NBLCK else fcntl.F_UNLCK
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(FLOCK, kind, os.SEEK_SET, start, length, 0))
    except OSError:
        raise PermissionError(errno.EACCES, "Permission denied") from None


msvcrt = types.ModuleType("msvcrt")
vars(msvcrt).update(locking=locking, LK_UNLCK=LK_UNLCK, LK_NBLCK=LK_NBLCK)
sys.modules["msvcrt"] = msvcrt
for name in ("fcntl", "resource"):
    sys.modules[name] = None  # type: ignore[assignment]
del os.fork, os.O_NOFOLLOW
if "resource_tracker" not in " ".join(sys.orig_argv):  # a helper of multiprocessing's, which Windows has not
    del signal.SIGTERM, signal.SIGPIPE


def _refuse_open_file(path: object) -> None:
    real = Path(str(path)).resolve()
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            is_open = entry.readlink() == real
        except OSError:  # closed meanwhile, or another user's
            continue
        if is_open:
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(real))


_unlink, _replace = os.unlink, os.replace


def unlink(path, **options):  # type: ignore[no-untyped-def]
    _refuse_open_file(path)
    _unlink(path, **options)


def replace(source, target, **options):  # type: ignore[no-untyped-def]
    _refuse_open_file(target)
    _replace(source, target, **options)


os.unlink = os.remove = unlink
os.replace = replace
