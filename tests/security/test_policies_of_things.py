"""What the policy of a thing allows: itself, and no other thing."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from support.aws import Account, AwsService
from support.mqtt import Client, mqtt_client_of
from support.shell import Elf, InProcess, Pair


def test_the_policy_names_the_things_own_account_and_region(main: InProcess, elf: Elf, account: Account) -> None:
    region = "eu-central-1"
    main("--region", region, "create")
    main("send", *elf.to_broker, "--duration", "0.01")
    iot = account.client("iot", region)
    arn = f"arn:aws:iot:{region}:{account.id}"
    assert json.loads(iot.get_policy(policyName="policy-thing_0")["policyDocument"])["Statement"] == [
        {
            "Effect": "Allow",
            "Action": "iot:Connect",
            "Resource": [f"{arn}:client/thing_0", f"{arn}:client/thing_0-*"],
            # AWS refuses a will and a persistent session without it; MiniStack does not look at it.
            "Condition": {"ForAllValues:StringEquals": {"iot:ConnectAttributes": ["PersistentConnect", "LastWill"]}},
        },
        {
            "Effect": "Allow",
            "Action": ["iot:Publish", "iot:RetainPublish", "iot:Receive"],
            "Resource": f"{arn}:topic/*",
        },
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
    clients = [f"{arn}:client/thing_0", f"{arn}:client/thing_0-*"]
    assert resources == [clients, f"{arn}:topic/*", f"{arn}:topicfilter/*"]


def test_things_use_their_own_certificates(
    main: InProcess, elf: Elf, account: Account, connect: Callable[[Account], Client]
) -> None:
    main("create", 2)
    client = connect(account)
    client.subscribe("$aws/events/presence/connected/+")
    main("send", *elf.to_broker, "--duration", "0.01")
    connected: dict[str, str] = {}
    while len(connected) < 2:
        event = json.loads(client.hear().payload)
        if event["clientId"].startswith("thing_"):
            connected[event["clientId"].rpartition("-")[0]] = event["principalIdentifier"]
    assert connected == {name: account.certificate_of(name) for name in ("thing_0", "thing_1")}
    assert connected["thing_0"] != connected["thing_1"]


@pytest.mark.parametrize(
    ("client_id", "accepted"),
    [
        *[(each, True) for each in ("thing_0", "thing_0-x")],
        *[(each, False) for each in ("thing_1", "thing_1-x", "thing_01", "x-thing_0-x")],
    ],
)
def test_the_policy_refuses_the_client_id_of_another_thing(
    pair: Pair, service: AwsService, client_id: str, accepted: bool
) -> None:
    client = mqtt_client_of(pair, service, "thing_0", client_id)
    assert (client.connect() == "Success") is accepted
    if accepted:
        client.publish("elf/thing_0", "hi")
    client.close()


def test_a_policy_that_an_earlier_elf_made_is_its_own_and_stays_as_it_is(
    main: InProcess, elf: Elf, account: Account
) -> None:
    main("create", 2)
    text = ""
    for name in ("thing_0", "thing_1"):  # the second is attached already
        arn = elf.recorded()[name]["certificateArn"]
        here = arn.rpartition(":")[0]
        text = json.dumps(
            {
                "Version": "2012-10-17",
                "Statement": [
                    {"Effect": "Allow", "Action": "iot:Connect", "Resource": f"{here}:client/{name}-*"},
                    {"Effect": "Allow", "Action": ["iot:Publish", "iot:Receive"], "Resource": f"{here}:topic/*"},
                    {"Effect": "Allow", "Action": "iot:Subscribe", "Resource": f"{here}:topicfilter/*"},
                ],
            }
        )
        account.iot.create_policy(policyName=f"policy-{name}", policyDocument=text)
    account.iot.attach_policy(policyName="policy-thing_1", target=arn)
    suffixed = "--client-id", "{thing_name}-x"  # which the earlier one allows
    assert "2 acknowledged, 0 lost" in main("send", *elf.to_broker, "--count", 1, *suffixed).err
    assert account.iot.get_policy(policyName="policy-thing_1")["policyDocument"] == text
    account.iot.detach_policy(policyName="policy-thing_0", target=elf.recorded()["thing_0"]["certificateArn"])
    main("clean")
    assert account.is_empty()
