"""Every command of the pages is run, every call of elf.py that they mention is one, and every link leads somewhere."""

from __future__ import annotations

import compileall
import contextlib
import html
import importlib.util
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from support import forking
from support.machine import PATIENCE_S, await_listener, free_port, kill_servers_of
from support.mosquitto import find_mosquitto
from support.program import PACKAGE, ROOT
from support.shell import Elf

REPOSITORY = "https://github.com/awslabs/aws-iot-elf.git"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *ROOT.glob("docs/*.md"))
}
BY_CI = {"Quick start": "README.md 'Quick start'", "Tests": "README.md Tests"}  # they make virtual environments
SMALLER = {
    "chaos.py": "--duration 5",
    "replay.py": "--megabytes 6 --things 5",
    "provisioning.py": "--things 5",
    "recording.py": "--most 1000",
    "startup.py": "--repeats 1",
    "sequences.py": "--things 30",
    "fleet.py": "--things 20 --duration 2",
    "templates.py": "--things 20 --duration 2",
}

Shell = Callable[[str], "subprocess.Popen[str]"]


class Block(NamedTuple):
    page: str
    heading: str
    language: str
    text: str


def blocks() -> list[Block]:
    found = []
    for page, text in PAGES.items():
        heading = ""
        for title, language, block in re.findall(
            r"^#+ ([^\n]*)$|^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
        ):
            heading = title or heading
            if not title:
                found.append(Block(page, heading, language, block))
    return found


def in_language(language: str) -> list[Block]:
    return [block for block in blocks() if block.language == language]


def by_ci(block: Block) -> str:
    """The arguments of `blocks` with which .ci/run runs a block, if it does."""
    return BY_CI[block.heading] if BY_CI.get(block.heading, "").startswith(block.page) else ""


def reason_to_skip(block: Block) -> str:
    """Say why a block of commands is not run, if it is not: known before a clone is made for it."""
    if by_ci(block):
        return ".ci/run runs this one"
    if "docker run" in block.text:
        return "it needs AWS: test_container runs such commands on MiniStack"
    if block.page == "docs/rules.md":
        return "test_rules runs these, one after the other"
    if "docker" in block.text:
        has_docker = shutil.which("docker") and not subprocess.run(["docker", "info"], capture_output=True).returncode
        return "" if has_docker else "no Docker daemon runs here"
    if "mosquittoPub" in block.text and not shutil.which("mosquitto_pub"):
        return "mosquitto_pub is not installed"
    if "jq" in block.text and not shutil.which("jq"):
        return "jq is not installed"
    with_mosquitto = "fleet.py" in block.text or "replay.py" in block.text
    if with_mosquitto and not find_mosquitto():
        return "Mosquitto is not installed"
    if "/fleet.py" in block.text and not importlib.util.find_spec("awscrt"):
        return "the AWS CRT client is not built for this processor"
    has_no_end = "tail -f" in block.text or "locust --processes" in block.text
    return "it has no end: a test below runs it" if has_no_end else ""


def in_shell(language: str) -> list[object]:
    return [
        pytest.param(
            block,
            id=f"{block.page} {block.heading} {number}",
            marks=[pytest.mark.skip(reason)] if language == "sh" and (reason := reason_to_skip(block)) else [],
        )
        for number, block in enumerate(in_language(language))
    ]


def anchors(page: str) -> set[str]:
    """Name the headings of a page as GitHub does."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    return {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


def links(page: str) -> list[tuple[str, str]]:
    """List the path and the anchor of each link of a page to a file of the repository."""
    found = []
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            place = ((ROOT / page).parent / path).resolve() if path else ROOT / page
            found.append((str(place.relative_to(ROOT)), anchor))
    return found


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone of the repository has, compiled."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    directory = tmp_path_factory.mktemp("repository")
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, directory / name)
    assert compileall.compile_dir(directory / PACKAGE.name, quiet=1)
    return directory


@pytest.fixture(scope="session")
def home(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a user has a clone of the repository, for all blocks in turn, as for a reader who tries them."""
    directory = tmp_path_factory.mktemp("reader")
    shutil.copytree(repository, directory / "clone")
    yield directory
    kill_servers_of(reader_at(directory))


def reader_at(home: Path) -> Elf:
    elf = Elf(home, {"ELF_MISC_DIR": str(home / "clone" / "misc")})
    elf.misc = home / "clone" / "misc"
    return elf


