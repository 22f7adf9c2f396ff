"""The client ID of a thing: its own name, what AWS allows, and what happens where two clients have one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from support.aws import Account, AwsService
from support.failures import Explained
from support.http_proxy import HttpProxy, aws_error
from support.mqtt import Client
from support.program import Limits
from support.shell import Elf, InProcess, Pair

NAMED = "--client-id", "{thing_name}"
ONCE = "--count", 1


@pytest.mark.parametrize(
    ("command", "client_id", "name"),
    [
        ("send", "thing_0", "ClientIdShared"),
        ("subscribe", "sensor", "ClientIdShared"),
        ("send", "sensor-{thing_name}", "ClientIdForbidden"),
        ("subscribe", "{thing_name}x", "ClientIdForbidden"),
        ("send", "", "ClientIdShared"),
        ("send", "{thing_name}-" + "x" * 121, "ClientIdTooLong"),
        ("send", "{thing_name}-" + "\u00fc" * 61, "ClientIdTooLong"),  # 122 bytes
    ],
)
def test_a_client_id_that_can_not_work_is_wrong_usage(
    main_of_pair: InProcess, pair: Pair, explained: Explained, command: str, client_id: str, name: str
) -> None:
    result = main_of_pair(command, *pair.to_broker, "--client-id", client_id, status=2)
    explained(result, name, "--client-id" if name != "ClientIdTooLong" else "128 bytes")


def test_a_thing_connects_under_its_own_name_and_one_alone_may_be_named(
    main_of_pair: InProcess, pair: Pair, ear: Client
) -> None:
    ear.subscribe("$aws/events/presence/connected/+")
    assert "2 acknowledged" in main_of_pair("send", *pair.to_broker, *NAMED, *ONCE).err
    main_of_pair("send", *pair.to_broker, "--client-id", "thing_1-lamp", *ONCE, "--things", 2, status=2)
    main_of_pair("subscribe", *pair.to_broker, "--client-id", "thing_0-l\u00e4mp", "--duration", "0.01", "--things", 1)
    heard = [json.loads(each.payload)["clientId"] for each in ear.hear_all() if each.topic.startswith("$aws")]
    assert sorted(heard) == ["thing_0", "thing_0-l\u00e4mp", "thing_1"]


def test_a_name_alone_gives_a_new_version_to_the_policy_that_an_earlier_elf_made(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy, limits: Limits
) -> None:
    main("create", 2)
    main("send", *elf.to_broker, *ONCE)
    current = account.iot.get_policy(policyName="policy-thing_0")["policyDocument"]
    account.use_earlier_policies(elf.misc)
    proxy.reset()
    main("send", *elf.to_broker, *ONCE)
    assert not proxy.calls["GetPolicy"]  # which only an option that needs it asks
    said = main("send", *elf.to_broker, *NAMED, *ONCE).err
    assert "2 acknowledged, 0 lost" in said
    assert "policies have changed: AWS may refuse things for up to 8 minutes more" in said
    for thing in ("thing_0", "thing_1"):
        renewed = account.iot.get_policy(policyName=f"policy-{thing}")["policyDocument"]
        assert renewed == current.replace("thing_0", thing)
    again = main("subscribe", *elf.to_broker, *NAMED, "--duration", "0.01").err
    assert "policies have changed" in again
    assert proxy.calls["GetPolicy"] == proxy.calls["CreatePolicyVersion"] == 2
    limits(POLICY_CHANGE_S=10.0)  # which are over, or less than what is borne anyway
    assert "policies have changed" not in main("send", *elf.to_broker, *NAMED, *ONCE).err
    main("clean")
    assert account.is_empty()


def test_what_somebody_else_wrote_into_a_policy_stays_and_may_be_enough(
    main: InProcess, elf: Elf, account: Account, explained: Explained, limits: Limits
) -> None:
    main("create", 2)
    main("send", *elf.to_broker, *ONCE)
    account.use_earlier_policies(elf.misc)
    account.edit_policy("policy-thing_0", lambda statements: statements.pop())
    enough = [
        {"Effect": "Allow", "Action": "iot:Connect", "Resource": "arn:aws:iot:*:client/thing_1"},
        {"Effect": "Allow", "Action": "iot:Publish", "Resource": "arn:aws:iot:*:topic/elf/*"},
    ]
    account.edit_policy("policy-thing_1", lambda its: its.__setitem__(slice(None), enough))
    limits(POLICY_CHANGE_S=0.0, PROPAGATION_S=0.0)
    before = [account.iot.get_policy(policyName=f"policy-thing_{number}") for number in range(2)]
    result = main("send", *elf.to_broker, *NAMED, *ONCE, status=1)
    explained(result, "PolicyForbids", "thing_0 may not connect as thing_0", "(policy-thing_0)")
    assert "1 message from 1 thing: 1 acknowledged" in result.err
    after = [account.iot.get_policy(policyName=f"policy-thing_{number}") for number in range(2)]
    assert [each["policyDocument"] for each in after] == [each["policyDocument"] for each in before]
    account.edit_policy("policy-thing_0", lambda its: its.append({"Effect": "Allow", "Action": "*", "Resource": "*"}))
    assert "2 acknowledged" in main("send", *elf.to_broker, *NAMED, *ONCE).err


def test_a_policy_that_has_five_versions_already_gets_no_other(
    main: InProcess, elf: Elf, account: Account, explained: Explained, proxy: HttpProxy
) -> None:
    main("create")
    main("send", *elf.to_broker, *ONCE)
    account.use_earlier_policies(elf.misc)
    full = aws_error(409, "VersionsLimitExceededException", "The policy policy-thing_0 has too many versions.")
    proxy.inject("CreatePolicyVersion", full)
    explained(main("send", *elf.to_broker, *NAMED, *ONCE, status=1), "PolicyFull", "policy-thing_0", "five versions")


@pytest.fixture
def twin(pair: Pair, service: AwsService) -> Iterator[Callable[[], mqtt.Client]]:
    """Another client that connects as thing_0 as often as it has to."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2, "thing_0")
    client.reconnect_delay_set(1, 1)
    client.tls_set(str(service.root_cert), str(pair.misc / "thing_0.pem"), str(pair.misc / "thing_0.prv"))

    def connect() -> mqtt.Client:
        client.connect_async("localhost", service.mqtt_port)
        client.loop_start()
        return client

    yield connect
    client.disconnect()
    client.loop_stop()


def test_two_clients_of_one_name_are_told_once_from_a_lost_network(
    main_of_pair: InProcess, pair: Pair, twin: Callable[[], mqtt.Client], limits: Limits
) -> None:
    limits(SAME_ID_PAUSE_S=0.5, MAX_RECONNECT_PAUSE_S=0.5, BRIEF_S=(0.0, 20.0))
    twin()
    window = "--duration", 5, "--things", 1
    said = main_of_pair("subscribe", *pair.to_broker, *NAMED, *window, status=None).err
    assert said.count("another client seems to connect as thing_0, too") == 1
    assert said.count("lost its connection") >= 3
