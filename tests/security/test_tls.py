"""Whom a thing connects to, whom it believes to be AWS IoT, and with which TLS."""

from __future__ import annotations

import contextlib
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore
import pytest
from cryptography import x509
from support.aws import Account, AwsService
from support.failures import Explained
from support.networks import Impostor
from support.program import Limits, copy_program
from support.shell import Elf, InProcess, Pair

ONCE = ("--duration", "0.01")
BUNDLE = Path(botocore.__file__).with_name("cacert.pem")


def certificates_in(file: Path) -> list[Any]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(file)
    return context.get_ca_certs()


def test_amazons_roots_come_from_botocore_and_nobody_else_is_believed(
    main_of_pair: InProcess, pair: Pair, service: AwsService
) -> None:
    result = main_of_pair("send", "--mqtt-endpoint", f"localhost:{service.mqtt_port}", *ONCE, status=1)
    assert {failure.name for failure in result.failures} == {"NotTrusted"}
    assert "posting" not in result.err
    roots = certificates_in(pair.misc / "amazon-root-ca.pem")
    names = {dict(pair for relative in root["subject"] for pair in relative)["commonName"] for root in roots}
    assert {f"Amazon Root CA {number}" for number in (1, 2, 3, 4)} < names
    assert all(name.startswith(("Amazon", "Starfield Services")) for name in names)
    bundle = certificates_in(BUNDLE)
    assert all(root in bundle for root in roots)


def test_a_root_certificate_that_did_not_sign_the_broker_is_refused(main_of_pair: InProcess, pair: Pair) -> None:
    result = main_of_pair("subscribe", *pair.to_broker[:2], "--root-cert", BUNDLE, *ONCE, status=1)
    assert {failure.name for failure in result.failures} == {"NotTrusted"}


@pytest.mark.parametrize(("begins_in_h", "reason"), [(-3, "certificate has expired"), (1, "is not yet valid")])
def test_a_certificate_that_is_out_of_date_names_the_clock_and_whose_it_is(
    main_of_pair: InProcess, tmp_path: Path, explained: Explained, begins_in_h: int, reason: str
) -> None:
    with contextlib.closing(Impostor(tmp_path, begins_in_h=begins_in_h)) as impostor:
        to_it = ("--mqtt-endpoint", f"localhost:{impostor.port}", "--root-cert", impostor.root_cert)
        result = main_of_pair("send", "--things", 1, *to_it, *ONCE, status=1)
    facts = reason, "it is impostor's, signed by impostor", "this machine's clock, which says 20"
    explained(result, "NotTrusted", *facts)


@pytest.mark.parametrize("content", [None, "", "not a certificate"])
def test_a_root_cert_without_a_certificate_is_refused(
    main_of_pair: InProcess, pair: Pair, tmp_path: Path, content: str | None, explained: Explained
) -> None:
    file = tmp_path / "root.pem"
    if content is not None:
        file.write_text(content)
    result = main_of_pair("send", *pair.to_broker[:2], "--root-cert", file, *ONCE, status=2)
    explained(result, "NotARootCertificate", file)


def test_the_host_name_of_the_broker_is_verified(main_of_pair: InProcess, pair: Pair, service: AwsService) -> None:
    """127.1 is 127.0.0.1, but not a name in the broker's certificate."""
    options = ("--root-cert", service.root_cert, *ONCE)
    main_of_pair("send", "--mqtt-endpoint", f"127.0.0.1:{service.mqtt_port}", *options)
    result = main_of_pair("send", "--mqtt-endpoint", f"127.1:{service.mqtt_port}", *options, status=1)
    assert {failure.name for failure in result.failures} == {"OtherHost"}
    assert "posting" not in result.err


def test_the_root_certificate_beside_elf_is_believed(pair: Pair, service: AwsService, tmp_path: Path) -> None:
    script = pair.script
    pair.script = copy_program(tmp_path)
    (tmp_path / "aws-iot-rootCA.crt").write_bytes(service.root_cert.read_bytes())
    try:
        pair("send", "--mqtt-endpoint", f"localhost:{service.mqtt_port}", *ONCE)
    finally:
        pair.script = script


def test_things_connect_to_the_endpoint_of_their_account(
    elf: Elf, account: Account, service: AwsService, witness: Callable[[str], list[str]]
) -> None:
    address = account.iot.describe_endpoint(endpointType="iot:Data-ATS")["endpointAddress"].partition(":")[0]
    elf("create")
    options = ("--root-cert", service.root_cert, "--debug", *ONCE)
    sent = elf("send", "--mqtt-endpoint", f":{service.mqtt_port}", *options)
    assert f"CONNECT to {address}:{service.mqtt_port} as thing_0-" in sent.err
    assert "1 acknowledged" in sent.err


@pytest.mark.parametrize(("options", "port"), [((), 8883), (("--mqtt-endpoint", ":443"), 443)])
def test_the_port_is(
    elf: Elf,
    account: Account,
    service: AwsService,
    witness: Callable[[str], list[str]],
    options: tuple[str, ...],
    port: int,
) -> None:
    elf("create")
    elf("send", *options, "--root-cert", service.root_cert, *ONCE, status=1)  # the test has a broker on neither port
    assert f"127.0.0.1 {port}" in witness("connect")


@pytest.mark.parametrize("command", ["send", "subscribe"])
def test_a_broker_that_is_not_there_is_named(main_of_pair: InProcess, pair: Pair, command: str) -> None:
    result = main_of_pair(command, "--mqtt-endpoint", "localhost:1", *pair.to_broker[2:], *ONCE, status=1)
    assert "can't connect to localhost:1: nothing listens there" in result.err


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
