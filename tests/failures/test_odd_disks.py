"""Disks that keep no modes, lock nothing or ignore the case of names: ELF says so, and loses no key."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
from support.aws import Account
from support.failures import Explained
from support.machine import needs_root, posix_only
from support.shell import Elf, InProcess, assert_whole

pytestmark = posix_only
ONCE = ("--duration", "0.01")


@pytest.mark.parametrize("error", [None, errno.EPERM], ids=["as under WSL", "as on exFAT"])
def test_that_a_disk_keeps_nothing_private_is_said_once_and_the_fleet_works(
    main: InProcess, elf: Elf, account: Account, monkeypatch: pytest.MonkeyPatch, error: int | None
) -> None:
    def chmod(path: Path, mode: int, **_: object) -> None:
        if error:
            raise OSError(error, os.strerror(error), str(path))

    elf.misc.mkdir()
    elf.misc.chmod(0o777)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "chmod", chmod)
        commands = ("create", 1), ("create", 2), ("send", *elf.to_broker, *ONCE), ("list",), ("clean",)
        said = [main(*command).err for command in commands]
    assert ["can't keep other users from reading the keys" in each for each in said] == [True, *[False] * 4]
    assert not any("made private" in each for each in said)
    assert account.is_empty()
    main("create")  # on another disk, where modes count
    assert elf.misc.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("library", "name", "code", "file"),
    [
        (fcntl, "flock", errno.ENOLCK, ".held"),
        (fcntl, "flock", errno.ENOSYS, ".held"),
        (os, "fsync", errno.EINVAL, ""),
        (os, "fsync", errno.EIO, ""),
    ],
)
def test_what_a_disk_does_not_do_is_explained_with_the_file(
    main: InProcess,
    elf: Elf,
    account: Account,
    explained: Explained,
    monkeypatch: pytest.MonkeyPatch,
    library: object,
    name: str,
    code: int,
    file: str,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(library, name, refuse)
        explained(main("create", status=1), "OperatingSystemError", elf.misc / file, os.strerror(code))
    assert account.is_empty()


def test_no_key_is_written_over_where_the_disk_ignores_the_case_of_names(
    main: InProcess, elf: Elf, account: Account, explained: Explained
) -> None:
    """On macOS and Windows, one file has both names, as here."""
    main("create", 1, "--prefix", "lamp")
    for suffix in ("pem", "pub", "prv"):
        (elf.misc / f"Lamp_0.{suffix}").hardlink_to(elf.misc / f"lamp_0.{suffix}")
    before = (elf.misc / "lamp_0.prv").read_text()
    result = main("create", 2, "--prefix", "Lamp", "--output", "json", status=1)
    explained(result, "KeyFileTaken", "Lamp_0", "lamp_0")
    assert json.loads(result.out.splitlines()[-1])["failed"] == ["Lamp_0"]
    assert account.things() == ["Lamp_1", "lamp_0"]
    assert (elf.misc / "lamp_0.prv").read_text() == before
    main("send", *elf.to_broker, *ONCE)
    main("clean")
    assert account.is_empty()


@needs_root
def test_root_does_not_take_a_directory_that_another_user_can_change(
    main: InProcess, elf: Elf, account: Account, explained: Explained
) -> None:
    elf.misc.mkdir()
    os.chown(elf.misc, 1000, -1)
    for command in ("create",), ("--local", "create"):
        result = main(*command, "--output", "json", status=1)
        assert json.loads(result.out.splitlines()[-1])["error"]["name"] == "DirectoryOfOthers"
        assert "it belongs to user 1000" in result.err
    assert list(elf.misc.iterdir()) == []
    assert account.is_empty()


def test_a_file_that_has_another_name_is_not_written_to(
    main: InProcess, elf: Elf, account: Account, tmp_path: Path, explained: Explained
) -> None:
    main("create")
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (elf.misc / ".lock").hardlink_to(precious)
    explained(main("create", 2, status=1), "OperatingSystemError", elf.misc / ".lock", "hard link")
    assert precious.read_text() == "precious"
    main("create", 2)
    assert_whole(elf, account, 2)


def test_a_pipe_in_place_of_the_root_certificates_is_named_and_not_waited_for(main: InProcess, elf: Elf) -> None:
    main("create")
    os.mkfifo(elf.misc / "amazon-root-ca.pem")
    result = main("send", elf.to_broker[0], elf.to_broker[1], *ONCE, "--output", "json", status=1)
    error = json.loads(result.out.splitlines()[-1])["error"]
    assert error["name"] == "NotAFile"
    assert str(elf.misc / "amazon-root-ca.pem") in error["cause"]
