"""The disk is full, or fills up: a command fails in words, and no key and no thing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.aws import Account
from support.failures import Explained
from support.machine import hamper, limited, needs_root, posix_only
from support.shell import Elf, InProcess, assert_whole

ONCE = ("--duration", "0.01")


@pytest.mark.skipif(os.name != "posix", reason="the limit is POSIX's")
@pytest.mark.sample(2)
@pytest.mark.parametrize("limit", [0, 20, 60, 100, 300, 1000, 1500, 3500, 4500, 6000, 8000, 12000])
def test_a_disk_that_is_full_costs_nothing_but_the_command(
    elf: Elf, main: InProcess, account: Account, tmp_path: Path, limit: int
) -> None:
    hamper(elf, tmp_path, limited("RLIMIT_FSIZE", limit))
    done = elf("create", 2, status=None)
    assert done.status in (0, 1)
    assert "Traceback" not in done.err
    if done.status:
        assert "the disk is full" in done.err
        assert "what to do: free some space" in done.err
    if (elf.misc / "things.json").exists():
        json.loads((elf.misc / "things.json").read_text())
    said = done.err + main("create", 2).err
    main("send", *elf.to_broker, *ONCE)
    said += main("clean").err
    assert (account.things(), account.policies()) == ([], [])
    assert all(certificate in said for certificate in account.certificates())


@contextlib.contextmanager
def small_disk(directory: Path, kibibytes: int) -> Iterator[None]:
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k,mode=0700", "tmpfs", str(directory)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


@posix_only
@needs_root
@pytest.mark.parametrize("left", [4, 12, 20, 32])
def test_a_disk_that_fills_and_empties_loses_no_key(elf: Elf, account: Account, left: int) -> None:
    with small_disk(elf.misc, 1024):
        elf("create", 1)
        filler = elf.misc / "lost+found"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"\0" * 4096):
                pass
        os.truncate(filler, filler.stat().st_size - 1024 * left)
        result = elf("create", 4, status=1)
        assert "the disk is full" in result.err
        filler.unlink()
        elf("create", 4)
        assert_whole(elf, account, 4)


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Let this process write no file larger than `limit` bytes."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@posix_only
@pytest.mark.parametrize("limit", [10, 1000, 6000])
def test_a_full_disk_loses_nothing(
    main: InProcess, elf: Elf, account: Account, explained: Explained, limit: int
) -> None:
    with small_files(limit):
        result = main("create", 3, status=1)
    explained(result, "DiskFull", elf.misc)
    recorded = {thing["certificateId"] for thing in elf.recorded().values() if "certificateId" in thing}
    assert set(account.things()) <= set(elf.recorded())
    assert set(account.certificates()) == recorded
    main("create", 3)
    assert account.things() == ["thing_0", "thing_1", "thing_2"]
    assert set(account.certificates()) == {thing["certificateId"] for thing in elf.recorded().values()}
    main("clean")
    assert account.is_empty()
