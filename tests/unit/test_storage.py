"""A directory of ELF's is locked and private, and what is written there survives: orders, limits, modes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import locale
import math
import os
import resource
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from support.program import Limits, constant

from iot_elf import storage
from iot_elf.errors import ElfError
from iot_elf.events import EventQueue, Interrupted
from iot_elf.storage import Journal, StateDirectory

from .stand_ins import Clock, Waits, logged

NO_PROCESS = 2**22 + 1  # Linux gives no process a higher number than 2**22
JOURNAL, THINGS = "things.journal", "things.json"


@pytest.fixture(autouse=True)
def _open_umask_and_quick_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modes are what ELF asks for, and no umask hides that it asks for too much. Nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str | None]]:
    """What is synced from now on, in order: its path, and if it is a file, its content at that time."""
    found: list[tuple[Path, str | None]] = []

    def witness(descriptor: int) -> None:
        path = path_of(descriptor)
        found.append((path, path.read_text() if path.is_file() else None))

    monkeypatch.setattr(os, "fsync", witness)
    return found


def path_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir() if path.exists()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refuse_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, "the disk does not answer")

    monkeypatch.setattr(os, "fsync", refuse)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process become larger, as if the disk were full."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def in_use(path: Path, stand_in: Path, shared: bool = False) -> bool:
    """Whether somebody has a lock that keeps others from it."""
    if lock := storage.try_lock(path, stand_in, shared):
        lock.close()
    return not lock


# The journal


def test_a_new_journal_is_its_owners_alone_and_its_name_is_on_disk(
    tmp_path: Path, synced: list[tuple[Path, str | None]]
) -> None:
    journal = Journal(tmp_path / JOURNAL)
    assert mode(journal.path) == 0o600
    assert synced == [(tmp_path, None)]
    journal.close()


def test_a_journal_is_opened_to_append_and_waits_for_nobody(tmp_path: Path) -> None:
    before = open_descriptors()
    with contextlib.closing(Journal(tmp_path / JOURNAL)):
        (descriptor,) = open_descriptors() - before
        flags = fcntl.fcntl(int(descriptor), fcntl.F_GETFL)
        assert (flags & os.O_APPEND, flags & os.O_NONBLOCK) == (os.O_APPEND, os.O_NONBLOCK)
        assert flags & os.O_ACCMODE == os.O_RDWR
    assert open_descriptors() == before


def test_a_link_in_place_of_the_journal_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic") as raised:
        Journal(tmp_path / JOURNAL)
    assert raised.value.errno == errno.ELOOP
    assert not (tmp_path / "other").exists()


def test_a_change_is_on_disk_before_append_returns(tmp_path: Path, synced: list[tuple[Path, str | None]]) -> None:
    with contextlib.closing(Journal(tmp_path / JOURNAL)) as journal:
        synced.clear()
        journal.append({"thing_0": None})
        assert synced == [(journal.path, '{"thing_0": null}\n')]
        journal.append({"thing_1": {"elf_stage": "creating"}})
        assert synced[1:] == [(journal.path, '{"thing_0": null}\n{"thing_1": {"elf_stage": "creating"}}\n')]


@pytest.mark.parametrize("name", [JOURNAL, ".lock"])
def test_a_file_that_has_another_name_is_not_written_to(tmp_path: Path, name: str) -> None:
    """Where fs.protected_hardlinks is 0, anyone may give a file of another's a name in a directory that is open."""
    precious, misc, before = tmp_path / "precious", StateDirectory(tmp_path / "misc"), open_descriptors()
    precious.write_text("precious")
    misc.make()
    (misc.path / name).hardlink_to(precious)
    with (
        pytest.raises(OSError, match="hard link") as raised,
        misc.lock("elf.py create", True, 0, EventQueue()),
        misc.open_journal(EventQueue()),
    ):
        pass
    assert raised.value.filename == str(misc.path / name)
    assert precious.read_text() == "precious"
    assert open_descriptors() == before


def test_a_journal_that_is_opened_again_keeps_what_it_has(tmp_path: Path) -> None:
    for number in range(2):
        with contextlib.closing(Journal(tmp_path / JOURNAL)) as journal:
            assert journal.is_empty is (number == 0)
            journal.append({f"thing_{number}": None})
            assert not journal.is_empty
    assert journal.path.read_text() == '{"thing_0": null}\n{"thing_1": null}\n'


