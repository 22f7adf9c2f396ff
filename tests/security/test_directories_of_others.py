"""What others have where ELF writes: links, open directories, files of their own."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from support.aws import Account
from support.failures import Explained
from support.machine import posix_only
from support.shell import Elf, InProcess

ONCE = ("--duration", "0.01")


@posix_only
@pytest.mark.parametrize(
    ("name", "content"), [("things.json", "[]"), ("elf.json", "{}"), ("things.journal", ""), (".lock", "precious")]
)
def test_no_file_of_elfs_is_written_through_a_symbolic_link(
    main: InProcess, elf: Elf, account: Account, tmp_path: Path, name: str, content: str, explained: Explained
) -> None:
    target = tmp_path / "precious"
    target.write_text(content)
    elf.misc.mkdir(mode=0o700)
    (elf.misc / name).symlink_to(target)
    refused = main("create", status=1)
    explained(refused, "SymbolicLink", elf.misc / name)
    assert target.read_text() == content
    assert account.is_empty()


@posix_only
@pytest.mark.parametrize("suffix", ["pem", "pub", "prv"])
def test_a_link_in_place_of_a_key_file_is_replaced_and_not_followed(
    main: InProcess, elf: Elf, account: Account, tmp_path: Path, suffix: str
) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    main("create")
    (elf.misc / f"thing_1.{suffix}").symlink_to(target)
    main("create", 2)
    assert not (elf.misc / f"thing_1.{suffix}").is_symlink()
    main("clean")
    assert target.read_text() == "precious"


@posix_only
def test_a_directory_that_others_can_read_is_named_and_shut(main: InProcess, elf: Elf) -> None:
    elf.misc.mkdir()
    for is_named in (False, True, False):  # there was nothing to read in a new one
        elf.misc.chmod(0o755 if is_named or not elf.files() else 0o700)
        assert (f"other users could read {elf.misc}: made private" in main("create").err) is is_named
        assert stat.S_IMODE(elf.misc.stat().st_mode) == 0o700


def entries_of(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(directory)): (path.stat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in (directory, *directory.rglob("*"))
    }


@posix_only
@pytest.mark.parametrize(
    "command", [("create",), ("--local", "create"), ("send",), ("subscribe",), ("clean",)], ids=str
)
@pytest.mark.parametrize(
    ("mode", "names"),
    [
        (0o755, ["server.pem"]),
        (0o755, [".old.pem.20240131", ".id_ed25519.pub.original"]),
        (0o755, ["thing_0.pem", "amazon-root-ca.pem"]),
        (0o755, ["local/bin/tool"]),
        (0o1777, []),
    ],
    ids=str,
)
def test_a_directory_that_is_not_elfs_is_left_as_it_is_by_every_command(
    main: InProcess,
    elf: Elf,
    account: Account,
    mode: int,
    names: list[str],
    command: tuple[str, ...],
    explained: Explained,
) -> None:
    elf.misc.mkdir()
    for name in names:
        (elf.misc / name).parent.mkdir(parents=True, exist_ok=True)
        (elf.misc / name).write_text("precious")
        (elf.misc / name).chmod(0o644)
    elf.misc.chmod(mode)
    before = entries_of(elf.misc)
    result = main(*command, status=0 if "clean" in command else 1)
    if "create" in command:
        found = [name.partition("/")[0] for name in names] or ["its sticky bit"]
        explained(result, "DirectoryOfOthers", elf.misc, *found, "--misc-dir")
    assert entries_of(elf.misc) == before
    assert account.is_empty()


@posix_only
def test_what_came_into_a_fleets_directory_later_is_left_as_it_is(
    main: InProcess, elf: Elf, account: Account, explained: Explained
) -> None:
    main("create")
    (elf.misc / "thing_0.prv").chmod(0o644)
    others = [elf.misc / "notes.pem", elf.misc / ".thing_9.pem.20240131"]
    for path in others:
        path.write_text("precious")
        path.chmod(0o644)
    elf.misc.chmod(0o755)
    explained(main("create", 2, status=1), "DirectoryOfOthers", *(path.name for path in others))
    assert f"other users could read {elf.misc / 'thing_0.prv'}: made private" in main("send", *elf.to_broker, *ONCE).err
    main("clean")
    assert account.is_empty()
    assert [(path.read_text(), stat.S_IMODE(path.stat().st_mode)) for path in others] == [("precious", 0o644)] * 2
    assert stat.S_IMODE(elf.misc.stat().st_mode) == 0o755


@pytest.mark.parametrize("name", [".gitignore", "lost+found/x", "..data/x", ".DS_Store"])
def test_what_systems_put_into_a_directory_does_not_make_it_anybodys(
    main: InProcess, elf: Elf, account: Account, name: str
) -> None:
    (elf.misc / name).parent.mkdir(parents=True)
    (elf.misc / name).write_text("")
    main("create")
    main("clean")
    assert (elf.misc / name).exists()
    assert account.is_empty()
