"""Every command of the README is run, and every call of elf.py that it mentions is one that elf.py takes."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from harness import PATIENCE_S, ROOT, Elf, clean_environment, kill_servers_of

README = (ROOT / "README.md").read_text(encoding="utf-8")
BY_CI = {"Quick start": "block 'Quick start'", "Tests": "block Tests"}  # the two make a virtual environment
SMALLER = {"provisioning.py": "--things 12", "fleet.py": "--things 20 --duration 2"}


class Block(NamedTuple):
    heading: str
    language: str
    text: str


def blocks() -> list[Block]:
    found, heading = [], ""
    for title, language, text in re.findall(r"^#+ ([^\n]*)$|^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        heading = title or heading
        if not title:
            found.append(Block(heading, language, text))
    return found


def in_shell(language: str) -> list[object]:
    chosen = [block for block in blocks() if block.language == language]
    return [pytest.param(block, id=f"{block.heading} {number}") for number, block in enumerate(chosen)]


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Elf]:
    """A user in a clone of the repository, with three things on the embedded AWS IoT."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    directory = tmp_path / "clone"
    for name in names.stdout.splitlines():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, directory / name)
    user = Elf(tmp_path, {})
    user.script, user.cwd, user.misc = directory / "elf.py", directory, directory / "misc"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    user.environment = clean_environment(user.home) | {"PATH": path}
    user("--local", "create", 3)
    yield user
    user.close_windows()
    kill_servers_of(user)


def shell(clone: Elf, script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=clone.cwd,
        env=clone.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("block", in_shell("sh"))
def test_a_block_of_commands_does_what_it_says(block: Block, clone: Elf) -> None:
    if block.heading in BY_CI:
        assert BY_CI[block.heading] in (ROOT / ".ci" / "run").read_text()
        pytest.skip(".ci/run runs this one")
    if "docker" in block.text and subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker daemon runs here")
    if "docker run" in block.text:
        pytest.skip("it needs AWS: test_container runs such commands on MiniStack")
    if "jq" in block.text and not shutil.which("jq"):
        pytest.skip("jq is not installed")
    if "fleet.py" in block.text and not (shutil.which("mosquitto") and importlib.util.find_spec("awsiot")):
        pytest.skip("Mosquitto or awsiotsdk is not installed")
    if "tail -f" in block.text:
        pytest.skip("it has no end: the next test runs it")
    script = block.text
    for benchmark, options in SMALLER.items():
        script = script.replace(benchmark, f"{benchmark} {options}")
    process = shell(clone, script)
    out, _ = process.communicate(timeout=4 * PATIENCE_S)
    assert process.returncode == 0, out
    assert "Traceback" not in out


def test_a_file_that_grows_is_followed_until_ctrl_c(clone: Elf) -> None:
    (block,) = (block for block in blocks() if "tail -f" in block.text)
    readings = clone.cwd / "readings.jsonl"
    readings.write_text('{"reading": 1}\n')
    process = shell(clone, block.text)
    assert process.stdout
    for line in process.stdout:
        if "posting message" in line and '"reading": 1' in line:
            with readings.open("a") as file:
                file.write('{"reading": 2}\n')
        if "posting message" in line and '"reading": 2' in line:
            os.killpg(process.pid, signal.SIGINT)
        if "ELF sent" in line:
            assert line.endswith("ELF sent 6 messages from 3 things: 6 acknowledged, 0 lost\n") or " 0 lost" in line
    assert process.wait(PATIENCE_S) in (130, -signal.SIGINT)


@pytest.mark.skipif(not shutil.which("pwsh"), reason="PowerShell is not installed")
@pytest.mark.parametrize("block", in_shell("powershell"))
def test_a_block_for_windows_does_what_it_says(block: Block, clone: Elf) -> None:
    commands = [line for line in block.text.splitlines() if "Activate" not in line]
    subprocess.run(
        ["pwsh", "-c", "\n".join(commands)], cwd=clone.cwd, env=clone.environment, check=True, timeout=4 * PATIENCE_S
    )


def test_each_call_of_elf_that_is_mentioned_is_one(module: ModuleType) -> None:
    mentioned = re.findall(r"`(?:python |uv run |pipx run )?elf\.py ([^`]+)`", README)
    assert len(mentioned) > 20
    for arguments in mentioned:
        if not set("<…").isdisjoint(arguments):
            continue
        words = shlex.split(arguments)
        if words[-1] not in ("--help", "-h", "--version"):
            assert module.build_parser().parse_args(words).command, arguments


def test_each_option_is_in_the_readme_and_each_default_is_as_it_says(module: ModuleType) -> None:
    for command in module.COMMANDS:
        for names, _ in (*command.options, *module.GLOBAL_OPTIONS):
            for name in names:
                if name.startswith("-"):
                    assert f"`{name}" in README or f"`, `{name}" in README or f" {name}" in README, name


def test_the_exit_statuses_are_those_of_main(module: ModuleType) -> None:
    section = README.split("### Exit status")[1].split("###")[0]
    documented = {
        int(status) for row in re.findall(r"^\| ([\d, ]+) \|", section, re.MULTILINE) for status in row.split(",")
    }
    assert documented == {int(status) for status in re.findall(r"\b\d+\b", module.main.__doc__)}


def test_the_contents_lead_to_each_section() -> None:
    headings = re.findall(r"^## (.*)$", README, re.MULTILINE)
    contents = README.split("**Contents:**")[1].split("\n\n")[0]
    listed = re.findall(r"\[([^\]]+)\]\(#([^)]+)\)", contents)
    assert [title for title, _ in listed] == [
        heading for heading in headings if heading not in ("Quick start", "License")
    ]
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors
