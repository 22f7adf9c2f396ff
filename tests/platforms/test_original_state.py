"""A fleet that the original program made, in its own format, is a fleet of ELF's."""

from __future__ import annotations

import json
import stat
from typing import Any

import pytest
from support.aws import ANYTHING, Account, AwsService
from support.mqtt import mqtt_client_of
from support.shell import Elf, InProcess

ONCE = ("--duration", "0.01")
ELF_ID = "urn:uuid:95bb3ad5-95d1-4c9a-b818-b23f92fcde30"


@pytest.fixture
def original(elf: Elf, account: Account) -> Elf:
    """What the original left: two things, made without attributes, of which the first has sent already."""
    elf.misc.mkdir()
    (elf.misc / "elf.json").write_text(json.dumps({"elf_id": ELF_ID}))
    entries = []
    for name in ("thing_0", "thing_1"):
        keys: dict[str, Any] = account.iot.create_keys_and_certificate(setAsActive=True)
        account.iot.create_thing(thingName=name)
        account.iot.attach_thing_principal(thingName=name, principal=keys["certificateArn"])
        for suffix, text in (
            ("pem", keys["certificatePem"]),
            ("pub", keys["keyPair"]["PublicKey"]),
            ("prv", keys["keyPair"]["PrivateKey"]),
        ):
            (elf.misc / f"{name}.{suffix}").write_text(text)
        if name == "thing_0":
            policy = account.iot.create_policy(policyName="policy-thing_0", policyDocument=json.dumps(ANYTHING))
            account.iot.attach_principal_policy(policyName="policy-thing_0", principal=keys["certificateArn"])
            keys |= {"elf_policy": "policy-thing_0", "elf_policy_arn": policy["policyArn"]}
        entries.append({name: keys})
    (elf.misc / "things.json").write_text(json.dumps(entries, indent=2, default=str))
    for path in elf.misc.iterdir():
        path.chmod(0o644)
    return elf


def test_it_sends_and_listens_and_is_cleaned(original: Elf, account: Account, service: AwsService) -> None:
    window = original.subscribe("--count", 4)
    original("send", *original.to_broker, *ONCE)
    assert {topic for topic, _ in window.end().received} == {"elf/thing_0", "elf/thing_1"}
    assert account.policies() == ["policy-thing_0", "policy-thing_1"]
    client = mqtt_client_of(original, service, "thing_1", "thing_1-paho")
    assert client.connect() == "Success"
    client.close()
    original("clean")
    assert account.is_empty()
    assert original.files() == ["elf.json"]
    assert original.elf_json() == {}


@pytest.mark.parametrize("command", ["send", "subscribe", "create"])
def test_its_keys_leave_things_json_and_all_is_shut_to_others(main: InProcess, original: Elf, command: str) -> None:
    before = original.recorded()
    main(command, *((2,) if command == "create" else (*original.to_broker, *ONCE)))
    text = (original.misc / "things.json").read_text()
    for secret in ("PRIVATE KEY", "BEGIN", "keyPair", "certificatePem", "ResponseMetadata"):
        assert secret not in text
    for name, recorded in original.recorded().items():
        assert {key: before[name][key] for key in ("certificateArn", "certificateId")}.items() <= recorded.items()
        assert (original.misc / f"{name}.prv").read_text() == before[name]["keyPair"]["PrivateKey"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in original.misc.glob("*.prv")} == {0o600}
    assert stat.S_IMODE((original.misc / "things.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(original.misc.stat().st_mode) == 0o700


def test_keys_that_are_in_things_json_alone_are_saved(main: InProcess, original: Elf) -> None:
    before = original.recorded()["thing_1"]
    for suffix in ("pem", "pub", "prv"):
        (original.misc / f"thing_1.{suffix}").unlink()
    assert "2 acknowledged" in main("send", *original.to_broker, *ONCE).err
    assert (original.misc / "thing_1.prv").read_text() == before["keyPair"]["PrivateKey"]
    assert (original.misc / "thing_1.pub").read_text() == before["keyPair"]["PublicKey"]
    assert (original.misc / "thing_1.pem").read_text() == before["certificatePem"]


def test_create_adds_things_to_it(main: InProcess, original: Elf, account: Account) -> None:
    main("create", 3)
    assert account.things() == ["thing_0", "thing_1", "thing_2"]
    assert account.iot.describe_thing(thingName="thing_2")["attributes"] == {"elf_id": ELF_ID}
    main("clean")
    assert account.is_empty()


def test_it_lives_in_the_region_of_its_certificates(main: InProcess, original: Elf, account: Account) -> None:
    main.use({"AWS_DEFAULT_REGION": "eu-west-1"})
    assert "us-west-2" in main("clean", "--region", "eu-west-1", status=1).err
    main("clean")
    assert account.is_empty()


@pytest.mark.parametrize("command", ["send", "subscribe", "clean"])
def test_it_is_safe_from_credentials_of_another_account(
    main: InProcess, original: Elf, account: Account, service: AwsService, command: str
) -> None:
    before = account.snapshot(), set(original.recorded()), original.files()
    stranger = Account(service)
    main.use(stranger.credentials)
    main(command, *(() if command == "clean" else (*original.to_broker, *ONCE)), status=1)
    assert (account.snapshot(), set(original.recorded()), original.files()) == before
    assert stranger.is_empty()
    main.use(account.credentials)
    main("clean")
    assert account.is_empty()


def test_a_clean_that_fails_keeps_the_keys_that_only_things_json_has(
    original: Elf, service: AwsService, account: Account
) -> None:
    key = original.recorded()["thing_1"]["keyPair"]["PrivateKey"]
    (original.misc / "thing_1.prv").unlink()
    original("clean", status=1, env=Account(service).credentials)
    assert (original.misc / "thing_1.prv").read_text() == key
    original("send", *original.to_broker, *ONCE)
    assert (original.misc / "thing_1.prv").read_text() == key
    original("clean")
    assert account.is_empty()


def test_a_clean_that_fails_at_the_last_step_is_finished_by_the_next(
    main: InProcess, original: Elf, account: Account
) -> None:
    deny = {"Effect": "Deny", "Action": "iot:DeleteThing", "Resource": "*"}
    main.use(
        account.iam_user({"Version": "2012-10-17", "Statement": [{**deny, "Effect": "Allow", "Action": "*"}, deny]})
    )
    main("clean", status=1)
    assert account.things() == list(original.recorded()) == ["thing_0", "thing_1"]
    main.use(account.credentials)
    main("clean")
    assert account.is_empty()
