"""The embedded AWS IoT's files: which of them it reads and writes, and how large its log becomes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.program import Limits

from iot_elf import local_aws


def test_a_log_that_is_too_large_begins_anew(tmp_path: Path, limits: Limits) -> None:
    limits(MAX_LOG_BYTES=100)
    path = tmp_path / local_aws.LOG
    with path.open("ab", buffering=0) as log:
        log.write(b"a" * 100)
        local_aws.limit_log(log.fileno())
        assert path.read_bytes() == b"a" * 100
        log.write(b"b")
        local_aws.limit_log(log.fileno())
        log.write(b"next\n")
    assert path.read_text().splitlines() == ["the log was too large: what came before is gone", "next"]


@pytest.mark.parametrize("kind", ["a pipe", "a directory", "a symbolic link", "a hard link", "nothing"])
def test_an_address_that_is_no_file_of_the_servers_is_none(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / local_aws.ADDRESS, tmp_path / "target"
    target.write_text('{"http": 1, "mqtt": 2, "token": "t"}')
    make: dict[str, Callable[[], object]] = {
        "a pipe": lambda: os.mkfifo(path),
        "a directory": path.mkdir,
        "a symbolic link": lambda: path.symlink_to(target),
        "a hard link": lambda: path.hardlink_to(target),
    }
    make.get(kind, lambda: None)()
    assert local_aws._read_address(tmp_path) is None
    with pytest.raises(OSError, match=local_aws.ADDRESS):
        local_aws._read(path, 10)


def test_the_servers_own_address_is_read(tmp_path: Path) -> None:
    (tmp_path / local_aws.ADDRESS).write_text('{"http": 1, "mqtt": 2, "token": "t"}')
    found = local_aws._read_address(tmp_path)
    assert found and (found.http_port, found.mqtt_port, found.token) == (1, 2, "t")


def test_root_starts_no_server_where_another_user_can_change_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid():
        pytest.skip("only root gives files away")
    local_aws._refuse_owner(tmp_path)
    os.chown(tmp_path, 1000, -1)
    with pytest.raises(local_aws.LocalAwsError, match="DirectoryOfOthers"):
        local_aws._start(tmp_path / "local", lambda: None, lambda *_: None)
    assert not (tmp_path / "local" / local_aws.LOG).exists()
