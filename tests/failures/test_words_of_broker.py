"""What is wrong between a thing and its broker is explained: the way there, certificates, policies, other clients."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import botocore
import pytest
from support.aws import Account, AwsService, delete_certificate_of
from support.failures import Explained
from support.http_proxy import HttpProxy, aws_error, denied
from support.mqtt import mqtt_client_of
from support.networks import CLOSED_PORT, Impostor, Relay, deaf_port, silent_port
from support.program import Limits
from support.shell import Elf, InProcess, Pair, Result

# A thread's traceback on the terminal is no explanation either.
pytestmark = [
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.usefixtures("impatient"),
]

ONCE = ("--duration", "0.01")

SHORT_S = 0.5  # a time-out of ELF's, where nothing could answer in time


@pytest.mark.parametrize(
    ("endpoint", "root_cert", "failure"),
    [
        pytest.param(f"localhost:{CLOSED_PORT}", None, "NothingListens", id="a closed port"),
        pytest.param("broker.invalid", None, "HostUnknown", id="a name that does not resolve"),
        # No connection leads to everybody on a network.
        pytest.param("255.255.255.255", None, "HostUnreachable", id="an address without a way"),
        pytest.param(
            "localhost:{mqtt_port}",
            Path(botocore.__file__).with_name("cacert.pem"),
            "NotTrusted",
            id="another's root certificate",
        ),
        # That is 127.0.0.1, but not a name in the broker's certificate.
        pytest.param("127.1:{mqtt_port}", None, "OtherHost", id="another host's name"),
        pytest.param("localhost:{http_port}", None, "TlsFails", id="no TLS"),
    ],
)
def test_an_endpoint_that_is_no_broker_is_explained(
    main_of_pair: InProcess,
    misc: Path,
    service: AwsService,
    explained: Explained,
    endpoint: str,
    root_cert: Path | None,
    failure: str,
) -> None:
    keep_one_thing(misc)
    endpoint = endpoint.format(mqtt_port=service.mqtt_port, http_port=urlsplit(service.url).port)
    options = ("--mqtt-endpoint", endpoint, "--root-cert", root_cert or service.root_cert)
    result = main_of_pair("send", *options, *ONCE, status=1)
    explained(result, failure, "thing_0", endpoint)
    assert len(result.failures) == 1


def keep_one_thing(misc: Path) -> None:
    """Have a copied fleet consist of thing_0 alone: what keeps all from connecting is told for each."""
    (misc / "things.json").write_text(json.dumps(json.loads((misc / "things.json").read_text())[:1]))


@pytest.mark.parametrize("port", [silent_port, deaf_port])
def test_a_port_that_swallows_everything_is_explained(
    main_of_pair: InProcess,
    misc: Path,
    service: AwsService,
    explained: Explained,
    limits: Limits,
    port: Callable[[], Any],
) -> None:
    keep_one_thing(misc)
    limits(CONNECT_TIMEOUT_S=SHORT_S)
    with port() as number:
        options = ("--mqtt-endpoint", f"localhost:{number}", "--root-cert", service.root_cert)
        result = main_of_pair("subscribe", *options, *ONCE, status=1)
    explained(result, "PortUnanswered", f"localhost:{number}", "--mqtt-endpoint :443")


def test_a_broker_that_says_nothing_is_explained(
    main_of_pair: InProcess, misc: Path, tmp_path: Path, explained: Explained, limits: Limits
) -> None:
    limits(CONNECT_TIMEOUT_S=SHORT_S)
    with contextlib.closing(Impostor(tmp_path, holds=True)) as impostor:
        options = ("--mqtt-endpoint", f"localhost:{impostor.port}", "--root-cert", impostor.root_cert)
        explained(main_of_pair("send", *options, *ONCE, status=1), "PortUnanswered", f"localhost:{impostor.port}")


def test_an_endpoint_of_another_account_is_named_with_the_right_one(
    main_of_pair: InProcess, misc: Path, pair: Pair, impostor: Impostor, explained: Explained
) -> None:
    keep_one_thing(misc)
    right = pair.account.iot.describe_endpoint(endpointType="iot:Data-ATS")["endpointAddress"].partition(":")[0]
    options = ("--mqtt-endpoint", f"localhost:{impostor.port}", "--root-cert", impostor.root_cert)
    result = main_of_pair("send", *options, *ONCE, status=1)
    explained(result, "EndpointElsewhere", f"localhost:{impostor.port}", right, pair.account.id)


class Fleet:
    """A fleet of two things that have sent, of which thing_0 is going to have trouble, and what sends for it."""

    def __init__(self, main: InProcess, elf: Elf, account: Account) -> None:
        self.main, self.elf, self.account = main, elf, account
        main("create", 2)
        self.send()

    def send(self, *options: object, status: int = 0) -> Result:
        return self.main("send", *self.elf.to_broker, *ONCE, *options, status=status)

    def subscribe(self, *options: object, status: int = 0) -> Result:
        return self.main("subscribe", *self.elf.to_broker, *ONCE, *options, status=status)

    @property
    def certificate(self) -> str:
        return self.account.certificate_of("thing_0")

    def forbid(self, action: str) -> None:
        """Change thing_0's policy, as somebody at the AWS console can: it is without that action."""
        document = json.loads(self.account.iot.get_policy(policyName="policy-thing_0")["policyDocument"])
        for statement in document["Statement"]:
            actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
            statement["Action"] = [each for each in actions if each != action] or ["iot:GetThingShadow"]
        text = json.dumps(document)
        self.account.iot.create_policy_version(policyName="policy-thing_0", policyDocument=text, setAsDefault=True)


