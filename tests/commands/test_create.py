"""What `create` makes, adds and takes up again, and a fleet from beginning to end, with AWS asked after each step."""

from __future__ import annotations

import re

import pytest
from support.aws import REGION, Account
from support.failures import Explained
from support.shell import Elf, InProcess


def test_a_fleet_is_made_sends_listens_and_goes(elf: Elf, account: Account) -> None:
    elf("create", 2)
    assert account.things() == ["thing_0", "thing_1"]
    recorded = elf.recorded()
    assert account.certificates() == {recorded[name]["certificateId"]: "ACTIVE" for name in account.things()}
    for name in account.things():
        assert account.certificate_of(name) == recorded[name]["certificateId"]
    assert account.policies() == []

    window = elf.subscribe("--count", 2)
    assert account.policies() == ["policy-thing_0", "policy-thing_1"]
    assert account.policies_of("thing_1") == ["policy-thing_1"]
    elf("send", *elf.to_broker, "--duration", "0.01")
    assert {topic for topic, _ in window.end().received} <= {"elf/thing_0", "elf/thing_1"}

    elf("clean")
    assert account.is_empty()
    assert elf.files() == ["elf.json"]


def test_what_is_printed_is_what_the_original_printed(elf: Elf) -> None:
    lines = elf("create").lines
    elf_id = elf.elf_json()["elf_id"].removeprefix("urn:uuid:")
    certificate = elf.recorded()["thing_0"]["certificateArn"]
    assert lines == [
        f"no region was chosen: using the default, {REGION} (--region chooses another)",
        f"Wrote new ELF ID to config: {elf_id}",
        "[create_things] ELF creating 1 thing",
        f"in region {REGION}, credentials from env, endpoint {elf.environment['AWS_ENDPOINT_URL']}",
        f"Thing:'thing_0' associated with cert:'{certificate}'",
        f"Thing Name: thing_0 and PEM file: {elf.misc / 'thing_0.pem'}",
        f"Thing Name: thing_0 Public Key File: {elf.misc / 'thing_0.pub'}",
        f"Thing Name: thing_0 Private Key File: {elf.misc / 'thing_0.prv'}",
        f"Wrote 1 thing to config file: {elf.misc / 'things.json'}",
        f"[create_things] ELF created 1 thing in region:'{REGION}'.",
        f"now: {elf.typed} send",
    ]
    assert elf("create", 2).lines[:2] == [
        f"Read ELF ID from config: {elf_id}",
        "[create_things] ELF creating 1 thing",
    ]


def test_a_fleet_that_would_take_all_day_is_a_typing_error(main: InProcess, elf: Elf) -> None:
    result = main("create", 60_000_000, status=2)
    assert "60,000,000 is more than 100,000 things" in result.err
    assert not elf.misc.exists()