def test_a_journal_that_is_cleared_begins_again(tmp_path: Path) -> None:
    with contextlib.closing(Journal(tmp_path / JOURNAL)) as journal:
        journal.append({"thing_0": None})
        journal.clear()
        assert journal.is_empty
        assert journal.path.read_bytes() == b""
        journal.append({"thing_1": None})
        assert journal.path.read_text() == '{"thing_1": null}\n'


def test_a_journal_that_was_removed_takes_no_more_changes(tmp_path: Path) -> None:
    with contextlib.closing(Journal(tmp_path / JOURNAL)) as journal:
        journal.path.unlink()
        with pytest.raises(ElfError, match=f"{journal.path} was removed"):
            journal.append({"thing_0": None})
        assert journal.is_empty


def test_where_the_system_can_not_tell_that_the_journal_was_removed_nobody_asks(tmp_path: Path, limits: Limits) -> None:
    limits(POSIX=False)
    with contextlib.closing(Journal(tmp_path / JOURNAL)) as journal:
        journal.path.unlink()
        journal.append({"thing_0": None})


@pytest.mark.parametrize(("room", "code"), [(5, errno.ENOSPC), (0, errno.EFBIG)])
def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path, room: int, code: int) -> None:
    """The disk takes a part of the line, or none of it."""
    with contextlib.closing(Journal(tmp_path / JOURNAL)) as journal:
        journal.append({"thing_0": None})
        before = journal.path.read_bytes()
        with largest_file(len(before) + room), pytest.raises(OSError, match=r"space|large") as raised:
            journal.append({"thing_1": None})
        assert (raised.value.errno, raised.value.filename) == (code, str(journal.path))
        assert journal.path.read_bytes() == before
        journal.append({"thing_2": None})
        assert journal.path.read_bytes() == before + b'{"thing_2": null}\n'


def test_a_change_that_can_not_be_synced_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(Journal(tmp_path / JOURNAL)) as journal:
        journal.append({"thing_0": None})
        with monkeypatch.context() as patch:
            refuse_sync(patch)
            with pytest.raises(OSError, match="does not answer") as raised:
                journal.append({"thing_1": None})
        assert raised.value.filename == str(journal.path)
        assert journal.path.read_text() == '{"thing_0": null}\n'


# Whose a directory is


@pytest.mark.parametrize(
    ("name", "is_elfs"),
    [
        ("things.json", True),
        ("elf.json", True),
        ("things.journal", True),
        (".lock", True),
        (".held", True),
        (".writing", True),
        ("thing_0.pem", False),
        (".things.json.abcdefgh.elf-half", False),
        ("notes.txt", False),
    ],
)
def test_a_directory_with_a_file_of_elfs_state_is_elfs(tmp_path: Path, name: str, is_elfs: bool) -> None:
    directory = StateDirectory(tmp_path)
    assert not directory.is_elfs
    (tmp_path / name).symlink_to(tmp_path / "nowhere")  # a link that leads nowhere is there too
    assert directory.is_elfs is is_elfs


def test_a_directory_that_a_command_claims_is_elfs(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    directory.is_claimed = True
    assert directory.is_elfs


@pytest.mark.parametrize("name", [THINGS, "elf.json"])
def test_whoever_reads_sees_that_another_command_replaced_a_file(tmp_path: Path, name: str) -> None:
    directory = StateDirectory(tmp_path)
    versions = [directory.version()]
    for content in ("", "{}", "[]"):
        storage.write_private(tmp_path / name, content)
        assert directory.version() == directory.version()
        versions.append(directory.version())
    assert all(a != b for a, b in itertools.pairwise(versions))


def test_a_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path / "parent" / "misc")
    assert directory.make() == []
    assert mode(directory.path) == 0o700
    (directory.path / THINGS).touch()
    assert directory.make() == [directory.path / THINGS]


OWN_FILES = [
    (THINGS, True),
    ("thing_0.pem", True),
    (".things.json.abcd_123.elf-half", True),
    (".thing_0.pem.abcd_123.elf-half", True),
    (".thing_1.pem.abcd_123.elf-half", False),
    (".things.json.abcd_12.elf-half", False),
    (".things.json.abcd_1234.elf-half", False),
    (".things.json.ABCD_123.elf-half", False),
    (".things.json.abcd_123.elf-half.old", False),
    ("things.json.abcd_123.elf-half", False),
    ("thing_1.pem", False),
]


