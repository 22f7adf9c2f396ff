"""Things, policies and certificates that somebody else made or uses: no command takes them over or deletes them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.aws import ANYTHING, Account
from support.failures import Explained
from support.program import Limits
from support.shell import Elf, InProcess

ONCE = ("--duration", "0.01")


@pytest.mark.parametrize("attributes", [{}, {"elf_id": "urn:uuid:00000000-0000-0000-0000-000000000000"}])
def test_a_thing_of_somebody_else_is_not_taken_over(
    main: InProcess, elf: Elf, account: Account, attributes: dict[str, str]
) -> None:
    account.iot.create_thing(thingName="thing_0", attributePayload={"attributes": attributes})
    refused = main("create", status=1)
    assert "thing thing_0 already exists" in refused.err
    assert "--prefix" in refused.err
    assert account.snapshot() == (["thing_0"], {}, [])
    assert account.iot.describe_thing(thingName="thing_0")["attributes"] == attributes
    assert elf.files() == ["elf.json"]
    main("create", "--prefix", "mine")
    main("clean")
    assert account.things() == ["thing_0"]


def test_a_policy_of_somebody_else_is_not_taken_over(main: InProcess, elf: Elf, account: Account) -> None:
    main("create")
    document = '{"Version":"2012-10-17","Statement":[{"Effect":"Deny","Action":"iot:*","Resource":"*"}]}'
    account.iot.create_policy(policyName="policy-thing_0", policyDocument=document)
    refused = main("send", *elf.to_broker, "--duration", "0.01", status=1)
    assert "policy policy-thing_0 already exists" in refused.err
    main("clean")
    assert account.snapshot() == ([], {}, ["policy-thing_0"])


def test_clean_leaves_a_thing_whose_certificate_somebody_else_uses(
    main: InProcess, elf: Elf, account: Account, limits: Limits
) -> None:
    limits(CONSISTENCY_S=0.3)
    main("create", 2)
    arn = elf.recorded()["thing_0"]["certificateArn"]
    account.iot.create_thing(thingName="theirs")
    account.iot.attach_thing_principal(thingName="theirs", principal=arn)
    assert "thing_0: " in main("clean", status=1).err
    assert list(elf.recorded()) == ["thing_0"]
    assert account.things() == ["theirs", "thing_0"]
    account.iot.detach_thing_principal(thingName="theirs", principal=arn)
    main("clean")
    assert account.snapshot() == (["theirs"], {}, [])


class Stranger:
    """Somebody who deletes what ELF made behind its back, and uses the names for something else."""

    def __init__(self, main: InProcess, elf: Elf, account: Account) -> None:
        main("create")
        main("send", *elf.to_broker, "--duration", "0.01")
        self.iot, self.certificate = account.iot, elf.recorded()["thing_0"]["certificateArn"]
        self.theirs = account.iot.create_keys_and_certificate(setAsActive=True)

    def make_thing(self, **attributes: str) -> None:
        self.iot.detach_thing_principal(thingName="thing_0", principal=self.certificate)
        self.iot.delete_thing(thingName="thing_0")
        self.iot.create_thing(thingName="thing_0", attributePayload={"attributes": attributes})
        self.iot.attach_thing_principal(thingName="thing_0", principal=self.theirs["certificateArn"])

    def make_policy(self) -> None:
        self.iot.detach_policy(policyName="policy-thing_0", target=self.certificate)
        self.iot.delete_policy(policyName="policy-thing_0")
        document = json.dumps(ANYTHING)
        self.iot.create_policy(policyName="policy-thing_0", policyDocument=document)
        self.iot.create_policy_version(policyName="policy-thing_0", policyDocument=document, setAsDefault=True)
        self.iot.attach_policy(policyName="policy-thing_0", target=self.theirs["certificateArn"])


@pytest.fixture
def stranger(main: InProcess, elf: Elf, account: Account) -> Stranger:
    return Stranger(main, elf, account)


@pytest.mark.parametrize("attributes", [{}, {"elf_id": "urn:uuid:00000000-0000-0000-0000-000000000000"}])
def test_clean_leaves_a_thing_that_somebody_else_made_under_its_name(
    main: InProcess, account: Account, elf: Elf, stranger: Stranger, attributes: dict[str, str]
) -> None:
    stranger.make_thing(**attributes)
    assert "thing thing_0 was made by someone else: left alone" in main("clean").err
    assert account.snapshot() == (["thing_0"], {stranger.theirs["certificateId"]: "ACTIVE"}, [])
    assert account.certificate_of("thing_0") == stranger.theirs["certificateId"]
    assert elf.files() == ["elf.json"]


def test_clean_leaves_a_policy_that_somebody_else_made_under_its_name(
    main: InProcess, account: Account, elf: Elf, stranger: Stranger
) -> None:
    stranger.make_policy()
    assert "policy policy-thing_0 was made by someone else: left alone" in main("clean").err
    assert account.snapshot() == ([], {stranger.theirs["certificateId"]: "ACTIVE"}, ["policy-thing_0"])
    assert len(account.iot.list_policy_versions(policyName="policy-thing_0")["policyVersions"]) == 2
    assert elf.files() == ["elf.json"]


def test_a_second_clean_does_not_take_somebody_elses_thing_for_a_half_cleaned_one(
    main: InProcess, account: Account, stranger: Stranger
) -> None:
    stranger.make_thing()
    account.iot.detach_thing_principal(thingName="thing_0", principal=stranger.theirs["certificateArn"])
    deny = {"Effect": "Deny", "Action": "iot:DeleteCertificate", "Resource": "*"}
    main.use(
        account.iam_user({"Version": "2012-10-17", "Statement": [{**deny, "Effect": "Allow", "Action": "*"}, deny]})
    )
    main("clean", status=1)
    main.use(account.credentials)
    assert "thing thing_0 was made by someone else: left alone" in main("clean").err
    assert account.snapshot() == (["thing_0"], {stranger.theirs["certificateId"]: "ACTIVE"}, [])


def test_things_of_an_elf_whose_id_is_lost_are_anothers_until_they_are_adopted(
    main: InProcess, elf: Elf, account: Account, explained: Explained
) -> None:
    main("create", 2)
    elf_id = elf.elf_json()["elf_id"]
    before = account.snapshot()
    for path in elf.misc.iterdir():
        path.unlink()
    refused = main("create", 2, status=1)
    explained(refused, "ThingOfOthers", f"elf.py create --adopt {elf_id}`")
    assert account.snapshot() == before
    assert elf.elf_json()["elf_id"] != elf_id
    main("create", 2, "--adopt", elf_id)
    main("clean")
    assert account.is_empty()


def test_a_certificate_that_elf_did_not_make_stays_with_its_thing(
    main: InProcess, elf: Elf, account: Account, explained: Explained
) -> None:
    main("create")
    main("clean", "--only-local")
    theirs = account.iot.create_keys_and_certificate(setAsActive=True)["certificateArn"]
    account.iot.create_policy(policyName="theirs", policyDocument=json.dumps(ANYTHING))
    account.iot.attach_policy(policyName="theirs", target=theirs)
    account.iot.attach_thing_principal(thingName="thing_0", principal=theirs)
    refused = main("create", "--adopt", status=1)
    explained(refused, "CertificateOfOthers", "thing_0", theirs)
    assert account.certificates()[theirs.rpartition("/")[2]] == "ACTIVE"
    assert theirs in account.iot.list_thing_principals(thingName="thing_0")["principals"]
    account.iot.detach_thing_principal(thingName="thing_0", principal=theirs)
    main("create", "--adopt")
    main("clean")
    assert account.snapshot() == ([], {theirs.rpartition("/")[2]: "ACTIVE"}, ["theirs"])


def test_clean_leaves_what_create_only_asked_for_and_somebody_else_made(
    main: InProcess, elf: Elf, account: Account
) -> None:
    main("create")
    recorded = elf.recorded()["thing_0"]
    account.iot.create_thing(thingName="thing_1")
    document = json.dumps(ANYTHING)
    account.iot.create_policy(policyName="policy-thing_0", policyDocument=document)
    entries: list[dict[str, Any]] = [
        {"thing_0": {**recorded, "elf_policy": "policy-thing_0"}},
        {"thing_1": {"elf_stage": "creating"}},
        {"thing_2": {"elf_stage": "creating"}},
    ]
    (elf.misc / "things.json").write_text(json.dumps(entries))
    main("clean")
    assert account.snapshot() == (["thing_1"], {}, ["policy-thing_0"])
    assert elf.files() == ["elf.json"]


@pytest.mark.parametrize(
    "attached", ["a certificate to the policy", "a thing to the certificate", "a certificate to the thing"]
)
def test_clean_names_at_once_who_else_uses_a_thing_a_certificate_or_a_policy(
    main: InProcess, elf: Elf, account: Account, attached: str, explained: Explained
) -> None:
    main("create", 2)
    main("send", *elf.to_broker, *ONCE)
    iot = account.iot
    arn = elf.recorded()["thing_0"]["certificateArn"]
    theirs = iot.create_keys_and_certificate(setAsActive=False)["certificateArn"]
    iot.create_thing(thingName="theirs")
    user, detach = {
        "a certificate to the policy": (
            theirs,
            lambda: iot.detach_policy(policyName="policy-thing_0", target=theirs),
        ),
        "a thing to the certificate": (
            "thing theirs",
            lambda: iot.detach_thing_principal(thingName="theirs", principal=arn),
        ),
        "a certificate to the thing": (
            theirs,
            lambda: iot.detach_thing_principal(thingName="thing_0", principal=theirs),
        ),
    }[attached]
    if attached == "a certificate to the policy":
        iot.attach_policy(policyName="policy-thing_0", target=theirs)
    elif attached == "a thing to the certificate":
        iot.attach_thing_principal(thingName="theirs", principal=arn)
    else:
        iot.attach_thing_principal(thingName="thing_0", principal=theirs)
    result = main("clean", status=1)
    explained(result, "StillAttached", "thing_0: ", f" {user}")
    assert "trying again" not in result.err
    assert list(elf.recorded()) == ["thing_0"]
    detach()
    main("clean")
    assert account.things() == ["theirs"]
    assert list(account.certificates()) == [theirs.rpartition("/")[2]]


def test_clean_leaves_the_versions_of_an_edited_policy_that_others_use(
    main: InProcess, elf: Elf, account: Account
) -> None:
    main("create")
    main("send", *elf.to_broker, *ONCE)
    account.edit_policy("policy-thing_0", lambda statements: statements.pop())
    theirs = account.iot.create_keys_and_certificate(setAsActive=False)["certificateArn"]
    account.iot.attach_policy(policyName="policy-thing_0", target=theirs)
    main("clean", status=1)
    assert len(account.iot.list_policy_versions(policyName="policy-thing_0")["policyVersions"]) == 2