@pytest.fixture
def fleet(main: InProcess, elf: Elf, account: Account) -> Fleet:
    return Fleet(main, elf, account)


@pytest.fixture
def distant_fleet(proxy: HttpProxy, fleet: Fleet) -> Fleet:
    """One whose control plane is behind `proxy`."""
    return fleet


def test_a_certificate_that_was_deleted_is_named(fleet: Fleet, explained: Explained) -> None:
    certificate_id = delete_certificate_of(fleet.account, "thing_0")
    result = fleet.send(status=1)
    explained(result, "CertificateUnknown", "thing_0", certificate_id, fleet.account.id, "region us-west-2")
    assert "1 acknowledged, 0 lost" in result.err


REACTIVATE = "iot update-certificate --new-status ACTIVE --certificate-id "


def test_a_certificate_that_is_not_active_is_named(fleet: Fleet, explained: Explained) -> None:
    fleet.account.iot.update_certificate(certificateId=fleet.certificate, newStatus="INACTIVE")
    result = fleet.send(status=1)
    explained(result, "CertificateNotActive", "thing_0", "INACTIVE", REACTIVATE + fleet.certificate)
    assert "1 acknowledged, 0 lost" in result.err


def test_a_certificate_that_is_revoked_is_named_and_goes(
    main: InProcess,
    elf: Elf,
    account: Account,
    proxy: HttpProxy,
    explained: Explained,
    limits: Limits,
) -> None:
    limits(PROPAGATION_S=0.0)
    main("create")
    main("send", *elf.to_broker, *ONCE)
    account.iot.update_certificate(certificateId=account.certificate_of("thing_0"), newStatus="REVOKED")
    explained(main("send", *elf.to_broker, *ONCE, status=1), "CertificateRevoked", "thing_0")
    refusal = aws_error(406, "CertificateStateException", "The certificate is revoked.")  # AWS lets none come back
    proxy.inject("UpdateCertificate", refusal)
    main("clean")
    assert proxy.faults["UpdateCertificate"] == 1
    assert account.is_empty()


def test_a_certificate_without_a_policy_is_named(fleet: Fleet, explained: Explained) -> None:
    arn = fleet.elf.recorded()["thing_0"]["certificateArn"]
    fleet.account.iot.detach_policy(policyName="policy-thing_0", target=arn)
    result = fleet.send(status=1)
    command = f"iot attach-policy --policy-name policy-thing_0 --target {arn}"
    explained(result, "NoPolicy", "thing_0", command)
    assert "1 acknowledged, 0 lost" in result.err


@pytest.mark.parametrize(
    ("action", "command", "facts"),
    [
        pytest.param("iot:Connect", "send", ("connect as thing_0-",), id="the client"),
        pytest.param("iot:Publish", "send", ("publish to elf/thing_0",), id="the topic"),
        pytest.param("iot:Subscribe", "subscribe", ("subscribe to elf/#",), id="the topic filter"),
    ],
)
def test_a_policy_that_lacks_something_is_named_with_it(
    fleet: Fleet, explained: Explained, action: str, command: str, facts: tuple[str, ...]
) -> None:
    fleet.forbid(action)
    result = fleet.send(status=1) if command == "send" else fleet.subscribe(status=1)
    explained(result, "PolicyForbids", "thing_0", action, "policy-thing_0", *facts)


def test_a_topic_that_the_policy_forbids_costs_messages(fleet: Fleet, explained: Explained) -> None:
    fleet.forbid("iot:Publish")
    result = fleet.send(status=1)
    assert "1 acknowledged, 1 lost" in result.err
    explained(result, "PolicyForbids", "thing_0", "iot:Publish")


@pytest.mark.parametrize(
    ("action", "failure", "fact"),
    [
        pytest.param("iot:Connect", "ConnectRefused", "without an answer", id="ConnectRefused"),
        pytest.param("iot:Publish", "PublishRefused", "elf/thing_0", id="PublishRefused"),
        pytest.param("iot:Subscribe", "SubscribeRefused", "elf/#", id="SubscribeRefused"),
    ],
)
def test_a_refusal_that_aws_does_not_explain_is_told_as_it_is(
    proxy: HttpProxy, distant_fleet: Fleet, explained: Explained, action: str, failure: str, fact: str
) -> None:
    distant_fleet.forbid(action)
    proxy.inject("DescribeCertificate", denied("DescribeCertificate"), onwards=True)
    command = distant_fleet.subscribe if action == "iot:Subscribe" else distant_fleet.send
    explained(command(status=1), failure, "thing_0", fact)


def test_a_client_id_that_is_taken_over_again_and_again_is_named(pair: Pair, service: AwsService) -> None:
    window = pair.start("subscribe", "--debug", *pair.to_broker, "--duration", "60")
    window.await_line("ELF listening on 2 things")
    for number in range(1, 4):
        client_id = window.last_line("thing_0: CONNECT to ").split()[-1]
        thief = mqtt_client_of(pair, service, "thing_0", client_id)
        assert thief.connect() == "Success"
        window.await_count("thing_0 reconnected to ", number)
        thief.close()
    window.signal(signal.SIGINT)
    _, remedy = (line for line in window.end(130).lines if line.startswith("what to do: "))
    assert client_id in remedy and "thing_0" in remedy and "stay connected" in remedy


def test_a_subscription_that_is_offline_in_the_end_is_explained(
    pair: Pair, relay: Relay, service: AwsService, explained: Explained
) -> None:
    window = pair.start("subscribe", *relay.to_broker(service), "--duration", "4", "--output", "json")
    window.await_line("ELF listening on 2 things")
    relay.down()
    result = window.end(1)
    explained(result, "StillOffline", "thing_0", "thing_1")
