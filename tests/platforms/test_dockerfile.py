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
from support.aws import Account, AwsService
from support.program import ROOT
from support.shell import Elf

SECRETS = (
    "misc/thing_0.prv",
    "iot_elf/thing_0.prv",
    "misc/things.json",
    ".aws/credentials",
    ".git/config",
    "thing_0.pem",
    ".env",
)


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
    for line in filter(None, (ROOT / ".dockerignore").read_text().splitlines()):
        pattern = line.lstrip("!")
        if any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for name in names):
            verdict = line.startswith("!")
    return verdict


def sources() -> list[tuple[list[str], str]]:
    return [(words[:-1], words[-1]) for name, value in instructions() if name == "COPY" for words in [value.split()]]


def context_of(source: str) -> list[Path]:
    """List the files that a COPY of a file, or of a directory's content, finds."""
    path = ROOT / source
    return [path] if path.is_file() else [file for file in path.iterdir() if is_in_context(f"{source}/{file.name}")]


@pytest.fixture
def container(elf: Elf, tmp_path: Path) -> Elf:
    """A user whose ELF is the container's: its files, its environment and its volume."""
    root = tmp_path / "root"
    for files, directory in sources():
        (root / directory.strip("/")).mkdir(parents=True, exist_ok=True)
        for path in (path for file in files for path in context_of(file)):
            assert is_in_context(str(path.relative_to(ROOT)))
            shutil.copy(path, root / directory.strip("/"))
    for name, command in instructions():
        if name == "RUN" and "compileall" in command:
            command = command.replace("python", sys.executable, 1).replace("/elf/", f"{root}/elf/")
            subprocess.run(command, shell=True, check=True)
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
    paths = {str(path.relative_to(ROOT)) for path in (*ROOT.iterdir(), *(ROOT / "iot_elf").rglob("*"))}
    files = {"elf.py", "requirements.txt", "example.json", "example-shadow.json", "example-template.json"}
    assert copied == files | {"iot_elf"}
    modules = {f"iot_elf/{path.name}" for path in ROOT.glob("iot_elf/*.py")}
    assert set(filter(is_in_context, paths)) == files | modules | {"iot_elf/report.html"}
    assert not any(name in ("ADD", "ARG") or "AWS" in value for name, value in instructions())


def test_what_is_installed_is_what_was_copied_and_needs_no_root_afterwards() -> None:
    names = [name for name, _ in instructions()]
    install = next(index for index, (_, value) in enumerate(instructions()) if "pip install" in value)
    assert "--requirement /elf/requirements.txt" in instructions()[install][1]
    assert instructions()[install - 1] == ("COPY", "requirements.txt /elf/")  # before elf.py: it is cached
    assert value_of("USER") not in ("root", "0")
    assert max(index for index, name in enumerate(names) if name in ("RUN", "COPY")) < names.index("USER")


def test_its_package_is_compiled_in_the_image_since_it_is_not_later(container: Elf) -> None:
    assert container.environment["PYTHONDONTWRITEBYTECODE"]
    modules = {path.stem for path in ROOT.glob("iot_elf/*.py")}
    compiled = {path.name.partition(".")[0] for path in (container.script.parent / "iot_elf/__pycache__").iterdir()}
    assert compiled == modules


def test_a_fleet_is_made_sends_and_goes_in_the_container(container: Elf, account: Account) -> None:
    container("create", 2)
    assert {path.suffix for path in container.misc.iterdir()} >= {".pem", ".prv", ".json"}
    container("send", *container.to_broker, "--count", 1)
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
