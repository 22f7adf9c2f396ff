"""A fleet from its creation to its end, with AWS asked after each step."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from support.aws import ANYTHING, REGION, Account, AwsService
from support.http_proxy import LATE, HttpProxy
from support.machine import PATIENCE_S
from support.mqtt import Client, client_of
from support.program import Limits
from support.shell import Elf, InProcess, Pair


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Switch between threads so often that a race which can be lost is lost."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval_s)


def test_a_fleet_is_made_sends_listens_and_goes(elf: Elf, account: Account) -> None:
    elf("create", 2)
    assert account.things() == ["thing_0", "thing_1"]
    recorded = elf.things()
    assert account.certificates() == {recorded[name]["certificateId"]: "ACTIVE" for name in account.things()}
    for name in account.things():
        assert account.certificate_of(name) == recorded[name]["certificateId"]
    assert account.policies() == []

    window = elf.subscribe("--count", 2)
    assert account.policies() == ["policy-thing_0", "policy-thing_1"]
    assert account.policies_of("thing_1") == ["policy-thing_1"]
    elf("send", *elf.broker, "--duration", "0.01")
    assert {topic for topic, _ in window.end().received} <= {"elf/thing_0", "elf/thing_1"}

    elf("clean")
    assert account.is_empty()
    assert elf.files() == ["elf.json"]


def test_what_is_printed_is_what_the_original_printed(elf: Elf) -> None:
    lines = elf("create").lines
    elf_id = elf.elf_json()["elf_id"].removeprefix("urn:uuid:")
    certificate = elf.things()["thing_0"]["certificateArn"]
    assert lines == [
        f"Wrote new ELF ID to config: {elf_id}",
        "[create_things] ELF creating 1 thing",
        f"in region {REGION}, credentials from env, endpoint {elf.environment['AWS_ENDPOINT_URL']}",
        f"Thing:'thing_0' associated with cert:'{certificate}'",
        f"Thing Name: thing_0 and PEM file: {elf.misc / 'thing_0.pem'}",
        f"Thing Name: thing_0 Public Key File: {elf.misc / 'thing_0.pub'}",
        f"Thing Name: thing_0 Private Key File: {elf.misc / 'thing_0.prv'}",
        f"Wrote 1 thing to config file: {elf.misc / 'things.json'}",
        f"[create_things] ELF created 1 thing in region:'{REGION}'.",
        "now: python elf.py send",
    ]
    assert elf("create", 2).lines[:2] == [
        f"Read ELF ID from config: {elf_id}",
        "[create_things] ELF creating 1 thing",
    ]


def test_create_again_changes_nothing(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", 2)
    before = account.snapshot(), elf.things()
    main("create", 2)
    assert (account.snapshot(), elf.things()) == before


def test_create_with_more_adds_what_is_missing(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", 1)
    first, certificates = elf.things()["thing_0"], account.certificates()
    main("create", 3)
    assert account.things() == ["thing_0", "thing_1", "thing_2"]
    assert elf.things()["thing_0"] == first
    assert certificates.items() < account.certificates().items()
    assert len(account.certificates()) == 3


@pytest.mark.parametrize("certificate_survives", [True, False])
def test_create_makes_again_what_is_gone_in_aws(
    main: InProcess, elf: Elf, account: Account, certificate_survives: bool
) -> None:
    main("create", 2)
    main("send", *elf.broker, "--duration", "0.01")
    before, key = elf.things()["thing_0"]["certificateArn"], (elf.misc / "thing_0.prv").read_text()
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
    assert "2 acknowledged" in main("send", *elf.broker, "--duration", "0.01").err
    main("clean")
    assert account.is_empty()


def test_create_with_fewer_changes_nothing_and_names_clean(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", 2)
    before = account.snapshot(), elf.things()
    refused = main("create", 1, status=1)
    assert "there are already 2 things" in refused.err
    assert "elf.py clean" in refused.err
    assert (account.snapshot(), elf.things()) == before


def test_a_second_prefix_is_added_to_the_fleet(main: InProcess, account: Account) -> None:
    main("create", 1)
    main("create", 2, "--prefix", "lamp")
    assert account.things() == ["lamp_0", "lamp_1", "thing_0"]
    main("clean")
    assert account.is_empty()


def test_a_prefix_with_a_colon_works_from_create_to_clean(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", "--prefix", "hall:lamp")
    assert account.things() == ["hall:lamp_0"]
    main("send", *elf.broker, "--duration", "0.01")
    assert len(account.policies_of("hall:lamp_0")) == 1
    main("clean")
    assert account.is_empty()


def test_prefixes_with_a_colon_and_a_dash_have_policies_of_their_own(
    main: InProcess, elf: Elf, account: Account
) -> None:
    main("create", "--prefix", "a:b")
    main("create", "--prefix", "a-b")
    main("send", *elf.broker, "--duration", "0.01")
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
    assert list(account.certificates()) == [elf.things()["thing_0"]["certificateId"]]
    main("clean")
    assert account.is_empty()


def test_each_thing_carries_the_elf_id(main: InProcess, elf: Elf, account: Account) -> None:
    main("create")
    elf_id = elf.elf_json()["elf_id"]
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", elf_id)
    assert account.iot.describe_thing(thingName="thing_0")["attributes"] == {"elf_id": elf_id}


def test_the_elf_id_outlives_the_fleet(main: InProcess, elf: Elf) -> None:
    main("create")
    elf_id = elf.elf_json()["elf_id"]
    main("clean")
    assert elf.elf_json() == {"elf_id": elf_id}


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
    refused = main("send", *elf.broker, "--duration", "0.01", status=1)
    assert "policy policy-thing_0 already exists" in refused.err
    main("clean")
    assert account.snapshot() == ([], {}, ["policy-thing_0"])


def test_two_creates_at_once_make_one_fleet(elf: Elf, account: Account) -> None:
    windows = [elf.start("create", 2, "--wait", 30), elf.start("create", 2, "--wait", 30)]
    for window in windows:
        window.end()
    assert account.things() == ["thing_0", "thing_1"]
    assert set(account.certificates()) == {thing["certificateId"] for thing in elf.things().values()}
    assert len(account.certificates()) == 2


def test_clean_without_a_fleet_has_nothing_to_do(main: InProcess, account: Account) -> None:
    assert "no things" in main("clean").err
    assert account.is_empty()


def test_what_is_gone_already_counts_as_cleaned(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", 2)
    main("send", *elf.broker, "--duration", "0.01")
    arn = elf.things()["thing_0"]["certificateArn"]
    account.iot.detach_policy(policyName="policy-thing_0", target=arn)
    account.iot.delete_policy(policyName="policy-thing_0")
    account.iot.detach_thing_principal(thingName="thing_0", principal=arn)
    account.iot.update_certificate(certificateId=arn.rpartition("/")[2], newStatus="INACTIVE")
    account.iot.delete_certificate(certificateId=arn.rpartition("/")[2])
    account.iot.delete_thing(thingName="thing_0")
    account.iot.detach_thing_principal(thingName="thing_1", principal=elf.things()["thing_1"]["certificateArn"])
    main("clean")
    assert account.is_empty()
    assert elf.files() == ["elf.json"]


def test_errors_that_come_at_once_are_told_apart(
    main: InProcess, elf: Elf, account: Account, eager_threads: None
) -> None:
    main("create", 10)
    for name, thing in elf.things().items():
        account.iot.detach_thing_principal(thingName=name, principal=thing["certificateArn"])
        account.iot.update_certificate(certificateId=thing["certificateId"], newStatus="INACTIVE")
        account.iot.delete_certificate(certificateId=thing["certificateId"])
        account.iot.delete_thing(thingName=name)
    main("clean")
    assert elf.things() == {}


def test_clean_leaves_the_thing_that_fails_and_finishes_it_later(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", 3)
    protected = f"arn:aws:iot:{REGION}:{account.id}:thing/thing_1"
    main.use(
        account.user(
            {
                "Version": "2012-10-17",
                "Statement": [
                    {"Effect": "Allow", "Action": "iot:*", "Resource": "*"},
                    {"Effect": "Deny", "Action": "iot:DeleteThing", "Resource": protected},
                ],
            }
        )
    )
    failed = main("clean", status=1)
    assert "thing_1: AWS denies iot:DeleteThing to " in failed.err
    assert list(elf.things()) == ["thing_1"]
    assert account.things() == ["thing_1"]
    assert {"elf.json", "things.json"} <= set(elf.files())
    assert not {"thing_0.prv", "thing_2.prv"} & set(elf.files())
    main.use(account.credentials)
    main("clean")
    assert account.is_empty()
    assert elf.files() == ["elf.json"]


def test_clean_leaves_a_thing_whose_certificate_somebody_else_uses(
    main: InProcess, elf: Elf, account: Account, limits: Limits
) -> None:
    limits(CONSISTENCY_S=0.3)
    main("create", 2)
    arn = elf.things()["thing_0"]["certificateArn"]
    account.iot.create_thing(thingName="theirs")
    account.iot.attach_thing_principal(thingName="theirs", principal=arn)
    assert "thing_0: " in main("clean", status=1).err
    assert list(elf.things()) == ["thing_0"]
    assert account.things() == ["theirs", "thing_0"]
    account.iot.detach_thing_principal(thingName="theirs", principal=arn)
    main("clean")
    assert account.snapshot() == (["theirs"], {}, [])


class Stranger:
    """Somebody who deletes what ELF made behind its back, and uses the names for something else."""

    def __init__(self, main: InProcess, elf: Elf, account: Account) -> None:
        main("create")
        main("send", *elf.broker, "--duration", "0.01")
        self.iot, self.certificate = account.iot, elf.things()["thing_0"]["certificateArn"]
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
    main.use(account.user({"Version": "2012-10-17", "Statement": [{**deny, "Effect": "Allow", "Action": "*"}, deny]}))
    main("clean", status=1)
    main.use(account.credentials)
    assert "thing thing_0 was made by someone else: left alone" in main("clean").err
    assert account.snapshot() == (["thing_0"], {stranger.theirs["certificateId"]: "ACTIVE"}, [])


def test_a_half_cleaned_thing_is_not_sent_from(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", 2)
    main("send", *elf.broker, "--duration", "0.01")
    deny = {"Effect": "Deny", "Action": "iot:DeleteThing", "Resource": "*"}
    main.use(account.user({"Version": "2012-10-17", "Statement": [{**deny, "Effect": "Allow", "Action": "*"}, deny]}))
    main("clean", status=1)
    main.use(account.credentials)
    assert "elf.py clean" in main("send", *elf.broker, status=1).err


@pytest.mark.parametrize("denied", ["iot:CreateKeysAndCertificate", "iot:AttachThingPrincipal"])
def test_create_goes_on_after_a_failure(main: InProcess, elf: Elf, account: Account, denied: str) -> None:
    allow = {"Effect": "Allow", "Action": "iot:*", "Resource": "*"}
    main.use(
        account.user(
            {"Version": "2012-10-17", "Statement": [allow, {"Effect": "Deny", "Action": denied, "Resource": "*"}]}
        )
    )
    assert denied in main("create", 2, status=1).err
    assert account.things() == list(elf.things()) == ["thing_0", "thing_1"]
    recorded = [thing["certificateId"] for thing in elf.things().values() if "certificateId" in thing]
    assert sorted(account.certificates()) == sorted(recorded)
    assert "skipping incomplete things: " in main("send", *elf.broker, status=1).err
    main.use(account.credentials)
    main("create", 2)
    assert account.things() == ["thing_0", "thing_1"]
    for name in account.things():
        assert account.certificate_of(name) == elf.things()[name]["certificateId"]
    assert len(account.certificates()) == 2


@pytest.mark.parametrize("option", ["--only-local", "--force"])
def test_only_local_makes_no_aws_call_and_says_what_it_leaves(
    elf: Elf, account: Account, witness: Callable[[str], list[str]], option: str
) -> None:
    elf("create")
    before, connections = account.snapshot(), witness("connect")
    assert connections  # the witness sees what there is to see
    lines = elf("clean", option).lines
    assert witness("connect") == connections
    assert any("left in AWS IoT" in line and "thing_0" in line and REGION in line for line in lines)
    assert account.snapshot() == before
    assert elf.files() == ["elf.json"]


def test_clean_deletes_no_file_that_is_not_elfs(main: InProcess, elf: Elf) -> None:
    main("create")
    for name in ("notes.txt", "other.pem", "thing_00.prv", "thing_1.pem"):
        (elf.misc / name).write_text("mine")
    main("clean")
    assert elf.files() == ["elf.json", "notes.txt", "other.pem", "thing_00.prv", "thing_1.pem"]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_create_that_is_stopped_has_recorded_all_it_made(
    elf: Elf, account: Account, signum: signal.Signals, status: int
) -> None:
    window = elf.start("create", 900, "--verbose")
    window.await_line("Thing:'thing_0' associated")
    window.signal(signum)
    window.end(status)
    assert 0 < len(account.things()) < 900
    assert set(account.things()) <= set(elf.things())  # what is not there yet is known to be asked for
    recorded = {thing["certificateId"] for thing in elf.things().values() if "certificateId" in thing}
    assert set(account.certificates()) == recorded
    elf("clean")
    assert account.is_empty()


def test_the_policy_names_the_things_own_account_and_region(main: InProcess, elf: Elf, account: Account) -> None:
    region = "eu-central-1"
    main("--region", region, "create")
    main("send", *elf.broker, "--duration", "0.01")
    iot = account.client("iot", region)
    arn = f"arn:aws:iot:{region}:{account.id}"
    assert json.loads(iot.get_policy(policyName="policy-thing_0")["policyDocument"])["Statement"] == [
        {"Effect": "Allow", "Action": "iot:Connect", "Resource": f"{arn}:client/thing_0-*"},
        {"Effect": "Allow", "Action": ["iot:Publish", "iot:Receive"], "Resource": f"{arn}:topic/*"},
        {"Effect": "Allow", "Action": "iot:Subscribe", "Resource": f"{arn}:topicfilter/*"},
    ]
    main("clean")
    assert account.things(region) == []


@pytest.mark.parametrize(
    ("partition", "region"), [("aws", "us-west-2"), ("aws-cn", "cn-north-1"), ("aws-us-gov", "us-gov-west-1")]
)
def test_the_policy_is_in_the_partition_of_the_certificate(main: InProcess, partition: str, region: str) -> None:
    arn = f"arn:{partition}:iot:{region}:123456789012"
    document = main.module.policy_document("thing_0", f"{arn}:cert/{'a' * 64}")
    resources = [statement["Resource"] for statement in document["Statement"]]
    assert resources == [f"{arn}:client/thing_0-*", f"{arn}:topic/*", f"{arn}:topicfilter/*"]


def test_things_use_their_own_certificates(
    main: InProcess, elf: Elf, account: Account, connect: Callable[[Account], Client]
) -> None:
    main("create", 2)
    client = connect(account)
    client.subscribe("$aws/events/presence/connected/+")
    main("send", *elf.broker, "--duration", "0.01")
    connected: dict[str, str] = {}
    while len(connected) < 2:
        event = json.loads(client.hear().payload)
        if event["clientId"].startswith("thing_"):
            connected[event["clientId"].rpartition("-")[0]] = event["principalIdentifier"]
    assert connected == {name: account.certificate_of(name) for name in ("thing_0", "thing_1")}
    assert connected["thing_0"] != connected["thing_1"]


@pytest.mark.parametrize(
    ("client_id", "accepted"), [("thing_0-x", True), ("thing_1-x", False), ("thing_0", False), ("x-thing_0-x", False)]
)
def test_the_policy_refuses_the_client_id_of_another_thing(
    pair: Pair, service: AwsService, client_id: str, accepted: bool
) -> None:
    client = client_of(pair, service, "thing_0", client_id)
    assert (client.connect() == "Success") is accepted
    client.close()


def test_a_thing_that_cannot_connect_fails_alone(main: InProcess, elf: Elf, account: Account, limits: Limits) -> None:
    limits(PROPAGATION_S=0.0)
    main("create", 2)
    main("send", *elf.broker, "--duration", "0.01")
    account.iot.update_certificate(certificateId=account.certificate_of("thing_1"), newStatus="INACTIVE")
    result = main("send", *elf.broker, "--duration", "0.01", status=1)
    assert "thing_1 can't connect" in result.err
    assert "sent 1 message from 1 thing: 1 acknowledged, 0 lost" in result.err


def test_what_aws_says_at_the_last_moment_is_not_missed(elf: Elf, account: Account, service: AwsService) -> None:
    with contextlib.closing(HttpProxy(service.url)) as proxy:
        elf.environment["AWS_ENDPOINT_URL"] = proxy.url
        elf("create", 2)
        elf("send", *elf.broker, "--count", 1)
        account.iot.update_certificate(certificateId=account.certificate_of("thing_1"), newStatus="INACTIVE")
        os.utime(elf.misc / "things.json", (0, 0))  # what was made lately is tried again for a while
        proxy.inject("DescribeCertificate", LATE)
        window = elf.start("send", *elf.broker, "--count", 1, "--debug")
        window.await_line("PUBACK")
        proxy.await_hang(PATIENCE_S)
        time.sleep(0.5)  # all that was sent is acknowledged, and only the answer is still to come
        assert window.process.poll() is None
        proxy.release()
        result = window.end(1)
    assert "thing_1 can't connect: its certificate is INACTIVE" in result.err