def test_create_again_changes_nothing(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", 2)
    before = account.snapshot(), elf.recorded()
    main("create", 2)
    assert (account.snapshot(), elf.recorded()) == before


def test_create_with_more_adds_what_is_missing(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", 1)
    first, certificates = elf.recorded()["thing_0"], account.certificates()
    main("create", 3)
    assert account.things() == ["thing_0", "thing_1", "thing_2"]
    assert elf.recorded()["thing_0"] == first
    assert certificates.items() < account.certificates().items()
    assert len(account.certificates()) == 3


@pytest.mark.parametrize("certificate_survives", [True, False])
def test_create_makes_again_what_is_gone_in_aws(
    main: InProcess, elf: Elf, account: Account, certificate_survives: bool
) -> None:
    main("create", 2)
    main("send", *elf.to_broker, "--duration", "0.01")
    before, key = elf.recorded()["thing_0"]["certificateArn"], (elf.misc / "thing_0.prv").read_text()
    account.iot.detach_thing_principal(thingName="thing_0", principal=before)
    account.iot.delete_thing(thingName="thing_0")
    if not certificate_survives:
        account.iot.detach_policy(policyName="policy-thing_0", target=before)
        account.iot.update_certificate(certificateId=before.rpartition("/")[2], newStatus="INACTIVE")
        account.iot.delete_certificate(certificateId=before.rpartition("/")[2])
    assert "missing in AWS, creating again: thing_0" in main("create", 2).err
    assert account.things() == ["thing_0", "thing_1"]
    assert (account.certificate_of("thing_0") == before.rpartition("/")[2]) is certificate_survives
    if certificate_survives:
        assert (elf.misc / "thing_0.prv").read_text() == key
    assert len(account.certificates()) == 2
    assert "2 acknowledged" in main("send", *elf.to_broker, "--duration", "0.01").err
    main("clean")
    assert account.is_empty()


def test_create_with_fewer_changes_nothing_and_names_clean(
    main: InProcess, elf: Elf, account: Account, explained: Explained
) -> None:
    main("create", 2)
    before = account.snapshot(), elf.recorded()
    refused = main("create", 1, status=1)
    facts = ("1 requested: thing_1", "elf.py clean thing_1`", "elf.py clean`", "elf.py create 1`")
    explained(refused, "TooManyThings", *facts)
    assert (account.snapshot(), elf.recorded()) == before


def test_a_second_prefix_is_added_to_the_fleet(main: InProcess, account: Account) -> None:
    main("create", 1)
    in_all = "the fleet now has 3 things in all: 2 with prefix lamp, 1 with prefix thing"
    assert in_all in main("create", 2, "--prefix", "lamp").err
    assert account.things() == ["lamp_0", "lamp_1", "thing_0"]
    assert in_all in main("create", 1).err
    main("clean")
    assert account.is_empty()


def test_a_prefix_with_a_colon_works_from_create_to_clean(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", "--prefix", "hall:lamp")
    assert account.things() == ["hall:lamp_0"]
    main("send", *elf.to_broker, "--duration", "0.01")
    assert len(account.policies_of("hall:lamp_0")) == 1
    main("clean")
    assert account.is_empty()


def test_prefixes_with_a_colon_and_a_dash_have_policies_of_their_own(
    main: InProcess, elf: Elf, account: Account
) -> None:
    main("create", "--prefix", "a:b")
    main("create", "--prefix", "a-b")
    main("send", *elf.to_broker, "--duration", "0.01")
    assert account.policies_of("a-b_0") == ["policy-a-b_0"]
    assert len(account.policies()) == 2
    main("clean")
    assert account.is_empty()


def test_a_forgotten_thing_that_somebody_gave_more_attributes_is_taken_up(
    main: InProcess, elf: Elf, account: Account
) -> None:
    main("create")
    (elf.misc / "things.json").unlink()
    more = {"attributes": {"floor": "2"}, "merge": True}
    account.iot.update_thing(thingName="thing_0", attributePayload=more)
    main("create")
    assert account.iot.describe_thing(thingName="thing_0")["attributes"]["floor"] == "2"
    assert list(account.certificates()) == [elf.recorded()["thing_0"]["certificateId"]]
    main("clean")
    assert account.is_empty()


def test_each_thing_carries_the_elf_id(main: InProcess, elf: Elf, account: Account) -> None:
    main("create")
    elf_id = elf.elf_json()["elf_id"]
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", elf_id)
    assert account.iot.describe_thing(thingName="thing_0")["attributes"] == {"elf_id": elf_id}


def test_the_elf_id_goes_with_the_fleet_and_the_next_one_has_another(main: InProcess, elf: Elf) -> None:
    main("create")
    elf_id = elf.elf_json()["elf_id"]
    main("clean")
    assert elf.elf_json() == {}
    main("create")
    assert elf.elf_json()["elf_id"] != elf_id


@pytest.mark.parametrize("denied", ["iot:CreateKeysAndCertificate", "iot:AttachThingPrincipal"])
def test_create_goes_on_after_a_failure(main: InProcess, elf: Elf, account: Account, denied: str) -> None:
    allow = {"Effect": "Allow", "Action": "iot:*", "Resource": "*"}
    main.use(
        account.iam_user(
            {"Version": "2012-10-17", "Statement": [allow, {"Effect": "Deny", "Action": denied, "Resource": "*"}]}
        )
    )
    assert denied in main("create", 2, status=1).err
    assert account.things() == list(elf.recorded()) == ["thing_0", "thing_1"]
    recorded = [thing["certificateId"] for thing in elf.recorded().values() if "certificateId" in thing]
    assert sorted(account.certificates()) == sorted(recorded)
    assert "skipping incomplete things: " in main("send", *elf.to_broker, status=1).err
    main.use(account.credentials)
    main("create", 2)
    assert account.things() == ["thing_0", "thing_1"]
    for name in account.things():
        assert account.certificate_of(name) == elf.recorded()[name]["certificateId"]
    assert len(account.certificates()) == 2


def test_create_says_last_what_comes_next(elf: Elf) -> None:
    for options in ((), ("--output", "json")):
        result = elf("create", *options)
        assert result.lines[-1] == f"now: {elf.typed} send"
        assert "now:" not in result.out
    other = elf.cwd / "an other"
    assert (
        elf("--misc-dir", other, "create", "--prefix", "other").lines[-1]
        == f"now: {elf.typed} --misc-dir '{other}' send"
    )
    assert "now:" not in elf("create", 0, status=2).err


def test_without_credentials_the_error_suggests_both_ways_on(main: InProcess, elf: Elf, explained: Explained) -> None:
    main.forget("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    explained(main("create", status=1), "CredentialsMissing", "`aws configure`", "elf.py --local create`")
    assert elf.recorded() == {}


@pytest.mark.parametrize(
    ("environment", "options", "failure", "fact"),
    [
        ({"AWS_PROFILE": "nobody"}, (), "BadAwsConfiguration", "nobody"),
        ({}, ("--profile", "nobody"), "BadAwsConfiguration", "nobody"),
        ({"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE"}, (), "CredentialsUnknown", ""),
        ({"AWS_REGION": "not a region"}, (), "BadPlace", "not a region"),
    ],
)
def test_a_create_that_cannot_reach_aws_says_why_and_leaves_nothing(
    main: InProcess,
    elf: Elf,
    account: Account,
    environment: dict[str, str],
    options: tuple[str, ...],
    failure: str,
    fact: str,
    explained: Explained,
) -> None:
    main.use(environment)
    result = main("create", *options, status=1)
    explained(result, failure, fact)
    assert result.err.count(":ERROR - ") == 2
    assert elf.recorded() == {}
    assert account.is_empty()
