# SPDX-License-Identifier: Apache-2.0
"""A directory that is claimed, locked, kept private and written without loss; its journal."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from iot_elf import defaults
from iot_elf.defaults import T
from iot_elf.errors import ElfError
from iot_elf.events import EventQueue
from iot_elf.text import log

MAX_STATE_BYTES = 1024 * 1024 * 1024  # in misc/: 100,000 things with their keys take half of it
BRIEF_WAIT_S = 0.2  # how long a command that is ending, or records a policy, keeps others waiting
THINGS_FILE, ELF_FILE, JOURNAL_FILE = "things.json", "elf.json", "things.journal"
STATE_FILES = (THINGS_FILE, ELF_FILE, JOURNAL_FILE, ".lock", ".held", ".writing")
_UNFINISHED = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.elf-half")  # a file that write_private() did not finish
# Files that systems put into any directory, such as Kubernetes' links, and git's file in misc/ of ELF's repository.
_SYSTEM_FILES = re.compile(r"\.gitignore|lost\+found|\.DS_Store|Thumbs\.db|desktop\.ini|\.\..+")
# No system has all of these flags.
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe has no say in when open() returns
_APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | _AT_ONCE


class Journal:
    """Changes that are on disk as soon as they are made, a JSON object a line, until something else has them.

    The cost of one does not grow with their number. Only whoever has it locked may open it.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`, or make it, readable only by its owner. Raises OSError."""
        self.path = path
        self._file = FileIO(_open_own(path), "ab")
        sync_directory(path.parent)  # or a power failure could delete it, with keys in it

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a change. Raises OSError, and ElfError if the file was removed; it is then as it was before."""
        if defaults.POSIX and not os.fstat(self._file.fileno()).st_nlink:
            raise ElfError(
                "JournalRemoved", f"{self.path} was removed while ELF was writing to it", "run the same command again"
            )
        line, end = (json.dumps(entry) + "\n").encode(), self._file.seek(0, os.SEEK_END)
        with naming_file(self.path):
            try:
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(end)
                raise

    @property
    def is_empty(self) -> bool:
        return not os.fstat(self._file.fileno()).st_size

    def clear(self) -> None:
        with naming_file(self.path):
            self._file.truncate(0)

    def close(self) -> None:
        self._file.close()


class StateDirectory:
    """A directory of ELF's: claimed, locked, and kept private.

    A command locks it while it runs, exclusively or shared; commands that share it lock the journal to write, one at a
    time. Reading follows symbolic links, of which Kubernetes makes a mounted Secret; writing does not.
    """

    def __init__(self, path: Path) -> None:
        """Take `path`, which need not exist yet."""
        self.path = path
        self.things_file, self.elf_file, self.journal_file = (
            path / name for name in (THINGS_FILE, ELF_FILE, JOURNAL_FILE)
        )
        self.is_claimed = False  # by this process, which will write there

    def version(self) -> list[tuple[int, ...]]:
        """Return what differs once another command has replaced elf.json or things.json."""
        found: list[tuple[int, ...]] = []
        for path in (self.elf_file, self.things_file):
            with contextlib.suppress(OSError):
                about = path.stat()
                found.append((about.st_ino, about.st_mtime_ns, about.st_size))
        return found

    @property
    def is_elfs(self) -> bool:
        """Return whether this is, or will be, ELF's. Any other directory is left as it is."""
        return self.is_claimed or any(os.path.lexists(self.path / name) for name in STATE_FILES)

    def make(self) -> list[Path]:
        """Make the directory if it is missing, and return what is in it. Raises OSError."""
        with contextlib.suppress(FileExistsError):
            self.path.mkdir(mode=0o700, parents=True)
        return list(self.path.iterdir())

    @contextlib.contextmanager
    def lock(self, command: str, exclusive: bool, wait_s: float, events: EventQueue) -> Iterator[bool]:
        """Lock it until the block ends, `exclusive` or shared; the block gets whether it can be written.

        Raises ElfError, which names the commands that use it, after `wait_s` seconds; Interrupted; OSError if it can't
        be written and has to be, as with `exclusive`.
        """
        if not self.is_elfs:
            yield False
            return
        note = self.path / ".lock"  # tells others which commands use the directory, no more
        take = functools.partial(try_lock, self.path, self.path / ".held")
        lock = self._wait_for(functools.partial(take, shared=not exclusive), lambda: _holders(note), wait_s, events)
        is_writable = False
        try:
            try:
                with naming_file(note), FileIO(_open_own(note), "ab") as file:
                    if exclusive:
                        file.truncate(0)
                    file.write(f"{os.getpid()} {command}\n".encode())
                is_writable = True
            except OSError:
                if exclusive:
                    raise  # else reading is enough
            yield is_writable
        finally:
            lock.close()
            with contextlib.suppress(OSError):
                if last := take():
                    with last:
                        note.unlink()

    @contextlib.contextmanager
    def open_journal(self, events: EventQueue) -> Iterator[Journal]:
        """Lock the journal for writing, and open it, until the block ends. Raises Interrupted; OSError."""
        if link := next((path for path in (self.things_file, self.elf_file) if path.is_symlink()), None):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(link))
        take = functools.partial(try_lock, self.journal_file, self.path / ".writing")
        who = f"another elf.py to finish with {self.path}"
        with self._wait_for(take, lambda: who, math.inf, events):
            try:
                with contextlib.closing(Journal(self.journal_file)) as journal:
                    yield journal
            finally:
                self._remove_empty_journal()

    def _remove_empty_journal(self) -> None:
        with contextlib.suppress(OSError):  # on Windows, another command may be reading it
            if not self.journal_file.stat().st_size:
                self.journal_file.unlink()

    def _wait_for(
        self, take: Callable[[], contextlib.ExitStack | None], who: Callable[[], str], wait_s: float, events: EventQueue
    ) -> contextlib.ExitStack:
        """Take a lock once it is free. Raises ElfError after `wait_s` seconds; Interrupted."""
        announced = ""
        began = time.monotonic()
        while not (lock := take()):
            waited_s = time.monotonic() - began
            if waited_s >= max(wait_s, BRIEF_WAIT_S):
                raise ElfError(
                    "DirectoryInUse",
                    f"another ELF is using {self.path}: {who()}",
                    "wait until it ends (--wait 60), or use another directory with --misc-dir",
                )
            if waited_s >= BRIEF_WAIT_S and announced != (holders := who()):
                log.info("waiting for %s", announced := holders)
            events.get(deadline=time.monotonic() + 0.05)
        return lock

    def foreign(self, paths: Iterable[Path], names: Collection[str]) -> list[str]:
        """Return what of `paths` is neither ELF's state, nor one of its other files `names`, nor a system's."""
        about = self.path.stat()
        if about.st_mode & stat.S_ISVTX:
            return ["its sticky bit is set, as in a shared directory like /tmp"]
        if owner := other_owner(about):
            return [f"it belongs to user {owner}, who can change it while root uses it"]
        others = {path.name for path in paths} - {path.name for path in own_paths(paths, names)}
        return sorted(name for name in others if not _SYSTEM_FILES.fullmatch(name))

    def remove_unfinished(self, names: Collection[str]) -> None:
        """Remove unfinished copies of ELF's state and of its other files `names`, which a crash left behind."""
        for path in own_paths(self.path.iterdir(), names):
            if _UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)


def own_paths(paths: Iterable[Path], names: Collection[str]) -> list[Path]:
    """Return which of `paths` are ELF's state or its other files `names`, or unfinished copies of these."""
    known = {*STATE_FILES, *names}
    return [path for path in paths if path.name in known or _UNFINISHED.sub(r"\1", path.name) in known]


def make_private(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Take away others' access to files and directories; return those that had any: made private, and not.

    A disk without file modes, such as Windows' under WSL or exFAT, ignores that, or refuses it.
    """
    exposed = [path for path in paths if _is_exposed(path)]
    for path in exposed:
        with contextlib.suppress(OSError):
            path.chmod(0o700 if path.is_dir() else 0o600)
    open_still = {path for path in exposed if _is_exposed(path)}
    return [path for path in exposed if path not in open_still], sorted(open_still)


def _is_exposed(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # another command's, that has just ended
        mode = path.lstat().st_mode
        return defaults.POSIX and not stat.S_ISLNK(mode) and bool(mode & 0o077)
    return False


def other_owner(about: os.stat_result) -> int | None:
    """Return whose a directory is that root uses, and that its owner could replace meanwhile; None if that is root."""
    return about.st_uid if defaults.POSIX and os.geteuid() == 0 != about.st_uid else None


@contextlib.contextmanager
def reading_json(path: Path, kind: type[T]) -> Iterator[T]:
    """Give the block a file's JSON, or an empty `kind` if there is no file; turn its errors into an ElfError."""
    try:
        content = kind()
        with contextlib.suppress(FileNotFoundError):
            text = read_file(path)
            if path.name == JOURNAL_FILE:  # has an entry a line, of which a crash may have cut off the last
                text = b"[" + b",".join(text.split(b"\n")[:-1]) + b"]"
            content = json.loads(text)
        if not isinstance(content, kind):
            raise ValueError(f"it is not a JSON {'list' if kind is list else 'object'}")
        yield content
    except (ValueError, TypeError, RecursionError) as error:
        raise ElfError(
            "StateUnreadable",
            f"could not read {path}: {error}",
            f"use a newer ELF if one wrote it (this is {defaults.VERSION}), restore it from a backup, or move all of "
            f"{path.parent} away: ELF then starts empty",
        ) from error


def read_file(path: Path) -> bytes:
    """Read a file of ELF's. Raises OSError; ElfError for a pipe or the like, which could block reading for ever."""
    descriptor = os.open(path, os.O_RDONLY | _AT_ONCE)
    try:
        about = os.fstat(descriptor)  # of what is open: what has this name may be replaced at any time
        if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_STATE_BYTES:
            raise ElfError(
                "NotAFile",
                f"{path} is not a regular file, or is too large",
                "move it away, or restore it from a backup",
            )
        with naming_file(path), FileIO(descriptor, closefd=False) as file:
            return file.readall()
    finally:
        os.close(descriptor)


def _open_own(path: Path) -> int:
    """Open a file of ELF's to append to it, or make it, readable only by its owner. Raises OSError.

    A file with another name (a hard link) could be anybody's, as a symbolic link could.
    """
    descriptor = os.open(path, _APPEND, 0o600)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EMLINK, "the file has another name too (a hard link)", str(path))
    return descriptor


def try_lock(path: Path, stand_in: Path, shared: bool = False) -> contextlib.ExitStack | None:
    """Lock a directory or file until the result is closed or the process ends; None: another process has the lock.

    Windows does not let others read a locked file, and some network disks lock no directory: both lock `stand_in`.
    """
    with contextlib.ExitStack() as held:
        if not defaults.POSIX:
            import fasteners

            lock = fasteners.InterProcessReaderWriterLock(stand_in)
            if not (lock.acquire_read_lock if shared else lock.acquire_write_lock)(blocking=False):
                return None
            held.callback(lock.release_read_lock)  # of either kind
            return held.pop_all()
        import fcntl

        descriptor = os.open(path, os.O_RDONLY if path == stand_in.parent else _APPEND, 0o600)
        held.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return held.pop_all()
        except (BlockingIOError, FileNotFoundError):  # or its last holder removed it after our open()
            pass
        except OSError:
            if path == stand_in:
                with naming_file(path):
                    raise
            return try_lock(stand_in, stand_in, shared)
    return None


def _holders(note: Path) -> str:
    """Return which processes hold a lock: its note has a line, process ID and command, for each that took it."""
    text, alive = "", []
    with contextlib.suppress(OSError, ElfError):
        text = read_file(note).decode(errors="replace")
    for line in dict.fromkeys(text.splitlines()):
        pid, _, command = line.partition(" ")
        with contextlib.suppress(ProcessLookupError, ValueError, OverflowError):
            with contextlib.suppress(PermissionError):  # another user's
                os.kill(int(pid), 0) if defaults.POSIX else None  # Windows would end it
            alive.append(f"`{command}` (process {pid})")
    return ", ".join(alive) or "a command that just started"


def write_private(path: Path, text: str) -> None:
    """Replace a file in one step (it is never half written), readable only by its owner."""
    import tempfile

    with naming_file(path):
        descriptor, name = tempfile.mkstemp(".elf-half", f".{path.name}.", path.parent)  # which makes it 0600
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync_directory(directory: Path) -> None:
    """Make a directory's entries survive a power failure."""
    if defaults.POSIX:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            with naming_file(directory):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
