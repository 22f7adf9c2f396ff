"""AWS refuses a thing, or a topic of it: that is named with its reason, and all others go on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.aws import Account, AwsService
from support.failures import Explained
from support.http_proxy import LATE, HttpProxy
from support.machine import PATIENCE_S
from support.networks import Relay
from support.program import Limits
from support.shell import Elf, InProcess

POSTED = re.compile(r"posting message:'(.*)' on topic: (\S+)")
ONCE = ("--duration", "0.01")


def test_a_thing_that_cannot_connect_fails_alone(
    main: InProcess, elf: Elf, account: Account, limits: Limits, explained: Explained
) -> None:
    limits(PROPAGATION_S=0.0)
    main("create", 2)
    main("send", *elf.to_broker, "--duration", "0.01")
    account.iot.update_certificate(certificateId=account.certificate_of("thing_1"), newStatus="INACTIVE")
    result = main("send", *elf.to_broker, "--duration", "0.01", status=1)
    explained(result, "CertificateNotActive", "thing_1")
    assert "sent 1 message from 1 thing: 1 acknowledged, 0 lost" in result.err


def test_a_reason_for_a_refusal_that_aws_gives_at_the_last_moment_is_reported(
    elf: Elf, account: Account, service: AwsService
) -> None:
    with contextlib.closing(HttpProxy(service.url)) as proxy:
        elf.environment["AWS_ENDPOINT_URL"] = proxy.url
        elf("create", 2)
        elf("send", *elf.to_broker, "--count", 1)
        account.iot.update_certificate(certificateId=account.certificate_of("thing_1"), newStatus="INACTIVE")
        os.utime(elf.misc / "things.json", (0, 0))  # what was made lately is tried again for a while
        proxy.inject("DescribeCertificate", LATE)
        window = elf.start("send", *elf.to_broker, "--count", 1, "--debug")
        window.await_line("PUBACK")
        proxy.await_hang(PATIENCE_S)
        time.sleep(0.5)  # all that was sent is acknowledged, and only the answer is still to come
        assert window.process.poll() is None
        proxy.release()
        result = window.end(1)
    assert "thing_1 can't connect: its certificate is INACTIVE" in result.err


def deny(action: str, resource: str = "*") -> Callable[[list[dict[str, Any]]], object]:
    return lambda statements: statements.append({"Effect": "Deny", "Action": action, "Resource": resource})


@pytest.mark.parametrize("qos", ["0", "1"])
def test_a_publish_that_the_policy_forbids_is_named_by_its_topic_and_others_go_on(
    main: InProcess, elf: Elf, account: Account, limits: Limits, qos: str, explained: Explained
) -> None:
    limits(PROPAGATION_S=0.0)
    main("create", 2)
    main("send", *elf.to_broker, "--duration", "0.01")
    account.edit_policy("policy-thing_0", deny("iot:Publish", "*:topic/elf/thing_0"))
    result = main("send", *elf.to_broker, "--duration", "3", "--interval", "0.5", "--qos", qos, status=1)
    explained(result, "PolicyForbids", "thing_0", "publish to elf/thing_0", "iot:Publish")
    posted = [topic for _, topic in POSTED.findall(result.err)]
    assert posted.count("elf/thing_1") == 6
    assert posted.count("elf/thing_0") < 6
    main("send", *elf.to_broker, "--duration", "0.01", "--topic", "elsewhere")  # which it may


def test_a_subscription_that_the_policy_forbids_is_named_by_its_filter_and_others_go_on(
    main: InProcess, elf: Elf, account: Account, limits: Limits, explained: Explained
) -> None:
    limits(PROPAGATION_S=0.0)
    main("create", 2)
    main("send", *elf.to_broker, "--duration", "0.01")
    account.edit_policy("policy-thing_0", deny("iot:Subscribe"))
    result = main("subscribe", *elf.to_broker, "--duration", "0.5", status=1)
    explained(result, "PolicyForbids", "thing_0", "subscribe to elf/#", "iot:Subscribe")
    assert "ELF listening on 1 thing" in result.err


@pytest.mark.parametrize(("command", "action"), [("send", "Connect"), ("send", "Publish"), ("subscribe", "Subscribe")])
def test_what_was_made_seconds_ago_and_is_not_in_force_yet_is_tried_again(
    elf: Elf, account: Account, command: str, action: str
) -> None:
    elf("create")
    elf("subscribe", *elf.to_broker, "--duration", "0.01")
    account.edit_policy("policy-thing_0", deny(f"iot:{action}"))
    window = elf.start(command, *elf.to_broker, "--debug", "--duration", "2")
    window.await_line("lost its connection|trying again")
    account.edit_policy("policy-thing_0", lambda statements: statements.pop())
    result = window.end()
    if command == "send":
        assert "ELF sent 2 messages from 1 thing: 2 acknowledged, 0 lost" in result.err


def test_a_thing_whose_certificate_goes_in_mid_run_is_given_up_and_explained(
    elf: Elf, account: Account, service: AwsService, relay: Relay, main: InProcess, limits: Limits, explained: Explained
) -> None:
    limits(PROPAGATION_S=1.0)
    main("create", 2)
    main("send", *elf.to_broker, "--duration", "0.01")
    certificate = account.certificate_of("thing_1")

    def break_it() -> None:
        account.iot.update_certificate(certificateId=certificate, newStatus="INACTIVE")
        relay.cut()

    threading.Timer(1.5, break_it).start()
    result = main("send", *relay.to_broker(service), "--duration", "8", "--interval", "0.5", status=1)
    explained(result, "CertificateNotActive", "thing_1", "INACTIVE")
    posted = [topic for _, topic in POSTED.findall(result.err)]
    assert posted.count("elf/thing_0") == 16


def test_a_connection_lost_in_the_middle_costs_messages_and_the_status(
    main: InProcess, elf: Elf, account: Account, limits: Limits
) -> None:
    main("create")
    main("send", *elf.to_broker, *ONCE)
    document = json.loads(account.iot.get_policy(policyName="policy-thing_0")["policyDocument"])
    document["Statement"].append({"Effect": "Deny", "Action": "iot:Publish", "Resource": "*"})
    account.iot.create_policy_version(
        policyName="policy-thing_0", policyDocument=json.dumps(document), setAsDefault=True
    )
    limits(ACK_GRACE_S=0.5, CONNECT_TIMEOUT_S=2.0)
    result = main("send", *elf.to_broker, "--duration", "0.02", "--interval", "0.01", status=1)
    assert "sent 2 messages from 1 thing: 0 acknowledged, 2 lost" in result.err
