"""What ELF keeps in misc/: which files, readable by whom, and what happens when they are not as ELF left them."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from support.aws import REGION, SECRET, SESSION_TOKEN, Account
from support.shell import Elf, InProcess

ONCE = ("--duration", "0.01")


def modes(directory: Path) -> dict[str, int]:
    paths = {".": directory} | {path.name: path for path in directory.iterdir()}
    return {name: stat.S_IMODE(path.stat().st_mode) for name, path in paths.items()}


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_no_file_is_ever_open_to_others_whatever_the_umask(elf: Elf, witness: Callable[[str], list[str]]) -> None:
    options = ("--mqtt-endpoint", elf.broker[1])
    elf("create", umask=0)
    elf("send", *options, *ONCE, status=1, umask=0)  # with Amazon's roots, which makes that file too
    assert modes(elf.misc) == {".": 0o700} | dict.fromkeys(elf.files(), 0o600)
    assert set(elf.files()) == {
        *("elf.json", "things.json", "amazon-root-ca.pem", "thing_0.pem", "thing_0.pub", "thing_0.prv")
    }
    elf("clean", umask=0)
    assert modes(elf.misc) == {".": 0o700, "elf.json": 0o600}
    assert witness("exposed") == []


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_files_that_others_could_read_are_shut(main: InProcess, elf: Elf) -> None:
    main("create")
    elf.misc.chmod(0o755)
    (elf.misc / "thing_0.prv").chmod(0o644)
    (elf.misc / "things.json").chmod(0o644)
    assert "other users could read" in main("create", 2).err
    assert {mode for name, mode in modes(elf.misc).items() if name != "."} == {0o600}
    assert modes(elf.misc)["."] == 0o700


def test_things_json_has_the_shape_of_the_original_without_keys(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", 2)
    entries: list[dict[str, Any]] = json.loads((elf.misc / "things.json").read_text())
    assert [list(entry) for entry in entries] == [["thing_0"], ["thing_1"]]
    for entry in entries:
        ((name, recorded),) = entry.items()
        certificate_id = account.certificate_of(name)
        assert recorded == {
            "certificateArn": f"arn:aws:iot:{REGION}:{account.id}:cert/{certificate_id}",
            "certificateId": certificate_id,
        }
    main("send", *elf.broker, *ONCE)
    assert elf.things()["thing_1"]["elf_policy"] == "policy-thing_1"
    assert (
        elf.things()["thing_1"]["elf_policy_arn"] == (account.iot.get_policy(policyName="policy-thing_1")["policyArn"])
    )


def test_a_thing_has_its_certificate_and_both_keys_in_files(main: InProcess, elf: Elf, account: Account) -> None:
    main("create")
    text = (elf.misc / "thing_0.pem").read_text()
    described = account.iot.describe_certificate(certificateId=account.certificate_of("thing_0"))
    assert text.strip() == described["certificateDescription"]["certificatePem"].strip()
    certificate = x509.load_pem_x509_certificate(text.encode())
    public = serialization.load_pem_public_key((elf.misc / "thing_0.pub").read_bytes())
    private = serialization.load_pem_private_key((elf.misc / "thing_0.prv").read_bytes(), password=None)
    assert certificate.public_key() == public == private.public_key()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("things.json", "not JSON"),
        ("things.json", "{}"),
        ("things.json", "[[]]"),
        ("things.json", '[{"thing_0": {}, "thing_1": {}}]'),
        ("things.json", '[{"../../thing_0": {}}]'),
        ("things.json", '[{"thing_0": "text"}]'),
        ("things.json", '[{"thing_0": {"certificateArn": "arn:aws:iot:us-west-2:1:cert/x", "certificateId": "x"}}]'),
        ("things.json", '[{"thing_0": {"elf_policy": "AdministratorAccess"}}]'),
        ("things.json", "[" * 100_000),
        ("elf.json", "not JSON"),
        ("elf.json", "[]"),
        ("elf.json", '{"elf_id": "me"}'),
        ("elf.json", '{"elf_id": "urn:uuid:95bb3ad5-95d1-4c9a-b818-b23f92fcde30", "fleet": {"region": 1}}'),
    ],
)
@pytest.mark.parametrize("command", ["create", "send", "clean"])
def test_a_state_file_that_is_not_elfs_is_named_and_left_alone(
    main: InProcess, elf: Elf, account: Account, file: str, content: str, command: str
) -> None:
    elf.misc.mkdir()
    (elf.misc / file).write_text(content)
    result = main(command, status=1)
    assert f"could not read {elf.misc / file}: " in result.err
    assert (elf.misc / file).read_text() == content
    assert account.is_empty()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_an_error_before_anything_is_made(
    main: InProcess, elf: Elf, account: Account
) -> None:
    elf.misc.mkdir(mode=0o500)
    assert "--misc-dir" in main("create", status=1).err
    assert account.is_empty()


def test_a_misc_dir_that_is_a_file_is_an_error_before_anything_is_made(
    main: InProcess, elf: Elf, account: Account
) -> None:
    elf.misc.write_text("")
    assert "--misc-dir" in main("create", status=1).err
    assert account.is_empty()


def secrets_of(elf: Elf) -> set[str]:
    """Every line of the body of every PEM file, and the credentials."""
    files = [path for path in elf.misc.iterdir() if path.suffix in (".pem", ".pub", ".prv")]
    bodies = {line for path in files for line in path.read_text().splitlines() if not line.startswith("-----")}
    return bodies | {SECRET, SESSION_TOKEN, "PRIVATE KEY", "BEGIN CERTIFICATE"}


def test_debug_shows_each_call_and_never_a_key_or_a_credential(elf: Elf) -> None:
    elf.environment["AWS_SESSION_TOKEN"] = SESSION_TOKEN
    options = ("--debug", *elf.broker)
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
    main("send", *elf.broker, *ONCE)
    calls = [line.partition("AWS ")[2].partition("(")[0] for line in main("clean", "--debug").lines if "(" in line]
    calls = [call for call in calls if call not in ("", "DescribeEndpoint")]
    assert {*calls[:2]} == {"DescribeThing", "ListAttachedPolicies"}
    assert {*calls[2:5]} == {"DetachPolicy", "DetachThingPrincipal", "UpdateCertificate"}
    assert calls[5:] == ["DeletePolicy", "DeleteCertificate", "DeleteThing"]


def test_a_fleet_without_debug_says_nothing_secret_either(main: InProcess, elf: Elf) -> None:
    said = main("create").err
    said += main("send", *elf.broker, *ONCE).err
    assert {secret for secret in secrets_of(elf) if secret in said} == set()


def test_what_a_crash_left_in_the_journal_counts_but_for_a_line_that_is_cut_off(elf: Elf, account: Account) -> None:
    elf("create", 3)
    first, second, third = json.loads((elf.misc / "things.json").read_text())
    (elf.misc / "things.json").write_text(json.dumps([first, third]))
    journal = [{"thing_1": {"elf_stage": "creating"}}, second, {"thing_2": None}]
    (elf.misc / "things.journal").write_text("".join(json.dumps(entry) + "\n" for entry in journal) + '{"thing_7": {"c')
    assert "already 2 things" in elf("create", 1, status=1).err
    assert [first, second] == json.loads((elf.misc / "things.json").read_text())
    assert not (elf.misc / "things.journal").exists()
    (elf.misc / "things.json").write_text(json.dumps([first, second, third]))
    elf("clean")
    assert account.is_empty()


def test_a_colon_is_in_the_name_of_a_thing_and_not_of_a_file(main: InProcess, elf: Elf, account: Account) -> None:
    """Windows takes none."""
    main("create", "--prefix", "a:b")
    assert account.things() == ["a:b_0"]
    assert {name for name in elf.files() if name.startswith("a")} == {"a+b_0.pem", "a+b_0.pub", "a+b_0.prv"} | (
        {"amazon-root-ca.pem"} & set(elf.files())
    )
    main("send", *elf.broker, *ONCE)
    main("clean")
    assert account.is_empty()
    assert elf.files() == ["elf.json"]
