"""No credential comes out of ELF, nor what moves a terminal's cursor, whatever a library puts in its messages."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import urllib.parse
from pathlib import Path
from types import ModuleType

import pytest
from support.aws import SESSION_TOKEN
from support.http_proxy import HttpProxy, aws_error
from support.program import ELF, ROOT
from support.shell import Elf

from iot_elf.console import LogFormatter

TOKEN = "TOKENthatIsASecret0123456789+/="
PYTHONS = sorted(Path(os.environ.get("PYENV_ROOT", "/nonexistent")).glob("versions/3.[89].*/bin/python"))


@pytest.mark.parametrize("end", ["\r", "\n", " ", "\t", "é"])
@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("AWS_SESSION_TOKEN", "session token"),
        ("AWS_SECRET_ACCESS_KEY", "secret access key"),
        ("AWS_ACCESS_KEY_ID", "access key ID"),
    ],
)
def test_a_credential_with_a_line_end_is_named_and_not_shown(elf: Elf, variable: str, name: str, end: str) -> None:
    elf.environment |= {"AWS_SESSION_TOKEN": SESSION_TOKEN, variable: TOKEN + end}
    result = elf("--debug", "--output", "json", "create", status=1)
    assert f"the AWS {name} (from env) contains a line end" in result.err
    assert "what to do: set it again" in result.err
    assert TOKEN.rstrip("=") not in result.err + result.out
    assert not elf.things()


@pytest.mark.parametrize(
    "written",
    [
        TOKEN,
        repr(TOKEN + "\r"),
        repr(TOKEN.encode()),
        urllib.parse.quote(TOKEN, safe=""),
        urllib.parse.quote(TOKEN),
        json.dumps(TOKEN),
    ],
    ids=["plain", "repr", "bytes", "in-a-query", "in-a-path", "in-json"],
)
def test_a_secret_in_aws_answer_is_not_shown(elf: Elf, proxy: HttpProxy, written: str) -> None:
    """Whoever writes it: a message that AWS or a proxy in between makes of the request, say."""
    elf.environment["AWS_SESSION_TOKEN"] = TOKEN
    proxy.inject("DescribeEndpoint", aws_error(403, "AccessDeniedException", f"you said {written}, and may not"))
    result = elf("--debug", "--output", "json", "create", status=1)
    assert "you said " in result.err
    assert "***" in result.err
    assert "***" in json.loads(result.out)["error"]["cause"]
    assert TOKEN not in result.err + result.out
    for quoted in (urllib.parse.quote(TOKEN, safe=""), urllib.parse.quote(TOKEN)):
        assert quoted not in result.err + result.out


def test_a_credential_by_which_a_role_is_assumed_is_named_and_not_shown(elf: Elf, tmp_path: Path) -> None:
    """It is not the one that the session ends up with."""
    config = tmp_path / "config"
    config.write_text(
        "[profile a]\nrole_arn = arn:aws:iam::123456789012:role/x\nsource_profile = b\nregion = us-west-2\n"
        f"[profile b]\naws_access_key_id = x\naws_secret_access_key = x\naws_session_token = {TOKEN}\n  {TOKEN}\n"
    )
    elf.environment |= {"AWS_CONFIG_FILE": str(config)}
    result = elf("--debug", "--output", "json", "--profile", "a", "create", status=1)
    assert "the AWS session token (from a role's source_profile) contains a line end" in result.err
    assert "what to do: set it again" in result.err
    assert TOKEN not in result.err + result.out
    assert not elf.things()


def test_a_containers_token_with_a_line_end_is_named_and_not_shown(elf: Elf) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        elf.environment.pop(name, None)
    elf.environment |= {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1:9/",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN": TOKEN + "\n",
    }
    result = elf("--debug", "create", status=1)
    assert "could not get AWS credentials" in result.err
    assert "what to do: remove the line end from AWS_CONTAINER_AUTHORIZATION_TOKEN" in result.err
    assert TOKEN not in result.err


def test_a_password_in_a_url_is_not_shown(elf: Elf) -> None:
    elf.environment |= {"HTTP_PROXY": "http://somebody:hunter2hunter2@127.0.0.1:9", "NO_PROXY": ""}
    result = elf("--debug", "--output", "json", "create", status=1)
    assert "could not get through the proxy" in result.err
    assert "hunter2" not in result.err + result.out
    result = elf("create", "--no-such-option", "somebody:hunter2hunter2@", status=2)
    assert "hunter2" not in result.err


@pytest.mark.parametrize("scheme", ["http://", ""])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "HTTPS_PROXY"])
def test_a_proxys_password_is_not_shown_whatever_the_url_begins_with(elf: Elf, variable: str, scheme: str) -> None:
    elf.environment |= {variable: f"{scheme}somebody:hunter2hunter2@127.0.0.1:9", "NO_PROXY": ""}
    result = elf("create", "--no-such-option", "somebody:hunter2hunter2@", "hunter2hunter2", status=2)
    assert "***" in result.err
    assert "hunter2" not in result.err
    if variable == "HTTP_PROXY":  # which is the one that the embedded AWS is reached by
        result = elf("--debug", "--output", "json", "create", status=1)
        assert "proxy" in result.err
        assert "hunter2" not in result.err + result.out


@pytest.mark.parametrize(("level", "is_shown"), [("DEBUG", True), ("INFO", False)])
def test_what_ends_a_thread_of_a_library_is_logged_without_its_secrets(level: str, is_shown: bool) -> None:
    program = (
        "import logging, sys, threading; from iot_elf import console, events, text; text.add_secret(sys.argv[1]); "
        "output = console.OutputWriter(events.EventQueue()); "
        "console.start_logging(getattr(logging, sys.argv[2]), output); "
        "thread = threading.Thread(target=int, args=sys.argv[1:2]); thread.start(); thread.join(); output.flush()"
    )
    command = [sys.executable, "-c", program, TOKEN, level]
    done = subprocess.run(command, cwd=ELF.parent, capture_output=True, text=True, check=True)
    assert TOKEN not in done.stderr
    assert ("ValueError: invalid literal for int() with base 10: '***'" in done.stderr) == is_shown
    assert bool(done.stderr) == is_shown


def test_nothing_that_is_logged_moves_the_cursor(module: ModuleType) -> None:
    """A traceback keeps its lines, and its text can't pretend to be one of them."""
    try:
        raise ValueError("\x1b[2Jgone\r\x07")
    except ValueError as error:
        facts = (type(error), error, error.__traceback__)
    record = logging.LogRecord("iot-elf", logging.ERROR, "", 0, "name\n\x1b[31m\u202e: %s", ("\x9b1A",), facts)
    first, *rest = LogFormatter().format(record).split("\n")
    assert first.endswith("ERROR - name\\n\\x1b[31m\\u202e: \\x9b1A")
    assert rest[0].startswith("Traceback")
    assert rest[-1] == "ValueError: \\x1b[2Jgone\\r\\x07"
    assert all(line.isprintable() for line in (first, *rest))


@pytest.mark.skipif(not PYTHONS, reason="there is no Python 3.8 or 3.9 here")
@pytest.mark.parametrize("python", PYTHONS, ids=lambda python: python.parent.parent.name)
@pytest.mark.parametrize("program", sorted(path.name for path in ROOT.glob("*.py")))
def test_an_old_python_is_refused_before_anything_is_done(python: Path, program: str, tmp_path: Path) -> None:
    command = [str(python), str(ELF.with_name(program)), "create", "--misc-dir", str(tmp_path / "misc")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{program} needs Python 3.10 or later")
    assert not list(tmp_path.iterdir())


def test_nohup_is_heeded(elf: Elf) -> None:
    """A SIGHUP that whoever started ELF has it ignore ends nothing."""
    window = elf.start("create", 5, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    window.await_line("ELF creating 5 things")
    window.signal(signal.SIGHUP)
    window.end(0)
    assert len(elf.things()) == 5
