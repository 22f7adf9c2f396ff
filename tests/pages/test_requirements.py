"""What the files of requirements say fits together, is what is installed, and is all that ELF needs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.aws import Account
from support.failures import Explained
from support.machine import await_end, kill_servers_of, posix_only, servers_of
from support.program import ELF, ROOT
from support.shell import Elf

ONCE = ("--duration", "0.01")
JSON = ("--output", "json")


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "requirements-local.txt").read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if line and line[0] not in "#-"]
    return {requirement.name: requirement for requirement in parsed}


def test_the_botocore_is_the_one_that_ministack_asks_for() -> None:
    asked = [Requirement(text) for text in importlib.metadata.requires("ministack") or ()]
    (botocore,) = (requirement for requirement in asked if requirement.name == "botocore")
    assert pins()["botocore"].specifier == botocore.specifier


def test_each_pin_is_what_is_installed() -> None:
    for name, requirement in pins().items():
        assert requirement.specifier.contains(importlib.metadata.version(name)), requirement


@pytest.fixture
def bare_python(tmp_path: Path) -> Iterator[str]:
    """A Python with nothing but what requirements.txt asks for."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    packages = next((tmp_path / "venv").rglob("site-packages"))
    wanted, linked = ["boto3", "AWSIoTPythonSDK"], set()
    while wanted:
        distribution = importlib.metadata.distribution(wanted.pop())
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if top not in linked:
                linked.add(top)
                (packages / top).symlink_to(str(distribution.locate_file(top)))
        for requirement in distribution.requires or ():
            name = re.match(r"[A-Za-z0-9._-]+", requirement)
            if name and "extra" not in requirement:
                wanted.append(name[0])
    assert not {"ministack", "cryptography", "hypercorn"} & linked
    yield str(tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python")


def test_all_but_local_needs_only_requirements_txt(elf: Elf, account: Account, bare_python: str) -> None:
    elf.python = bare_python
    refused = elf("--local", "create", status=1)
    assert "ministack" in refused.err
    assert f"uv pip install --python {bare_python} -r {ELF.parent / 'requirements-local.txt'}" in refused.err
    elf("create")
    window = elf.subscribe("--count", 1)
    elf("send", *elf.to_broker, *ONCE)
    assert [topic for topic, _ in window.end().received] == ["elf/thing_0"]
    elf("clean")
    assert account.is_empty()


FAKE_UV = """#!/bin/sh
echo "$@" >> "$UV_LOG"
case "$1" in
python) echo "$UV_PYTHON" ;;
sync) [ -z "$UV_FAILS" ] || { echo "error: no network" >&2; exit 2; }
      for option; do [ "$option" != --check ] || [ -e "$UV_LOG.done" ] || exit 1; done; touch "$UV_LOG.done" ;;
esac
"""


@posix_only
def test_uv_makes_an_environment_for_the_embedded_aws_iot_and_asks_no_second_time(
    local: Elf, bare_python: str, tmp_path: Path, explained: Explained
) -> None:
    uv, log = tmp_path / "uv", tmp_path / "uv.log"
    uv.write_text(FAKE_UV)
    uv.chmod(0o700)
    local.python = bare_python
    local.environment |= {"UV": str(uv), "UV_LOG": str(log), "UV_PYTHON": sys.executable}
    explained(
        local("--local", "create", *JSON, status=1, env={"UV_FAILS": "1"}),
        "LocalPackagesMissing",
        "error: no network",
        "uv sync --script",
    )
    assert "installing the packages of the embedded AWS IoT with uv" in local("--local", "create").err
    (server,) = servers_of(local)
    assert server.exe() == os.path.realpath(sys.executable)
    assert server.parent() is None or "uv" not in server.parent().name()
    kill_servers_of(local)
    await_end(server)
    again = local("--local", "create", 2)
    assert "starting the embedded AWS IoT" in again.err
    assert "installing" not in again.err
    local("send", "--count", 1)


def inline_requirements(path: Path) -> list[str]:
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert block
    listed = re.search(r"dependencies = (\[.*\])", re.sub(r"^# ?", "", block[1], flags=re.MULTILINE), re.DOTALL)
    assert listed
    return [str(requirement) for requirement in json.loads(re.sub(r",\s*\]", "]", listed[1]))]


def test_what_elf_says_it_needs_is_what_requirements_txt_says() -> None:
    assert sorted(inline_requirements(ELF)) == sorted((ROOT / "requirements.txt").read_text().splitlines())


def test_what_uv_installs_for_the_embedded_aws_iot_is_what_requirements_local_txt_says() -> None:
    lines = (ROOT / "requirements-local.txt").read_text().splitlines()
    wanted = [line for line in lines if line[0] not in "#-" and "[crt]" not in line]
    assert sorted(inline_requirements(ROOT / "iot_elf" / "embedded" / "environment.py")) == sorted(wanted)
