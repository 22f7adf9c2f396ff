"""What others put in ELF's way: links, open directories, forged state, and servers that are not what they seem."""

from __future__ import annotations

import contextlib
import json
import os
import re
import ssl
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from support.aws import SECRET, SESSION_TOKEN, Account, AwsService
from support.program import Limits
from support.shell import Elf, InProcess

ONCE = ("--duration", "0.01")
CERTIFICATE = "a" * 64
ARN = f"arn:aws:iot:us-west-2:123456789012:cert/{CERTIFICATE}"
GOOD = {"certificateArn": ARN, "certificateId": CERTIFICATE}

posix = pytest.mark.skipif(os.name != "posix", reason="links and modes are POSIX's")


@posix
@pytest.mark.parametrize(
    ("name", "content"), [("things.json", "[]"), ("elf.json", "{}"), ("things.journal", ""), (".lock", "precious")]
)
def test_no_file_of_elfs_is_written_through_a_symbolic_link(
    main: InProcess, elf: Elf, account: Account, tmp_path: Path, name: str, content: str
) -> None:
    target = tmp_path / "precious"
    target.write_text(content)
    elf.misc.mkdir(mode=0o700)
    (elf.misc / name).symlink_to(target)
    refused = main("create", status=1)
    assert "found a symbolic link in place of ELF's own file" in refused.err
    assert target.read_text() == content
    assert account.is_empty()


@posix
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


@posix
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


@posix
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
    main: InProcess, elf: Elf, account: Account, mode: int, names: list[str], command: tuple[str, ...]
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
        assert f"{elf.misc} is not only ELF's: {'its sticky bit' if not names else ''}" in result.err
        assert all(name.partition("/")[0] in result.err for name in names)
    assert entries_of(elf.misc) == before
    assert account.is_empty()


@posix
def test_what_came_into_a_fleets_directory_later_is_left_as_it_is(main: InProcess, elf: Elf, account: Account) -> None:
    main("create")
    (elf.misc / "thing_0.prv").chmod(0o644)
    others = [elf.misc / "notes.pem", elf.misc / ".thing_9.pem.20240131"]
    for path in others:
        path.write_text("precious")
        path.chmod(0o644)
    elf.misc.chmod(0o755)
    refused = main("create", 2, status=1).err
    assert "is not only ELF's" in refused
    assert all(path.name in refused for path in others)
    assert f"other users could read {elf.misc / 'thing_0.prv'}: made private" in main("send", *elf.broker, *ONCE).err
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


HOSTILE_THINGS: list[Any] = [
    {"thing_0": {}},
    {"thing_0": {"elf_policy": "policy-thing_0"}},
    {"../../thing_0": GOOD},
    {"a/b": GOOD},
    {"thing_0\x1b[2J": GOOD},
    {"thing_0\n": GOOD},
    {"": GOOD},
    {"x" * 129: GOOD},
    {"thing_0": []},
    {"thing_0": 1},
    {"thing_0": {"certificateArn": 1, "certificateId": 1}},
    {"thing_0": {"certificateArn": ARN, "certificateId": "../" + CERTIFICATE}},
    {"thing_0": {"certificateArn": ARN.replace("us-west-2", "../../x"), "certificateId": CERTIFICATE}},
    {"thing_0": {"certificateArn": ARN + "\n", "certificateId": CERTIFICATE}},
    {"thing_0": {**GOOD, "elf_policy": "policy-thing_1"}},
    {"thing_0": {**GOOD, "elf_policy": {"a": 1}}},
    {
        "thing_0": {
            **GOOD,
            "elf_policy": "policy-thing_0",
            "elf_policy_arn": "arn:aws:iam::aws:policy/AdministratorAccess",
        }
    },
    {"thing_0": {**GOOD, "elf_policy_arn": 1}},
    {"thing_0": {**GOOD, "elf_stage": ["creating"]}},
    {"thing_0": {**GOOD, "elf_stage": "\x1b]0;title\x07"}},
    {"thing_0": {"elf_stage": "creating", "elf_asked": "yesterday"}},
    {"thing_0": {"elf_stage": "creating", "elf_asked": -1}},
    {"thing_0": {"elf_stage": "creating", "elf_asked": 1e300}},
    {"thing_0": {"elf_stage": "creating", "elf_asked": float("nan")}},
    {"thing_0": {"elf_stage": "creating", "elf_asked": float("inf")}},
    {"thing_0": {"elf_stage": "creating", "elf_asked": True}},
    {"thing_0": {**GOOD, "elf_future": 1}},
]
HOSTILE_TEXTS = [
    *(json.dumps([entry]) for entry in HOSTILE_THINGS),
    '[{"thing_0": ' * 50_000,
    '[{"thing_0": {"elf_asked": ' + "9" * 10_000 + "}}]",
    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    '{"version": 99, "things": []}',
    "null",
]


def assert_refused_in_two_lines(err: str) -> None:
    errors = [line for line in err.splitlines() if ":ERROR - " in line]
    assert len(errors) == 2, err
    assert "could not read " in errors[0]
    assert "what to do: " in errors[1]
    assert "Traceback" not in err
    assert not [char for char in err if ord(char) < 32 and char != "\n"]


