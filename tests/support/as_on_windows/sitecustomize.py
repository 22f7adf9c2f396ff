"""Loaded by the Python of an elf.py under test (PYTHONPATH): takes away what Windows lacks, and brings what it has.

Gone are fcntl, resource, fork, SIGTERM, SIGPIPE and O_NOFOLLOW. The locks of fasteners are like Windows' own: they
belong to an open file, and what is locked can't be read. A file that is open somewhere can't be removed nor replaced.
"""

import errno
import fcntl
import os
import signal
import struct
import sys
from multiprocessing import resource_tracker  # noqa: F401 - which needs SIGTERM at its import
from pathlib import Path
from typing import IO

import fasteners

FLOCK = "hhqqi"  # type, whence, start, length, process


class LockFileEx:
    """The part of fasteners that calls Windows, with locks that belong to an open file as Windows' do."""

    @staticmethod
    def trylock(file: IO[str], exclusive: bool) -> bool:
        if os.fstat(file.fileno()).st_size:
            raise AssertionError("nobody else could read what is locked here")
        kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack(FLOCK, kind, os.SEEK_SET, 0, 1, 0))
        except BlockingIOError:
            return False
        return True

    @staticmethod
    def unlock(file: IO[str]) -> None:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack(FLOCK, fcntl.F_UNLCK, os.SEEK_SET, 0, 1, 0))

    @staticmethod
    def get_handle(path: str) -> IO[str]:
        return open(path, "a+")  # noqa: PTH123 - as fasteners has it

    @staticmethod
    def close_handle(file: IO[str]) -> None:
        file.close()


fasteners.process_lock._interprocess_reader_writer_mechanism = LockFileEx
for name in ("fcntl", "resource"):
    sys.modules[name] = None  # type: ignore[assignment]
del os.fork, os.O_NOFOLLOW
if "resource_tracker" not in " ".join(sys.orig_argv):  # a helper of multiprocessing's, which Windows has not
    del signal.SIGTERM, signal.SIGPIPE


def _refuse_open_file(path: object) -> None:
    real = Path(str(path)).resolve()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_open = any(entry.readlink() == real for entry in (process / "fd").iterdir())
        except OSError:  # closed or ended meanwhile, or another user's
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
