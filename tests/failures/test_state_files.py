"""Files of misc/ are gone, in the way, read-only or not what ELF wrote: no key and no thing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.aws import Account, AwsService
from support.failures import Explained
from support.http_proxy import LATE, HttpProxy
from support.machine import PATIENCE_S, needs_root, posix_only
from support.shell import Elf, InProcess, Pair, assert_whole

SUFFIXES = ("pem", "pub", "prv")

ONCE = ("--duration", "0.01")


def named_files(out: str) -> list[Path]:
    """The files that JSON output names."""
    events = [json.loads(line) for line in out.splitlines()]
    keys = ("certificateFile", "publicKeyFile", "privateKeyFile")
    return [Path(event[key]) for event in events if event["event"] == "created" for key in keys]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_key_that_can_not_be_written_is_kept_until_it_can(elf: Elf, account: Account, suffix: str) -> None:
    elf("create", 1)
    in_the_way = elf.misc / f"thing_1.{suffix}"
    in_the_way.mkdir()
    result = elf("create", 3, "--output", "json", status=1)
    assert "thing_1" in result.err
    assert all(path.is_file() for path in named_files(result.out))
    again = elf("create", 3, "--output", "json", status=1)  # it is still in the way
    assert str(in_the_way) in again.err
    in_the_way.rmdir()
    elf("create", 3)
    assert_whole(elf, account, 3)


@posix_only
def test_removing_the_journal_stops_create_and_loses_nothing(
    main: InProcess, proxy: HttpProxy, elf: Elf, account: Account, explained: Explained
) -> None:
    main("create", 2)
    journal = elf.misc / "things.journal"
    proxy.inject("CreateThing", LATE, call=3)
    with proxy.while_hanging(journal.unlink, PATIENCE_S):
        result = main("create", 3, status=1)
    explained(result, "JournalRemoved", journal)
    main("create", 3)
    assert_whole(elf, account, 3)


@pytest.mark.sample(2)
@pytest.mark.parametrize("tail", [b"\xff\xfe\x00", b'{"thing_1": {"elf_st\xc3', b"\x00" * 5000])
@pytest.mark.parametrize("file", ["things.journal", ".lock"])
def test_a_journal_or_lock_file_that_ends_in_any_bytes_stops_no_command(
    elf: Elf, account: Account, file: str, tail: bytes
) -> None:
    elf("create", 1)
    (elf.misc / file).write_bytes(tail)
    elf("create", 2)
    assert_whole(elf, account, 2)
    (elf.misc / file).write_bytes(tail)
    elf("clean")
    assert account.is_empty()


def in_place_of(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(20 << 30)


@posix_only
@pytest.mark.parametrize("kind", ["fifo", "directory", "20 GiB"])
@pytest.mark.parametrize("file", ["things.json", "elf.json", "things.journal"])
def test_a_pipe_or_a_directory_in_place_of_a_state_file_is_named_and_not_waited_for(
    elf: Elf, file: str, kind: str, explained: Explained
) -> None:
    elf("create", 1)
    in_place_of(elf.misc / file, kind)
    for command in ("send", "clean"):
        result = elf(command, "--output", "json", status=1)
        (failure,) = result.failures
        assert failure.name in ("NotAFile", "OperatingSystemError")
        explained(result, failure.name, elf.misc / file)


@posix_only
@pytest.mark.parametrize("kind", ["fifo", "directory", "20 GiB"])
def test_send_works_whatever_is_in_place_of_the_lock_file(pair: Pair, tmp_path: Path, kind: str) -> None:
    misc = tmp_path / "misc"
    shutil.copytree(pair.misc, misc)
    in_place_of(misc / ".lock", kind)
    pair("send", *pair.to_broker, "--count", 1, "--misc-dir", misc)


@posix_only
@pytest.mark.parametrize("suffix", ["pem", "prv"])
def test_a_pipe_in_place_of_a_key_is_named_and_not_waited_for(
    main_of_pair: InProcess, pair: Pair, tmp_path: Path, suffix: str, explained: Explained
) -> None:
    misc = tmp_path / "misc"
    shutil.copytree(pair.misc, misc)
    in_place_of(misc / f"thing_0.{suffix}", "fifo")
    result = main_of_pair("send", *pair.to_broker, "--count", 1, "--misc-dir", misc, status=1)
    explained(result, "KeyUnreadable", "thing_0", misc / f"thing_0.{suffix}")
    assert "1 acknowledged" in result.err  # thing_1's


@posix_only
@pytest.mark.parametrize("read_only", [False, pytest.param(True, marks=needs_root)])
def test_a_mounted_secret_can_be_sent_from(pair: Pair, tmp_path: Path, read_only: bool) -> None:
    """Kubernetes mounts a Secret as links to a directory, which is a link itself."""
    misc = tmp_path / "secret"
    shutil.copytree(pair.misc, misc / "..2026", ignore=shutil.ignore_patterns(".lock"))  # a note of other commands
    (misc / "..data").symlink_to("..2026")
    for path in (misc / "..2026").iterdir():
        (misc / path.name).symlink_to(Path("..data") / path.name)
    before = sorted((path.name, path.is_symlink()) for path in misc.iterdir())
    with contextlib.ExitStack() as stack:
        if read_only:
            subprocess.run(["mount", "--bind", str(misc), str(misc)], check=True)
            stack.callback(subprocess.run, ["umount", str(misc)], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", str(misc)], check=True)
        result = pair("send", *pair.to_broker, "--count", 1, "--misc-dir", misc)
        assert "2 acknowledged" in result.err
    assert sorted((path.name, path.is_symlink()) for path in misc.iterdir()) == before


def test_own_things_are_taken_up_again_when_misc_has_forgotten_them(
    main: InProcess, elf: Elf, account: Account, service: AwsService
) -> None:
    main("create", 3)
    main("send", *elf.to_broker, *ONCE)
    old = set(account.certificates())
    main("clean", "--only-local")
    main("create", 3, "--adopt")
    for name in ("thing_0", "thing_1", "thing_2"):
        assert account.certificate_of(name) not in old
        assert account.certificate_of(name) == elf.recorded()[name]["certificateId"]
    assert len(account.certificates()) == 3
    main("create", 3)
    assert not old & set(account.certificates())
    main("send", *elf.to_broker, *ONCE)
    main("clean")
    assert account.is_empty()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_things_send_from_a_directory_that_can_only_be_read(pair: Pair) -> None:
    pair.misc.chmod(0o500)
    try:
        pair("send", *pair.to_broker, "--duration", "0.01")
    finally:
        pair.misc.chmod(0o700)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("things.json", "not JSON"),
        ("things.json", "{}"),
        ("things.json", "[[]]"),
        ("things.json", '[{"thing_0": {}, "thing_1": {}}]'),
        ("things.json", '[{"../../thing_0": {}}]'),
        ("things.json", '[{"thing_0": "text"}]'),
        ("things.json", '[{"thing_0": {"certificateArn": "arn:aws:iot:us-west-2:1:cert/x", "certificateId": "x"}}]'),
        ("things.json", '[{"thing_0": {"elf_policy": "AdministratorAccess"}}]'),
        ("things.json", "[" * 100_000),
        ("elf.json", "not JSON"),
        ("elf.json", "[]"),
        ("elf.json", '{"elf_id": "me"}'),
        ("elf.json", '{"elf_id": "urn:uuid:95bb3ad5-95d1-4c9a-b818-b23f92fcde30", "fleet": {"region": 1}}'),
    ],
)
@pytest.mark.parametrize("command", ["create", "send", "clean"])
def test_a_state_file_that_is_not_elfs_is_named_and_left_alone(
    main: InProcess, elf: Elf, account: Account, file: str, content: str, command: str, explained: Explained
) -> None:
    elf.misc.mkdir()
    (elf.misc / file).write_text(content)
    result = main(command, status=1)
    explained(result, "StateUnreadable", elf.misc / file)
    assert (elf.misc / file).read_text() == content
    assert account.is_empty()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_an_error_before_anything_is_made(
    main: InProcess, elf: Elf, account: Account
) -> None:
    elf.misc.mkdir(mode=0o500)
    assert "--misc-dir" in main("create", status=1).err
    assert account.is_empty()


def test_a_misc_dir_that_is_a_file_is_an_error_before_anything_is_made(
    main: InProcess, elf: Elf, account: Account
) -> None:
    elf.misc.write_text("")
    assert "--misc-dir" in main("create", status=1).err
    assert account.is_empty()