@pytest.mark.parametrize("command", ["create", "send", "clean"])
@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=range(len(HOSTILE_TEXTS)))
def test_a_forged_things_json_is_refused(
    main: InProcess, elf: Elf, account: Account, tmp_path: Path, text: str, command: str
) -> None:
    elf.misc.mkdir(mode=0o700)
    (elf.misc / "things.json").write_text(text)
    outside = sorted(tmp_path.rglob("*"))
    assert_refused_in_two_lines(main(command, status=1).err)
    assert (elf.misc / "things.json").read_text() == text
    assert sorted(tmp_path.rglob("*")) == outside
    assert account.is_empty()


@pytest.mark.parametrize(
    "content",
    [
        {"fleet": {"region": "../x"}},
        {"fleet": {"region": "us-west-2\x1b[2J"}},
        {"fleet": {"endpoint_url": "file:///etc/passwd"}},
        {"fleet": {"endpoint_url": "http://127.0.0.1:9/\nHost: x"}},
        {"fleet": {"account": 123456789012}},
        {"fleet": {"data_endpoint": "x y"}},
        {"fleet": {"data_endpoint": "localhost/../x"}},
        {"fleet": {"profile": "\x1b[31m"}},
        {"fleet": {"local": "yes"}},
        {"fleet": []},
        {"unanswered": 1},
        {"unanswered": [[1]]},
        {"unanswered": [[1, "x"]]},
        {"unanswered": [[-1, 1]]},
        {"unanswered": ["ab"]},
        {"elf_id": {"$ne": 1}},
    ],
    ids=str,
)
def test_a_forged_elf_json_is_refused(main: InProcess, elf: Elf, account: Account, content: Any) -> None:
    elf.misc.mkdir(mode=0o700)
    (elf.misc / "elf.json").write_text(json.dumps(content))
    assert_refused_in_two_lines(main("create", status=1).err)
    assert json.loads((elf.misc / "elf.json").read_text()) == content
    assert account.is_empty()


@contextlib.contextmanager
def server_of(version: ssl.TLSVersion, directory: Path) -> Iterator[tuple[int, list[str]]]:
    """A server with a certificate of its own for localhost, that speaks one version of TLS; what became of clients."""
    import socket
    from datetime import datetime, timedelta, timezone

    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, prv = directory / "server.pem", directory / "server.prv"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    prv.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(pem, prv)
    listener = socket.create_server(("127.0.0.1", 0))
    outcomes: list[str] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connection.settimeout(10)
                try:
                    with context.wrap_socket(connection, server_side=True) as tls:
                        outcomes.append(f"shook hands: {tls.version()}")
                except OSError as error:
                    outcomes.append(f"refused: {error}")

    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1], outcomes
    listener.close()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize(("version", "taken"), [("TLSv1_1", False), ("TLSv1_2", True)])
def test_tls_is_1_2_or_newer(
    main_of_pair: InProcess, tmp_path: Path, limits: Limits, version: str, taken: bool
) -> None:
    limits(PROPAGATION_S=0.0)
    with server_of(ssl.TLSVersion[version], tmp_path) as (port, outcomes):
        options = ("--mqtt-endpoint", f"localhost:{port}", "--root-cert", str(tmp_path / "server.pem"), *ONCE)
        result = main_of_pair("send", *options, status=1)
        assert "posting message" not in result.err
        assert outcomes
        assert all(outcome.startswith("shook hands" if taken else "refused") for outcome in outcomes)


def test_no_option_switches_verification_off(main: InProcess) -> None:
    for command in ((), ("create",), ("send",), ("subscribe",), ("clean",)):
        assert not re.search("insecure|no-verify|no-check|skip", main(*command, "--help").out)


def test_no_key_or_credential_is_in_anything_a_whole_run_prints_or_writes(
    elf: Elf, account: Account, service: AwsService, tmp_path: Path
) -> None:
    elf.environment["AWS_SESSION_TOKEN"] = SESSION_TOKEN
    said = elf("create", 2, "--debug").err
    secrets = {SECRET, SESSION_TOKEN, "PRIVATE KEY"}
    for file in elf.misc.glob("*.prv"):
        secrets |= {line for line in file.read_text().splitlines() if len(line) > 40}
    said += elf("send", *elf.broker, *ONCE, "--debug").err
    os.utime(elf.misc / "things.json", (1, 1))  # what is young would be tried again for a while
    account.iot.update_certificate(certificateId=account.certificate_of("thing_0"), newStatus="INACTIVE")
    said += elf("subscribe", *elf.broker, "--duration", "0.1", "--debug", status=1).err
    (elf.misc / "thing_1.prv").write_text((elf.misc / "thing_0.prv").read_text())
    said += elf("send", *elf.broker, *ONCE, "--debug", status=1).err
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".prv"]
    said += "".join(path.read_text(errors="replace") for path in written)
    said += elf("clean", "--debug").err
    assert len(secrets) > 30
    assert {secret for secret in secrets if secret in said} == set()
    assert "do not match: " in said