def test_elfs_files_are_its_state_the_things_files_and_unfinished_copies_of_both(tmp_path: Path) -> None:
    paths = [tmp_path / name for name, _ in OWN_FILES]
    own = [tmp_path / name for name, is_own in OWN_FILES if is_own]
    assert storage.own_paths(paths, {"thing_0.pem"}) == own


def test_only_unfinished_copies_of_elfs_own_files_are_removed(tmp_path: Path) -> None:
    for name, _ in OWN_FILES:
        (tmp_path / name).touch()
    StateDirectory(tmp_path).remove_unfinished({"thing_0.pem"})
    left = {path.name for path in tmp_path.iterdir()}
    assert {name for name, _ in OWN_FILES} - left == {OWN_FILES[2][0], OWN_FILES[3][0]}


def test_an_unfinished_copy_that_is_finished_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished, unfinished = (tmp_path / f".things.json.abcd_{number}.elf-half" for number in (123, 567))
    unfinished.touch()
    monkeypatch.setattr(Path, "iterdir", lambda directory: iter([finished, unfinished]))
    StateDirectory(tmp_path).remove_unfinished(())
    assert not unfinished.exists()


def test_what_is_neither_elfs_nor_the_systems_is_foreign(tmp_path: Path) -> None:
    systems = ".gitignore lost+found .DS_Store Thumbs.db desktop.ini ..data ..2024_01_01".split()
    others = ["a.txt", "..", "x.gitignore", ".gitignore.bak", ".DS_Store2", "b.txt"]
    names = [*systems, *reversed(others), THINGS, "thing_0.pem", ".things.json.abcd_123.elf-half"]
    foreign = StateDirectory(tmp_path).foreign([tmp_path / name for name in names], {"thing_0.pem"})
    assert foreign == sorted(others)


@pytest.mark.parametrize(("user", "owner", "is_foreign"), [(0, 1000, True), (0, 0, False), (1000, 1000, False)])
def test_a_directory_of_another_user_is_not_roots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: int, owner: int, is_foreign: bool
) -> None:
    os.chown(tmp_path, owner, -1) if os.geteuid() == 0 else pytest.skip("only root gives files away")
    monkeypatch.setattr(os, "geteuid", lambda: user)
    expected = ["it belongs to user 1000, who can change it while root uses it"] if is_foreign else []
    assert StateDirectory(tmp_path).foreign([], []) == expected


def test_a_directory_that_all_users_share_is_never_elfs(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    assert directory.foreign([], ()) == []
    tmp_path.chmod(0o1777)
    (reason,) = directory.foreign([], ())
    assert "sticky" in reason


# Private files


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("file", 0o644, 0o600),
        ("file", 0o601, 0o600),
        ("file", 0o602, 0o600),
        ("file", 0o604, 0o600),
        ("file", 0o610, 0o600),
        ("file", 0o620, 0o600),
        ("file", 0o640, 0o600),
        ("file", 0o600, 0o600),
        ("file", 0o400, 0o400),
        ("directory", 0o755, 0o700),
        ("directory", 0o701, 0o700),
        ("directory", 0o700, 0o700),
    ],
)
def test_others_lose_their_access_to_a_file(tmp_path: Path, kind: str, before: int, after: int) -> None:
    path = tmp_path / "it"
    path.mkdir() if kind == "directory" else path.touch()
    path.chmod(before)
    assert storage.make_private([path]) == ([path] if before != after else [], [])
    assert mode(path) == after


def test_files_that_others_could_read_are_told_in_the_order_in_which_they_were_given(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "bca"]
    for path in paths:
        path.touch(0o644)
    assert storage.make_private(paths) == (paths, [])


def test_what_is_behind_a_link_keeps_its_mode_and_what_is_missing_is_passed_over(tmp_path: Path) -> None:
    target, link, gone, last = (tmp_path / name for name in ("target", "link", "gone", "last"))
    for path in (target, last):
        path.touch(0o644)
    link.symlink_to(target)
    assert storage.make_private([link, gone, last]) == ([last], [])
    assert mode(target) == 0o644


