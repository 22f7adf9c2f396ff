"""Whom a thing connects to, and whom it believes to be AWS IoT."""

from __future__ import annotations

import importlib.metadata
import re
import ssl
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore
import pytest
from support.aws import Account, AwsService
from support.program import ELF, copy_program
from support.shell import Elf, InProcess, Pair

ONCE = ("--duration", "0.01")
BUNDLE = Path(botocore.__file__).with_name("cacert.pem")


def certificates_in(file: Path) -> list[Any]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(file)
    return context.get_ca_certs()


def test_amazons_roots_come_from_botocore_and_nobody_else_is_believed(pair: Pair, service: AwsService) -> None:
    result = pair("send", "--mqtt-endpoint", f"localhost:{service.mqtt_port}", *ONCE, status=1)
    assert "its certificate is not trusted" in result.err
    assert "posting" not in result.err
    roots = certificates_in(pair.misc / "amazon-root-ca.pem")
    names = {dict(pair for relative in root["subject"] for pair in relative)["commonName"] for root in roots}
    assert {f"Amazon Root CA {number}" for number in (1, 2, 3, 4)} < names
    assert all(name.startswith(("Amazon", "Starfield Services")) for name in names)
    bundle = certificates_in(BUNDLE)
    assert all(root in bundle for root in roots)


def test_a_root_certificate_that_did_not_sign_the_broker_is_refused(main_of_pair: InProcess, pair: Pair) -> None:
    result = main_of_pair("subscribe", *pair.broker[:2], "--root-cert", BUNDLE, *ONCE, status=1)
    assert "its certificate is not trusted" in result.err


@pytest.mark.parametrize("content", [None, "", "not a certificate"])
def test_a_root_cert_that_is_none_is_refused(
    main_of_pair: InProcess, pair: Pair, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "root.pem"
    if content is not None:
        file.write_text(content)
    result = main_of_pair("send", *pair.broker[:2], "--root-cert", file, *ONCE, status=1 if content is None else 2)
    assert f"{file} is not a root certificate" in result.err


def test_the_host_name_of_the_broker_is_verified(main_of_pair: InProcess, pair: Pair, service: AwsService) -> None:
    """127.1 is 127.0.0.1, but not a name in the broker's certificate."""
    options = ("--root-cert", service.root_cert, *ONCE)
    main_of_pair("send", "--mqtt-endpoint", f"127.0.0.1:{service.mqtt_port}", *options)
    result = main_of_pair("send", "--mqtt-endpoint", f"127.1:{service.mqtt_port}", *options, status=1)
    assert "its certificate is for another host" in result.err
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
    result = main_of_pair(command, "--mqtt-endpoint", "localhost:1", *pair.broker[2:], *ONCE, status=1)
    assert "can't connect to localhost:1: nothing listens there" in result.err


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
    elf("send", *elf.broker, *ONCE)
    assert [topic for topic, _ in window.end().received] == ["elf/thing_0"]
    elf("clean")
    assert account.is_empty()