@pytest.fixture
def clone(home: Path, repository: Path) -> Iterator[Elf]:
    """A user in the clone, with three things on the embedded AWS IoT and nothing else that another block left."""
    elf, directory = reader_at(home), home / "clone"
    if others := elf.recorded().keys() - {"thing_0", "thing_1", "thing_2"}:
        elf("clean", *others)
    elf("--local", "create", 3)
    elf.script, elf.cwd = directory / "elf.py", directory
    path = [Path(sys.executable).parent, os.environ["PATH"]]
    if forking.CAN_FORK:
        path.insert(0, forking.python_in_shells())
    elf.environment |= {"PATH": os.pathsep.join(map(str, path))}
    yield elf
    elf.close_windows()
    for path_left in directory.iterdir():
        if not (repository / path_left.name).exists() and path_left != elf.misc:
            shutil.rmtree(path_left) if path_left.is_dir() else path_left.unlink()


@pytest.fixture
def shell(clone: Elf) -> Iterator[Shell]:
    """Start a script in a shell of its own in the clone."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=clone.cwd,
            env=clone.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_the_picture_shows_the_quick_start() -> None:
    picture = html.unescape((ROOT / "docs" / "elf.svg").read_text(encoding="utf-8"))
    commands = [block.text for block in in_language("sh") if block.heading == "Quick start"]
    quick_start = [text for text in commands if "python elf.py" in text]  # the others are uv's
    assert len(quick_start) == 4
    for text in [*quick_start, "python elf.py send --verify --count 3"]:
        assert f">$ {text[text.index('python elf.py') :].strip()}<" in picture


def test_the_picture_begins_with_a_result_and_is_short() -> None:
    """Many look no longer, or see no animation."""
    picture = html.unescape((ROOT / "docs" / "elf.svg").read_text(encoding="utf-8"))
    lines = dict(re.findall('<text id="(l\\d+)"[^>]*>(.*?)</text>', picture))
    first = re.findall('<use href="#(l\\d+)"', picture.partition('<g transform="translate(')[2].partition("</g>")[0])
    assert any("came back: 9 of 9 messages" in lines[name] for name in first)
    assert float(re.findall(r"animation:run ([\d.]+)s", picture)[0]) < 25


def test_what_ci_runs_is_in_its_script() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert all(f"blocks {by_ci(block)}" in script for block in in_language("sh") if by_ci(block))


@pytest.mark.parametrize("block", in_shell("sh"))
def test_a_block_of_commands_does_what_it_says(block: Block, clone: Elf, shell: Shell) -> None:
    script = block.text.replace("git clone", f"git -c url.'{ROOT}'.insteadOf={REPOSITORY} clone")
    for benchmark, options in SMALLER.items():
        script = script.replace(benchmark, f"{benchmark} {options}")
    if "--view" in script:
        terminal = clone.in_terminal(script=script)
        status, out = terminal.status, terminal.written
    else:
        process = shell(script)
        out, _ = process.communicate(timeout=4 * PATIENCE_S)
        status = process.returncode
    assert status == 0, out
    assert "Traceback" not in out


@pytest.mark.parametrize("block", [block for block in in_language("python") if block.page == "docs/clients.md"])
def test_a_client_that_is_not_elf_is_a_thing(block: Block, clone: Elf) -> None:
    if "awscrt" in block.text and not importlib.util.find_spec("awscrt"):
        pytest.skip("the AWS CRT client is not built for this processor")
    clone("send", "--count", 1)
    window = clone.start("subscribe", "--count", 1, "--duration", PATIENCE_S)
    window.await_line("ELF listening on")
    (clone.cwd / "client.py").write_text(block.text)
    done = subprocess.run([clone.python, "client.py"], cwd=clone.cwd, env=clone.environment, check=False)
    assert done.returncode == 0
    assert [payload for _, payload in window.end().received] == [
        "hello from paho" if "paho" in block.text else "hello from the SDK"
    ]


def test_a_file_that_grows_is_followed_until_ctrl_c(clone: Elf, shell: Shell) -> None:
    (block,) = (block for block in blocks() if "tail -f" in block.text)
    readings = clone.cwd / "readings.jsonl"
    readings.write_text('{"reading": 1}\n')
    process = shell(block.text)
    assert process.stdout
    is_interrupted = False
    for line in process.stdout:
        if "posting message" in line and '"reading": 1' in line:
            with readings.open("a") as file:
                file.write('{"reading": 2}\n')
        if "posting message" in line and '"reading": 2' in line and not is_interrupted:
            is_interrupted = True  # a second Ctrl-C would stop at once, acknowledged or not
            os.killpg(process.pid, signal.SIGINT)
        if "ELF sent" in line:
            assert line.endswith("ELF sent 6 messages from 3 things: 6 acknowledged, 0 lost\n") or " 0 lost" in line
    assert process.wait(PATIENCE_S) in (130, -signal.SIGINT)


def test_locusts_page_is_there_until_ctrl_c(shell: Shell) -> None:
    (block,) = (block for block in in_language("sh") if "locust --processes" in block.text)
    process = shell(block.text)
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if f"{os.cpu_count()} workers connected" in line:  # all have started
            await_listener(8089)
            with urllib.request.urlopen("http://localhost:8089", timeout=PATIENCE_S) as page:
                assert b"Locust" in page.read()
            os.killpg(process.pid, signal.SIGINT)
    assert process.wait(PATIENCE_S) in (0, 130, -signal.SIGINT), "".join(lines)
    assert "Traceback" not in "".join(lines)


@pytest.mark.long
def test_the_commands_for_three_machines_share_a_fleet(shell: Shell) -> None:
    commands = re.findall(r"^\S+\$ (.*)$", "".join(block.text for block in in_language("console")), re.MULTILINE)
    assert len(commands) == 3
    port = free_port()
    for ours, theirs in (
        ("--master ", f"--master --master-bind-port {port} --headless --run-time 4s "),
        ("--master-host master", f"--master-host 127.0.0.1 --master-port {port}"),
    ):
        commands = [command.replace(ours, theirs) for command in commands]
    machines = [shell(command) for command in commands]
    outputs = [machine.communicate(timeout=4 * PATIENCE_S)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0, 0], outputs
    assert "to 4 ready workers" in outputs[0]
    assert re.search(r"CONNECT +\S+ +3 +0\(0.00%\)", outputs[0]), outputs[0]


@pytest.mark.skipif(not shutil.which("pwsh"), reason="PowerShell is not installed")
@pytest.mark.parametrize("block", in_shell("powershell"))
def test_a_block_for_windows_does_what_it_says(block: Block, clone: Elf) -> None:
    commands = [line for line in block.text.splitlines() if "Activate" not in line]
    subprocess.run(
        ["pwsh", "-c", "\n".join(commands)], cwd=clone.cwd, env=clone.environment, check=True, timeout=4 * PATIENCE_S
    )


def test_each_call_of_elf_that_is_mentioned_is_one(module: ModuleType) -> None:
    mentioned = re.findall(r"`(?:python |uv run |pipx run )?elf\.py ([^`]+)`", "".join(PAGES.values()))
    assert len(mentioned) > 20
    for arguments in mentioned:
        if not set("<…").isdisjoint(arguments):
            continue
        words = shlex.split(re.sub(r"(?<=--adopt) ID\b", f" {uuid.uuid4()}", arguments))
        if words[-1] not in ("--help", "-h", "--version"):
            assert module.build_parser().parse_args(words).command, arguments


def test_each_option_is_among_the_commands(module: ModuleType) -> None:
    page = PAGES["docs/commands.md"]
    for command in ("create", "send", "subscribe", "list", "env", "clean"):
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            module.build_parser().parse_args([command, "--help"])
        for name in re.findall(r"(?<![\w>-])--?[a-z][\w-]*", text.getvalue()):
            assert f"`{name}" in page or f" {name}" in page, name


def test_the_exit_statuses_are_those_of_main(module: ModuleType) -> None:
    section = PAGES["docs/scripting.md"].split("## Exit status")[1].split("##")[0]
    documented = {
        int(status) for row in re.findall(r"^\| ([\d, ]+) \|", section, re.MULTILINE) for status in row.split(",")
    }
    assert documented == {int(status) for status in re.findall(r"\b\d+\b", module.main.__doc__)}


def test_each_block_says_its_language() -> None:
    assert all(block.language for block in blocks())  # else a fence is missing, and text is taken for commands


@pytest.mark.parametrize("page", PAGES)
def test_each_link_leads_somewhere(page: str) -> None:
    for path, anchor in links(page):
        assert (ROOT / path).exists(), path
        assert not anchor or anchor in anchors(path), f"{path}#{anchor}"


def test_the_readme_leads_to_each_page() -> None:
    assert {path for path, _ in links("README.md")} >= set(PAGES) - {"README.md"}