@pytest.mark.parametrize("error", [None, errno.EPERM, errno.EOPNOTSUPP])
def test_what_a_disk_does_not_keep_private_is_told_from_what_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int | None
) -> None:
    paths = [tmp_path / name for name in ("b", "a", "private")]
    for path in paths:
        path.touch(0o600 if path.name == "private" else 0o777)

    def chmod(path: Path, mode: int, **_: object) -> None:
        if error:
            raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr(Path, "chmod", chmod)
    assert storage.make_private(paths) == ([], sorted(paths[:2]))


def test_where_the_system_has_no_modes_none_is_changed(tmp_path: Path, limits: Limits) -> None:
    limits(POSIX=False)
    path = tmp_path / "it"
    path.touch(0o644)
    assert storage.make_private([path]) == ([], [])
    assert mode(path) == 0o644


def test_a_private_file_is_on_disk_before_it_takes_the_place_of_the_old_one(
    tmp_path: Path, synced: list[tuple[Path, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / THINGS
    path.write_text("old")
    at_sync = []
    witness = os.fsync

    def look(descriptor: int) -> None:
        at_sync.append(path.read_text())
        witness(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    storage.write_private(path, "a\nb\r\nü")
    assert path.read_bytes() == "a\nb\r\nü".encode()
    assert mode(path) == 0o600
    ((temporary, content),) = synced
    assert (content, at_sync) == ("a\nb\nü", ["old"])  # read_text() makes one of both line ends
    assert temporary.parent == tmp_path  # a rename to another disk would be a copy
    assert storage.own_paths([temporary], ()) == [temporary]  # of which the next command knows what it is
    assert [each.name for each in tmp_path.iterdir()] == [THINGS]


def test_a_private_file_that_can_not_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / THINGS
    path.write_text("old")
    with largest_file(3), pytest.raises(OSError, match="large") as raised:
        storage.write_private(path, "new content")
    assert raised.value.filename == str(path)
    refuse_sync(monkeypatch)
    with pytest.raises(OSError, match="does not answer"):
        storage.write_private(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == [THINGS]


def test_the_error_of_the_disk_is_told_even_if_the_new_file_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove_and_refuse(descriptor: int) -> None:
        path_of(descriptor).unlink()
        raise OSError(errno.EIO, "the disk does not answer")

    monkeypatch.setattr(os, "fsync", remove_and_refuse)
    with pytest.raises(OSError, match="does not answer"):
        storage.write_private(tmp_path / THINGS, "new")


def test_a_private_file_is_utf_8_whatever_the_systems_language(tmp_path: Path) -> None:
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        storage.write_private(tmp_path / THINGS, "ü")
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert (tmp_path / THINGS).read_bytes() == "ü".encode()


@pytest.mark.parametrize(("named", "shown"), [(None, "/misc/things.json"), ("/other", "/other")])
def test_an_error_of_the_system_names_a_file_and_keeps_the_name_that_it_has(named: str | None, shown: str) -> None:
    with pytest.raises(OSError, match="full") as raised, storage.naming_file(Path("/misc/things.json")):
        raise OSError(errno.ENOSPC, "full", named)
    assert raised.value.filename == shown


def test_a_directory_is_synced_and_closed_again(tmp_path: Path, synced: list[tuple[Path, str | None]]) -> None:
    before = open_descriptors()
    storage.sync_directory(tmp_path)
    assert synced == [(tmp_path, None)]
    assert open_descriptors() == before


def test_a_directory_that_can_not_be_synced_is_named_and_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_descriptors()
    refuse_sync(monkeypatch)
    with pytest.raises(OSError, match="does not answer") as raised:
        storage.sync_directory(tmp_path)
    assert raised.value.filename == str(tmp_path)
    assert open_descriptors() == before


def test_where_the_system_can_not_open_a_directory_none_is_synced(
    tmp_path: Path, synced: list[tuple[Path, str | None]], limits: Limits
) -> None:
    limits(POSIX=False)
    storage.sync_directory(tmp_path)
    assert synced == []


# Reading


@pytest.mark.parametrize(
    ("name", "content", "kind", "expected"),
    [
        (THINGS, None, list, []),
        ("elf.json", None, dict, {}),
        ("elf.json", '{"a": 1}', dict, {"a": 1}),
        (THINGS, '[\n{"a": 1}\n]\n', list, [{"a": 1}]),
        (JOURNAL, "", list, []),
        (JOURNAL, '{"a": 1}\n', list, [{"a": 1}]),
        (JOURNAL, '{"a": 1}\n{"b": 2}\n', list, [{"a": 1}, {"b": 2}]),
        (JOURNAL, '{"a": 1}\n{"b"', list, [{"a": 1}]),  # what a crash cut off
        (JOURNAL, '{"a": 1}\n{"b": 2}', list, [{"a": 1}]),  # append() had not returned yet
        (JOURNAL, '{"a"', list, []),
    ],
)
def test_a_file_of_json_is_read(tmp_path: Path, name: str, content: str | None, kind: Any, expected: Any) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with storage.reading_json(tmp_path / name, kind) as found:
        assert found == expected


@pytest.mark.parametrize(
    ("name", "content", "kind", "problem"),
    [
        (THINGS, "{}", list, "it is not a JSON list"),
        ("elf.json", "[]", dict, "it is not a JSON object"),
        ("elf.json", "{", dict, "line 1"),
        (JOURNAL, '{"a"\n{"b": 2}\n', list, "line 1"),
        (THINGS, "[" * 100_000, list, "recursion"),
        (THINGS, b"\xff", list, "utf-8"),
    ],
)
def test_a_file_that_is_not_elfs_is_named_and_said_what_to_do_about(
    tmp_path: Path, name: str, content: str | bytes, kind: Any, problem: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ElfError) as raised, storage.reading_json(path, kind):
        pytest.fail("it was read")
    assert str(path) in raised.value.cause
    assert problem in raised.value.cause
    assert {constant("VERSION"), str(tmp_path)} <= {*raised.value.remedy.replace(")", " ").split()}


@pytest.mark.parametrize("error", [ValueError("that"), TypeError("that"), RecursionError("that")])
def test_what_is_wrong_in_a_file_is_an_error_of_this_file(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(ElfError, match=f"could not read {tmp_path / THINGS}: that") as raised,
        storage.reading_json(tmp_path / THINGS, list),
    ):
        raise error
    assert raised.value.__cause__ is error


def test_a_file_is_read_up_to_a_limit(tmp_path: Path, limits: Limits) -> None:
    assert constant("MAX_STATE_BYTES") == 2**30
    limits(MAX_STATE_BYTES=3)
    path = tmp_path / THINGS
    path.write_bytes(b"abc")
    assert storage.read_file(path) == b"abc"
    path.write_bytes(b"abcd")
    with pytest.raises(ElfError, match=f"{path} is not a regular file, or is too large"):
        storage.read_file(path)


def test_a_pipe_in_place_of_a_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / THINGS)
    before = open_descriptors()
    with pytest.raises(ElfError, match="not a regular file"):
        storage.read_file(tmp_path / THINGS)
    assert open_descriptors() == before


def test_a_file_that_is_replaced_by_a_pipe_in_time_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, os_open = tmp_path / THINGS, os.open
    path.touch()

    def late(opened: Any, flags: int, mode: int = 0o777) -> int:
        path.unlink()
        os.mkfifo(path)
        return os_open(opened, flags, mode)

    monkeypatch.setattr(os, "open", late)
    with pytest.raises(ElfError, match="not a regular file"):
        storage.read_file(path)


# Locks


@pytest.fixture(params=["a directory", "a file"])
def lockable(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """What is locked, and its stand-in."""
    if request.param == "a directory":
        return tmp_path, tmp_path / ".held"
    return tmp_path / JOURNAL, tmp_path / ".writing"


@pytest.mark.parametrize(
    ("first", "second", "is_free"),
    [
        ("shared", "shared", True),
        ("shared", "exclusive", False),
        ("exclusive", "shared", False),
        ("exclusive", "exclusive", False),
    ],
)
def test_commands_share_a_lock_or_one_has_it(
    lockable: tuple[Path, Path], first: str, second: str, is_free: bool
) -> None:
    before = open_descriptors()
    lock = storage.try_lock(*lockable, first == "shared")
    assert lock
    with lock:
        assert in_use(*lockable, second == "shared") is not is_free
    assert not in_use(*lockable)
    assert open_descriptors() == before
    assert not lockable[1].exists()  # there was no need for a stand-in


def test_a_lock_is_exclusive_if_nobody_says_shared(lockable: tuple[Path, Path]) -> None:
    lock = storage.try_lock(*lockable)
    assert lock
    with lock:
        assert storage.try_lock(*lockable, shared=True) is None


def test_a_lock_file_is_its_owners_alone(tmp_path: Path) -> None:
    lock = storage.try_lock(tmp_path / JOURNAL, tmp_path / ".writing")
    assert lock
    lock.close()
    assert mode(tmp_path / JOURNAL) == 0o600


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_lock_on_a_file_that_is_no_longer_there_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The last holder removed it, and somebody else may have made another, after this process opened it."""
    path, flock, before = tmp_path / JOURNAL, fcntl.flock, open_descriptors()

    def late(descriptor: int, operation: int) -> None:
        path.unlink()
        if change == "replaced":
            path.touch()
        flock(descriptor, operation)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        assert storage.try_lock(path, tmp_path / ".writing") is None
    assert open_descriptors() == before
    assert not in_use(path, tmp_path / ".writing")


def test_where_no_directory_can_be_locked_its_stand_in_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def as_on_a_network_disk(descriptor: int, operation: int) -> None:
        if path_of(descriptor).is_dir():
            raise OSError(errno.EBADF, "not on this disk")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", as_on_a_network_disk)
    place = tmp_path, tmp_path / ".held"
    for shared in (True, False):
        lock = storage.try_lock(*place, shared=shared)
        assert lock
        with lock:
            assert mode(place[1]) == 0o600
            assert in_use(*place, shared=True) is not shared
            assert in_use(place[1], place[1])
    assert not in_use(*place)


def test_a_disk_without_any_locks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="no locks") as raised:
        storage.try_lock(tmp_path, tmp_path / ".held")
    assert raised.value.filename == str(tmp_path / ".held")
    assert open_descriptors() == before


class WindowsLock:
    """A lock as fasteners makes it, of which this process has one for each file."""

    taken: ClassVar[dict[Path, list[str]]] = {}

    def __init__(self, path: Path) -> None:
        self._taken = self.taken.setdefault(path, [])

    def acquire_read_lock(self, blocking: bool) -> bool:
        assert not blocking
        return "write" not in self._taken and not self._taken.append("read")

    def acquire_write_lock(self, blocking: bool) -> bool:
        assert not blocking
        return not self._taken and not self._taken.append("write")

    def release_read_lock(self) -> None:
        self._taken.pop()


@pytest.mark.parametrize("shared", [True, False])
def test_on_windows_a_stand_in_is_locked(
    tmp_path: Path, limits: Limits, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    limits(POSIX=False)
    monkeypatch.setitem(sys.modules, "fasteners", SimpleNamespace(InterProcessReaderWriterLock=WindowsLock))
    place = tmp_path / JOURNAL, tmp_path / ".writing"
    lock = storage.try_lock(*place, shared=shared)
    assert lock
    with lock:
        assert {path for path, taken in WindowsLock.taken.items() if taken} == {place[1]}
        assert not place[0].exists()
        assert in_use(*place, shared=True) is not shared
        assert in_use(*place)
    assert not in_use(*place)


# Who holds a lock


@pytest.mark.parametrize(
    ("note", "holders"),
    [
        (None, "a command that just started"),
        ("", "a command that just started"),
        ("{me} elf.py send\n", "`elf.py send` (process {me})"),
        ("{nobody} elf.py send\n", "a command that just started"),
        (
            "{nobody} elf.py clean\n{parent} elf.py send\n{me} elf.py subscribe\n",
            "`elf.py send` (process {parent}), `elf.py subscribe` (process {me})",
        ),
        ("{me} elf.py send\n" * 2, "`elf.py send` (process {me})"),
        (f"nobody elf.py send\n{2**70} elf.py send\n\n{{me}} ü\n", "`ü` (process {me})"),
        ("{me} \udcff\n", "`\N{REPLACEMENT CHARACTER}` (process {me})"),  # which is no text
    ],
)
def test_only_living_commands_are_said_to_use_a_directory(tmp_path: Path, note: str | None, holders: str) -> None:
    processes = {"me": os.getpid(), "parent": os.getppid(), "nobody": NO_PROCESS}
    if note is not None:
        (tmp_path / ".lock").write_bytes(note.format(**processes).encode(errors="surrogateescape"))
    assert storage._holders(tmp_path / ".lock") == holders.format(**processes)


def test_a_command_of_another_user_is_named_too_and_none_is_sent_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []

    def kill(pid: int, signum: int) -> None:
        sent.append((pid, signum))
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    (tmp_path / ".lock").write_text("4711 elf.py send\n")
    assert storage._holders(tmp_path / ".lock") == "`elf.py send` (process 4711)"
    assert sent == [(4711, 0)]


def test_on_windows_no_process_is_asked_as_that_would_end_it(
    tmp_path: Path, limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits(POSIX=False)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("it was ended"))
    (tmp_path / ".lock").write_text("4711 elf.py send\n")
    assert storage._holders(tmp_path / ".lock") == "`elf.py send` (process 4711)"


# A directory that commands use


@pytest.fixture
def misc(tmp_path: Path) -> StateDirectory:
    (tmp_path / THINGS).touch()
    return StateDirectory(tmp_path)


def test_a_directory_that_is_not_elfs_is_neither_locked_nor_written_to(tmp_path: Path) -> None:
    with StateDirectory(tmp_path).lock("elf.py send", True, 0, EventQueue()) as is_writable:
        assert not is_writable
        assert not in_use(tmp_path, tmp_path / ".held")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_command_locks_the_directory_and_says_who_it_is(misc: StateDirectory, exclusive: bool) -> None:
    note = misc.path / ".lock"
    note.write_text("1 elf.py before a crash\n")
    with misc.lock("elf.py send", exclusive, 0, EventQueue()) as is_writable:
        assert is_writable
        own = f"{os.getpid()} elf.py send\n"
        assert note.read_text() == (own if exclusive else f"1 elf.py before a crash\n{own}")
        assert in_use(misc.path, misc.path / ".held", shared=True) is exclusive
        assert in_use(misc.path, misc.path / ".held")
    assert not note.exists()
    assert not in_use(misc.path, misc.path / ".held")


def test_the_note_is_its_owners_alone_and_stays_until_the_last_command_ends(misc: StateDirectory) -> None:
    note = misc.path / ".lock"
    with misc.lock("elf.py send", False, 0, EventQueue()):
        with misc.lock("elf.py subscribe", False, 0, EventQueue()):
            assert mode(note) == 0o600
        assert note.read_text() == f"{os.getpid()} elf.py send\n{os.getpid()} elf.py subscribe\n"
    assert not note.exists()


def test_a_directory_that_can_not_be_written_can_be_read(misc: StateDirectory) -> None:
    (misc.path / ".lock").mkdir()  # which no command can open
    with misc.lock("elf.py send", False, 0, EventQueue()) as is_writable:
        assert not is_writable
        assert in_use(misc.path, misc.path / ".held")
    with (
        pytest.raises(IsADirectoryError) as raised,
        misc.lock("elf.py clean", True, 0, EventQueue()),
    ):
        pytest.fail("a command that has to write began")
    assert raised.value.filename == str(misc.path / ".lock")
    assert not in_use(misc.path, misc.path / ".held")


def test_an_error_of_the_command_ends_its_lock(misc: StateDirectory) -> None:
    with pytest.raises(OSError, match="mine"), misc.lock("elf.py send", False, 0, EventQueue()):
        raise OSError("mine")
    assert not in_use(misc.path, misc.path / ".held")
    assert not (misc.path / ".lock").exists()


@pytest.mark.parametrize(("wait_s", "waited_s"), [(0.0, 0.2), (0.1, 0.2), (0.5, 0.5), (60.0, 60.0)])
def test_a_command_waits_as_long_as_it_is_told_to_and_a_moment_at_least(
    misc: StateDirectory, monkeypatch: pytest.MonkeyPatch, wait_s: float, waited_s: float
) -> None:
    assert constant("BRIEF_WAIT_S") == 0.2
    clock = Clock(monkeypatch, storage)
    waits = Waits(clock)
    with misc.lock("elf.py send", False, 0, EventQueue()), logged() as lines:
        (misc.path / ".lock").write_text(f"{os.getpid()} elf.py send\n{NO_PROCESS} elf.py clean\n")
        if wait_s == 60.0:
            monkeypatch.setattr(Waits, "get", skip_most)
        with (
            pytest.raises(ElfError) as raised,
            misc.lock("elf.py create", True, wait_s, waits),
        ):
            pytest.fail("two have it")
    holders = f"`elf.py send` (process {os.getpid()})"
    assert raised.value.cause == f"another ELF is using {misc.path}: {holders}"
    assert waited_s <= clock.now - 1000 < waited_s + 0.06
    steps = [deadline - before for before, deadline in zip([1000.0, *waits.deadlines], waits.deadlines, strict=False)]
    assert all(step == pytest.approx(0.05) for step in steps)
    assert lines == ([f"INFO waiting for {holders}"] if wait_s > 0.2 else [])


def skip_most(waits: Waits, deadline: float) -> None:
    """Wait, and in a long wait let a second pass each time."""
    waits.clock.now = round(waits.clock.now + 1.0)


def test_a_command_that_gets_the_directory_soon_says_nothing(
    misc: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, storage)
    other = storage.try_lock(misc.path, misc.path / ".held")
    assert other
    waits = Waits(clock, lambda number: other.close() if number == 4 else None)
    with logged() as lines, misc.lock("elf.py send", False, 60, waits) as is_writable:
        assert is_writable
    assert (lines, len(waits.deadlines)) == ([], 4)


def test_who_is_waited_for_is_said_again_when_that_changes(
    misc: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, note = Clock(monkeypatch, storage), misc.path / ".lock"
    note.write_text(f"{os.getpid()} elf.py send\n")
    other = storage.try_lock(misc.path, misc.path / ".held")
    assert other

    def at_wait(number: int) -> None:
        if number == 10:
            note.write_text(f"{os.getpid()} elf.py clean\n")
        if number == 20:
            other.close()

    waits = Waits(clock, at_wait)
    with logged() as lines, misc.lock("elf.py send", False, 60, waits):
        pass
    assert [line.partition("`")[2].partition("`")[0] for line in lines] == ["elf.py send", "elf.py clean"]


def test_ctrl_c_ends_the_wait(misc: StateDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits(Clock(monkeypatch, storage), lambda number: waits.interrupt(2, None))
    with misc.lock("elf.py send", True, 0, EventQueue()):
        with pytest.raises(Interrupted), misc.lock("elf.py clean", True, math.inf, waits):
            pytest.fail("two have it")
        assert (misc.path / ".lock").exists()  # of the one that has it


# Writing


def test_one_command_at_a_time_writes_the_journal(misc: StateDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    place = misc.path / JOURNAL, misc.path / ".writing"
    waits = Waits(Clock(monkeypatch, storage), lambda number: number > 200 and waits.interrupt(2, None))
    with misc.open_journal(EventQueue()) as journal, logged() as lines:
        assert journal.path == place[0]
        assert in_use(*place, shared=True)
        with pytest.raises(Interrupted), misc.open_journal(waits):
            pytest.fail("two have it")
        assert lines == [f"INFO waiting for another elf.py to finish with {misc.path}"]
        assert waits.clock.now > 1010 - 0.1
        assert place[0].exists()  # of the one that has it
    assert not in_use(*place)


def test_an_empty_journal_is_removed_and_another_is_kept(misc: StateDirectory) -> None:
    before = open_descriptors()
    with misc.open_journal(EventQueue()):
        assert misc.journal_file.exists()
    assert not misc.journal_file.exists()
    with misc.open_journal(EventQueue()) as journal:
        journal.append({"thing_0": None})
    assert json.loads(misc.journal_file.read_text()) == {"thing_0": None}
    assert open_descriptors() == before


def test_an_error_of_the_command_ends_its_writing(misc: StateDirectory) -> None:
    before = open_descriptors()
    with pytest.raises(OSError, match="mine"), misc.open_journal(EventQueue()):
        raise OSError("mine")
    assert not misc.journal_file.exists()
    assert open_descriptors() == before


@pytest.mark.parametrize("name", [THINGS, "elf.json"])
def test_a_link_in_place_of_elfs_state_is_not_written_to(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic") as raised, StateDirectory(tmp_path).open_journal(EventQueue()):
        pytest.fail("it was opened")
    assert (raised.value.errno, raised.value.filename) == (errno.ELOOP, str(tmp_path / name))
    assert not (tmp_path / JOURNAL).exists()


def test_elfs_files_have_their_names(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    paths: Callable[[str], Path] = tmp_path.__truediv__
    assert (directory.things_file, directory.elf_file, directory.journal_file) == (
        paths("things.json"),
        paths("elf.json"),
        paths("things.journal"),
    )
