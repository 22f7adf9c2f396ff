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
    main("send", *elf.to_broker, "--duration", "0.01")
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
    client = mqtt_client_of(pair, service, "thing_0", client_id)
    assert (client.connect() == "Success") is accepted
    client.close()
