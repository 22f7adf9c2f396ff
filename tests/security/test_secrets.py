"""No credential and no key comes out of ELF, whatever a library puts in its messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
from support.aws import SECRET, SESSION_TOKEN, Account, AwsService
from support.failures import Explained
from support.http_proxy import HttpProxy, aws_error
from support.program import ELF
from support.shell import Elf, InProcess

TOKEN = "TOKENthatIsASecret0123456789+/="

ONCE = ("--duration", "0.01")


@pytest.mark.parametrize("end", ["\r", "\n", " ", "\t", "é"])
@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("AWS_SESSION_TOKEN", "session token"),
        ("AWS_SECRET_ACCESS_KEY", "secret access key"),
        ("AWS_ACCESS_KEY_ID", "access key ID"),
    ],
)
def test_a_credential_with_a_line_end_is_named_and_not_shown(
    elf: Elf, variable: str, name: str, end: str, explained: Explained
) -> None:
    elf.environment |= {"AWS_SESSION_TOKEN": SESSION_TOKEN, variable: TOKEN + end}
    result = elf("--debug", "--output", "json", "create", status=1)
    explained(result, "BadCredentials", f"{name} (from env)", "sts get-caller-identity`")
    assert TOKEN.rstrip("=") not in result.err + result.out
    assert not elf.recorded()


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


def test_a_credential_by_which_a_role_is_assumed_is_named_and_not_shown(
    elf: Elf, tmp_path: Path, explained: Explained
) -> None:
    """It is not the one that the session ends up with."""
    config = tmp_path / "config"
    config.write_text(
        "[profile a]\nrole_arn = arn:aws:iam::123456789012:role/x\nsource_profile = b\nregion = us-west-2\n"
        f"[profile b]\naws_access_key_id = x\naws_secret_access_key = x\naws_session_token = {TOKEN}\n  {TOKEN}\n"
    )
    elf.environment |= {"AWS_CONFIG_FILE": str(config)}
    result = elf("--debug", "--output", "json", "--profile", "a", "create", status=1)
    explained(result, "BadCredentials", "session token (from a role's source_profile)")
    assert TOKEN not in result.err + result.out
    assert not elf.recorded()


def test_a_containers_token_with_a_line_end_is_named_and_not_shown(elf: Elf, explained: Explained) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        elf.environment.pop(name, None)
    elf.environment |= {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1:9/",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN": TOKEN + "\n",
    }
    result = elf("--debug", "--output", "json", "create", status=1)
    explained(result, "CredentialsUnavailable", "AWS_CONTAINER_AUTHORIZATION_TOKEN")
    assert TOKEN not in result.err + result.out


def test_a_password_in_a_url_is_not_shown(elf: Elf, explained: Explained) -> None:
    elf.environment |= {"HTTP_PROXY": "http://somebody:hunter2hunter2@127.0.0.1:9", "NO_PROXY": ""}
    result = elf("--debug", "--output", "json", "create", status=1)
    explained(result, "ControlPlaneProxyFails")
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


def secrets_of(elf: Elf) -> set[str]:
    """Every line of the body of every PEM file, and the credentials."""
    files = [path for path in elf.misc.iterdir() if path.suffix in (".pem", ".pub", ".prv")]
    bodies = {line for path in files for line in path.read_text().splitlines() if not line.startswith("-----")}
    return bodies | {SECRET, SESSION_TOKEN, "PRIVATE KEY", "BEGIN CERTIFICATE"}


def test_debug_shows_each_call_and_never_a_key_or_a_credential(elf: Elf) -> None:
    elf.environment["AWS_SESSION_TOKEN"] = SESSION_TOKEN
    options = ("--debug", *elf.to_broker)
    said = elf("create", "--debug").err
    window = elf.start("subscribe", *options, "--duration", "30", "--count", 1)
    window.await_line("thing_0 subscribed")
    said += elf("send", *options, *ONCE).err
    said += window.end().err
    said += elf("create", "--debug", "--prefix", "lamp", env={"AWS_ACCESS_KEY_ID": "AKIAUNKNOWN"}, status=1).err
    said += (elf.misc / "things.json").read_text() + (elf.misc / "elf.json").read_text()
    secrets = secrets_of(elf)
    said += elf("clean", "--debug").out
    for call in (
        *("AWS CreateThing(", "AWS CreateKeysAndCertificate(", "AWS AttachThingPrincipal(", "AWS DescribeEndpoint("),
        *("AWS CreatePolicy(", "AWS AttachPolicy("),
        *("MQTT thing_0: CONNECT", "MQTT thing_0: SUBSCRIBE", "MQTT thing_0: PUBLISH", "MQTT thing_0: DISCONNECT"),
    ):
        assert call in said
    assert "Traceback" in said
    assert len(secrets) > 40
    assert {secret for secret in secrets if secret in said} == set()


def test_debug_shows_each_call_of_clean(main: InProcess, elf: Elf) -> None:
    main("create")
    main("send", *elf.to_broker, *ONCE)
    calls = [line.partition("AWS ")[2].partition("(")[0] for line in main("clean", "--debug").lines if "(" in line]
    calls = [call for call in calls if call not in ("", "DescribeEndpoint", "ListThingPrincipals", "ListThings")]
    assert {*calls[:2]} == {"DescribeThing", "ListAttachedPolicies"}
    assert {*calls[2:5]} == {"DetachPolicy", "DetachThingPrincipal", "UpdateCertificate"}
    assert calls[5:] == ["DeletePolicy", "DeleteCertificate", "DeleteThing"]


def test_a_fleet_without_debug_says_nothing_secret_either(main: InProcess, elf: Elf) -> None:
    said = main("create").err
    said += main("send", *elf.to_broker, *ONCE).err
    assert {secret for secret in secrets_of(elf) if secret in said} == set()


def test_no_key_or_credential_is_in_anything_a_whole_run_prints_or_writes(
    elf: Elf, account: Account, service: AwsService, tmp_path: Path
) -> None:
    elf.environment["AWS_SESSION_TOKEN"] = SESSION_TOKEN
    said = elf("create", 2, "--debug").err
    secrets = {SECRET, SESSION_TOKEN, "PRIVATE KEY"}
    for file in elf.misc.glob("*.prv"):
        secrets |= {line for line in file.read_text().splitlines() if len(line) > 40}
    said += elf("send", *elf.to_broker, *ONCE, "--debug").err
    os.utime(elf.misc / "things.json", (1, 1))  # what is young would be tried again for a while
    account.iot.update_certificate(certificateId=account.certificate_of("thing_0"), newStatus="INACTIVE")
    said += elf("subscribe", *elf.to_broker, "--duration", "0.1", "--debug", status=1).err
    (elf.misc / "thing_1.prv").write_text((elf.misc / "thing_0.prv").read_text())
    said += elf("send", *elf.to_broker, *ONCE, "--debug", status=1).err
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".prv"]
    said += "".join(path.read_text(errors="replace") for path in written)
    said += elf("clean", "--debug").err
    assert len(secrets) > 30
    assert {secret for secret in secrets if secret in said} == set()
    assert "do not match: " in said
