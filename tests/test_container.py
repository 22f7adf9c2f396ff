"""The Dockerfile: what it takes in, and what it starts.

Its instructions are followed here, without Docker; where a Docker daemon runs, the image is built as well.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser
from harness import ROOT, Account, AwsService, Elf
from program import program_files

SECRETS = ("misc/thing_0.prv", "misc/things.json", ".aws/credentials", ".git/config", "thing_0.pem", ".env")


def instructions() -> list[tuple[str, str]]:
    parsed: list[dict[str, Any]] = DockerfileParser(str(ROOT / "Dockerfile")).structure
    return [(each["instruction"], each["value"]) for each in parsed if each["instruction"] != "COMMENT"]


def value_of(instruction: str) -> str:
    (value,) = (value for name, value in instructions() if name == instruction)
    return value


def is_in_context(path: str) -> bool:
    """Say whether .dockerignore lets a path in: the last pattern that matches it, or a directory above it, decides."""
    verdict = True
    names = [path, *map(str, PurePosixPath(path).parents)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#") and any(fnmatch(name, pattern.lstrip("!")) for name in names):
            verdict = pattern.startswith("!")
    return verdict


def sources() -> list[tuple[list[str], str]]:
    return [(words[:-1], words[-1]) for name, value in instructions() if name == "COPY" for words in [value.split()]]


@pytest.fixture
def container(elf: Elf, tmp_path: Path) -> Elf:
    """A user whose ELF is the container's: its files, its environment and its volume."""
    root = tmp_path / "root"
    for files, directory in sources():
        (root / directory.strip("/")).mkdir(parents=True, exist_ok=True)
        for file in files:
            assert is_in_context(file)
            if (ROOT / file).is_dir():  # of which COPY takes what is in it
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / file, root / directory.strip("/"), dirs_exist_ok=True, ignore=ignored)
            else:
                shutil.copy(ROOT / file, root / directory.strip("/"))
    command, *arguments = json.loads(value_of("ENTRYPOINT"))
    assert (command, arguments) == ("python", ["/elf/elf.py"])
    elf.script = root / arguments[0].strip("/")
    elf.misc = root / value_of("VOLUME").strip("/")
    elf.misc.mkdir(mode=0o700)
    elf.script.parent.chmod(0o555)
    del elf.environment["ELF_MISC_DIR"]
    elf.environment |= dict(word.split("=", 1) for word in value_of("ENV").split())
    elf.environment["HOME"] = str(elf.home)
    return elf


def test_no_secret_is_in_the_image_nor_even_sent_to_the_daemon() -> None:
    assert [path for path in SECRETS if is_in_context(path)] == []
    copied = {file for files, _ in sources() for file in files}
    tracked = {path.name for path in ROOT.iterdir() if is_in_context(path.name)}
    program = {path.relative_to(ROOT).parts[0] for path in program_files()}
    examples = {"example.json", "example-shadow.json", "example-template.json"}
    assert tracked == copied == program | examples | {"requirements.txt"}
    assert all(is_in_context(path.relative_to(ROOT).as_posix()) for path in program_files())
    assert not any(name in ("ADD", "ARG") or "AWS" in value for name, value in instructions())


def test_what_is_installed_is_what_was_copied_and_needs_no_root_afterwards() -> None:
    names = [name for name, _ in instructions()]
    install = next(index for index, (_, value) in enumerate(instructions()) if "pip install" in value)
    assert "--requirement /elf/requirements.txt" in instructions()[install][1]
    assert instructions()[install - 1] == ("COPY", "requirements.txt /elf/")  # before elf.py: it is cached
    assert value_of("USER") not in ("root", "0")
    assert max(index for index, name in enumerate(names) if name in ("RUN", "COPY")) < names.index("USER")


def test_a_fleet_is_made_sends_and_goes_in_the_container(container: Elf, account: Account) -> None:
    container("create", 2)
    assert {path.suffix for path in container.misc.iterdir()} >= {".pem", ".prv", ".json"}
    container("send", *container.broker, "--count", 1)
    container("clean")
    assert account.is_empty()


def test_the_end_of_the_container_is_an_end_of_elf(container: Elf) -> None:
    container("create", 1)
    window = container.subscribe()
    window.signal(signal.SIGTERM)
    window.end(143)


def test_without_a_command_it_says_what_it_can_do(container: Elf) -> None:
    assert "create" in container(*json.loads(value_of("CMD"))).out


def docker(*arguments: object, **settings: Any) -> str:
    done = subprocess.run(["docker", *map(str, arguments)], capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.skipif(
    not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode != 0,
    reason="no Docker daemon runs here",
)
@pytest.mark.skipif(sys.platform != "linux", reason="--network host is Linux'")
def test_the_real_image_runs(account: Account, service: AwsService, tmp_path: Path) -> None:
    docker("build", "--tag", "aws-iot-elf-test", ROOT)
    environment = [f"--env={name}={value}" for name, value in account.credentials.items()]
    misc = tmp_path / "misc"
    misc.mkdir(mode=0o700)
    run = [
        *("run", "--rm", "--network", "host", *environment, f"--env=AWS_ENDPOINT_URL={service.url}"),
        *("--user", f"{os.getuid()}:{os.getgid()}", "--volume", f"{misc}:/elf/misc"),
        *("--volume", f"{service.root_cert}:/root-ca.pem:ro", "aws-iot-elf-test"),
    ]
    docker(*run, "create", 2)
    said = docker(
        *run, "send", "--count", 1, "--root-cert", "/root-ca.pem", "--mqtt-endpoint", f"localhost:{service.mqtt_port}"
    )
    assert "2 acknowledged, 0 lost" in said
    docker(*run, "clean")
    assert account.is_empty()
