"""Why AWS refuses a thing, and which certificates nobody claims: policies are read, and clocks compared."""

from __future__ import annotations

import errno
import json
import socket
import ssl
from collections.abc import Iterator
from datetime import datetime, timezone
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from iot_elf import diagnosis
from iot_elf.errors import ElfError, Refusal
from iot_elf.network import Endpoint, Proxy
from iot_elf.places import Place
from iot_elf.state import Thing, ThingFiles, UnansweredRequest

from .stand_ins import Clock, Pages, refusal

HERE = "arn:aws:iot:us-west-2:123456789012"
ELF_ID = "urn:uuid:01234567-89ab-cdef-0123-456789abcdef"
NOW = 1_700_000_000.0


# Policies


def statement(effect: str, action: Any, resource: Any, **more: Any) -> dict[str, Any]:
    return {"Effect": effect, "Action": action, "Resource": resource, **more}


ALLOW, DENY = statement("Allow", "iot:Publish", "*"), statement("Deny", "iot:Publish", "*")
CONDITION = {"Condition": {"Bool": {"iot:Connection.Thing.IsAttached": ["false"]}}}


@pytest.mark.parametrize(
    ("statements", "is_allowed"),
    [
        ([], False),
        ([ALLOW], True),
        ([DENY], False),
        ([ALLOW, DENY], False),
        ([DENY, ALLOW], False),
        ([ALLOW, {**DENY, **CONDITION}], True),  # whether it is met is not known here
        ([{**DENY, **CONDITION}, ALLOW], True),
        ([{**DENY, **CONDITION}], False),
        ([{**ALLOW, **CONDITION}], True),
        ([statement("Deny", "iot:Connect", "*"), ALLOW], True),
        ([statement("Deny", "iot:Publish", f"{HERE}:topic/b"), ALLOW], True),
        ([statement("Allow", "iot:Connect", "*")], False),
        ([ALLOW, statement("Allow", "iot:Connect", "*")], True),
        (ALLOW, True),  # one statement without a list
        ([statement("Allow", ["iot:Connect", "iot:Publish"], ["x", f"{HERE}:topic/a"])], True),
        ([statement("Allow", "iot:*", "*")], True),
        ([statement("Allow", "iot:Pub?ish", f"{HERE}:topic/?")], True),
        ([statement("Allow", "iot:Publish", f"{HERE}:topic/??")], False),
        ([statement("Allow", "iot:Publish", f"{HERE}:topic")], False),
        ([statement("Allow", "iot:Publish", f"{HERE}:topic/a/b")], False),
        ([statement("Allow", "iot:Publish", f"{HERE}:topic/${{iot:Connection.Thing.ThingName}}")], True),
        ([statement("Allow", "iot:Publish", f"{HERE[:20]}*:*ic/*a")], True),
        ([statement("Allow", "iot:Publish", f"{HERE}:topic/a*a")], False),
        ([statement("Allow", "iot:Publish", f"{HERE}:**/?*")], True),
        ([statement("Allow", "iot:Publish", f"{HERE}:topic/a**")], True),
        ([statement("Allow", "iot:Publish", "*?" * 30 + "Z")], False),  # in no time, as are the next two
        ([statement("Allow", "iot:Publish", "*" + "*a" * 100_000)], False),
        ([statement("Allow", "iot:Publish", "${" * 100_000)], False),
        ([statement("Allow", "iot:Publish", "arn.aws.iot.us-west-2.123456789012.topic.a")], False),
        ([{"Effect": "Allow"}], True),  # anything
        ([{"Action": "iot:Publish"}], False),
    ],
)
def test_a_policy_allows_what_it_names_unless_a_deny_without_a_condition_does_too(
    statements: Any, is_allowed: bool
) -> None:
    assert diagnosis.allows([{"Statement": statements}], "iot:Publish", f"{HERE}:topic/a") is is_allowed


def test_all_policies_of_a_certificate_count() -> None:
    allow, deny, nothing = {"Statement": [ALLOW]}, {"Statement": [DENY]}, dict[str, Any]()
    for documents, is_allowed in ([nothing, allow], True), ([allow, deny], False), ([nothing], False), ([], False):
        assert diagnosis.allows(documents, "iot:Publish", "any") is is_allowed


def test_a_line_end_in_a_topic_is_a_character() -> None:
    assert diagnosis.allows([{"Statement": statement("Allow", "*", "a*c")}], "iot:Publish", "a\nc")


# Certificates that nobody claims


class Certificates(Pages):
    """AWS's list of certificates, the newest first, as many a page as asked, and what they are attached to."""

    def __init__(self, *pages: list[float], ahead_s: float | None = None, attached: tuple[float, ...] = ()) -> None:
        self._pages, self._ahead_s, self._attached = pages, ahead_s, attached
        self.pages_read = 0

    def get_paginator(self, operation: str) -> Any:
        return self if operation == "list_certificates" else super().get_paginator(operation)

    def paginate(self, *, ascendingOrder: bool, **_: int) -> Iterator[Any]:  # noqa: N803 - AWS's name
        assert not ascendingOrder
        for page in self._pages:
            self.pages_read += 1
            date = {} if self._ahead_s is None else {"date": formatdate(NOW + self._ahead_s, usegmt=True)}
            certificates = [
                {
                    "certificateId": f"made at {at:g}",
                    "certificateArn": f"{at:g}",
                    "creationDate": datetime.fromtimestamp(NOW + at, timezone.utc),
                }
                for at in page
            ]
            yield {"ResponseMetadata": {"HTTPHeaders": date}, "certificates": certificates}

    def list_principal_things(self, principal: str) -> Any:
        return {"things": ["a"] if float(principal) in self._attached else []}

    def list_attached_policies(self, **_: str) -> Any:
        return {"policies": []}


def unclaimed(
    monkeypatch: pytest.MonkeyPatch,
    certificates: Certificates,
    *requests: tuple[float, float],
    mine: float = 9999,
    place: Place | None = None,
) -> list[float]:
    """When, from NOW on, the certificates were made that may be those of these requests."""
    Clock(monkeypatch, diagnosis, now=NOW)
    calls = [UnansweredRequest(NOW + since, NOW + until, place) for since, until in requests]
    things = {"thing_0": Thing("thing_0", certificate_id=f"made at {mine:g}")}
    fleet: Any = SimpleNamespace(things=things)
    found = diagnosis.unclaimed_certificates(certificates, fleet, calls)
    return [float(certificate["certificateArn"]) for certificate in found]


@pytest.mark.parametrize(
    ("ahead_s", "made_at", "found"),
    [
        # the request was from 100 to 80 seconds ago; AWS's times have whole seconds
        (0, [-78, -79, -80, -90, -100, -101, -102], [-79, -80, -90, -100, -101]),
        (None, [-78, -79, -101, -102], [-79, -101]),  # an answer without its time
        (2, [-78, -79, -101, -102], [-79, -101]),  # on the way, not in the clocks
        (-2, [-78, -79, -101, -102], [-79, -101]),
        (3, [-75, -76, -98, -99], [-76, -98]),
        (-3, [-81, -82, -104, -105], [-82, -104]),
        (3600, [3522, 3521, 3510, 3499, 3498, -90], [3521, 3510, 3499]),
        (-3600, [-90, -3678, -3679, -3701, -3702], [-3679, -3701]),
    ],
)
def test_certificates_of_a_request_without_an_answer_are_found_whatever_aws_says_the_time_is(
    monkeypatch: pytest.MonkeyPatch, ahead_s: float | None, made_at: list[float], found: list[float]
) -> None:
    assert unclaimed(monkeypatch, Certificates(made_at, ahead_s=ahead_s), (-100, -80)) == found


@pytest.mark.parametrize("ahead_s", [0, None, 3600, -3600])
def test_a_request_that_was_recorded_with_its_place_has_aws_s_time(
    monkeypatch: pytest.MonkeyPatch, ahead_s: float | None
) -> None:
    certificates = Certificates([3510, -78, -79, -101, -102, -3690], ahead_s=ahead_s)
    assert unclaimed(monkeypatch, certificates, (-100, -80), place=Place(region="us-west-2")) == [-79, -101]


def test_only_certificates_that_belong_to_nothing_are_unclaimed(monkeypatch: pytest.MonkeyPatch) -> None:
    certificates = Certificates([-85, -90, -95], ahead_s=0, attached=(-90,))
    assert unclaimed(monkeypatch, certificates, (-100, -80), mine=-85) == [-95]


def test_each_request_is_looked_for_and_no_page_is_read_that_is_older_than_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    certificates = Certificates([-10, -20], [-101, -201], [-202, -300], [-400], ahead_s=0)
    assert unclaimed(monkeypatch, certificates, (-21, -19), (-200, -100)) == [-20, -101, -201]
    assert certificates.pages_read == 3


def test_a_page_that_ends_at_the_beginning_of_the_oldest_request_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    certificates = Certificates([-101], [-101], [-102], [-103], ahead_s=0)
    assert unclaimed(monkeypatch, certificates, (-100, -80)) == [-101, -101]
    assert certificates.pages_read == 3


# What AWS knows of a thing that the broker refuses


class Iot(Pages):
    def __init__(self, status: str | None, names: list[str], document: Any = None, instead: str = "") -> None:
        self._status, self._names, self._document, self._instead = status, names, document, instead

    def describe_certificate(self, **_: str) -> Any:
        if self._status is None:
            raise refusal("ResourceNotFoundException", 404)
        return {"certificateDescription": {"status": self._status}}

    def list_thing_principals(self, **_: str) -> Any:
        return {"principals": [f"{HERE}:cert/c1"] if self._instead else []}

    def describe_thing(self, **_: str) -> Any:
        return {"attributes": {"elf_id": self._instead}}

    def list_attached_policies(self, **_: str) -> Any:
        return {"policies": [{"policyName": name} for name in self._names]}

    def get_policy(self, **_: str) -> Any:
        return {"policyDocument": json.dumps(self._document)}


def allowing(action: str, kind: str, subject: str = "it") -> dict[str, Any]:
    return {"Statement": [statement("Allow", action, f"{HERE}:{kind}/{subject}")]}


CONNECT, PUBLISH, SUBSCRIBE = "iot:Connect", "iot:Publish", "iot:Subscribe"


@pytest.mark.parametrize(
    ("iot", "action", "endpoint", "local", "said"),
    [
        (Iot(None, []), CONNECT, "mine:8883", False, "does not exist"),
        (Iot(None, [], instead="somebody's"), CONNECT, "mine:8883", False, "does not exist"),
        (Iot(None, [], instead=ELF_ID), CONNECT, "mine:8883", False, f"made with ELF ID {ELF_ID}"),
        (Iot("REVOKED", []), CONNECT, "mine:8883", False, "is revoked"),
        (Iot("INACTIVE", []), CONNECT, "mine:8883", False, "is INACTIVE"),
        (Iot("ACTIVE", []), CONNECT, "mine:8883", False, "has no policy"),
        (Iot("ACTIVE", ["p"], allowing(CONNECT, "client", "x")), CONNECT, "mine:8883", False, "no policy"),
        (Iot("ACTIVE", ["p"], allowing(CONNECT, "topic")), CONNECT, "mine:8883", False, "may not connect as it"),
        (Iot("ACTIVE", ["p"], allowing(CONNECT, "client")), CONNECT, "mine:8883", False, None),
        (Iot("ACTIVE", ["p"], allowing(CONNECT, "client")), CONNECT, "other:8883", False, "is mine"),
        (Iot("ACTIVE", ["p"], allowing(CONNECT, "client")), CONNECT, "other:8883", True, None),
        (Iot("ACTIVE", ["p"], allowing(PUBLISH, "topic")), PUBLISH, "other:8883", False, None),
        (Iot("ACTIVE", ["p"], allowing(PUBLISH, "topic")), PUBLISH, "mine:8883", False, None),
        (Iot("ACTIVE", ["p"], allowing(CONNECT, "topic")), PUBLISH, "mine:8883", False, "may not publish to it"),
        (Iot("ACTIVE", ["p"], allowing(SUBSCRIBE, "topic")), SUBSCRIBE, "mine:8883", False, "may not subscribe to it"),
        (Iot("ACTIVE", ["p"], allowing(SUBSCRIBE, "topicfilter")), SUBSCRIBE, "mine:8883", False, None),
    ],
)
def test_what_aws_knows_of_a_refused_thing_is_said_in_place_of_a_guess(
    iot: Any, action: str, endpoint: str, local: bool, said: str | None
) -> None:
    refused = Refusal("thing_0", endpoint, action, "it")
    place = Place(region="us-west-2", data_endpoint="mine", local=local)
    found = diagnosis.diagnose(iot, place, Thing("thing_0", f"{HERE}:cert/c0", "c0"), refused)
    if said is None:
        assert isinstance(found, Refusal)
        assert found.is_explained and "policy allows that (p)" in found.cause
        assert found.is_final == (action == PUBLISH and endpoint != "mine:8883")
    else:
        assert said in found.cause


ATTRIBUTES = {"Condition": {"ForAllValues:StringEquals": {"iot:ConnectAttributes": ["LastWill"]}}}
RETAIN = statement("Allow", "iot:RetainPublish", f"{HERE}:topic/a")
WILL = ("iot:Publish", "topic/a"), ("iot:ConnectAttributes", "LastWill")


@pytest.mark.parametrize(
    ("statements", "action", "needs", "said"),
    [
        ([ALLOW], PUBLISH, [("iot:RetainPublish", "topic/a")], "allows iot:RetainPublish on topic/a (p)"),
        ([ALLOW, RETAIN], PUBLISH, [("iot:RetainPublish", "topic/a")], None),
        ([statement("Allow", CONNECT, "*", **ATTRIBUTES)], CONNECT, WILL, "allows iot:Publish on topic/a (p)"),
        ([ALLOW, statement("Allow", CONNECT, "*")], CONNECT, WILL, "allows LastWill as one of iot:ConnectAttributes"),
        ([ALLOW, statement("Allow", CONNECT, "*", **CONDITION)], CONNECT, WILL, "LastWill as one of"),
        ([ALLOW, statement("Allow", CONNECT, "*", **ATTRIBUTES)], CONNECT, WILL, None),
        (ALLOW, PUBLISH, [], None),
    ],
)
def test_what_a_refused_thing_also_needs_is_looked_for_in_its_policies(
    statements: Any, action: str, needs: Any, said: str | None
) -> None:
    refused = Refusal("thing_0", "mine:8883", action, "a", needs=needs)
    place = Place(region="us-west-2", data_endpoint="mine", local=False)
    iot: Any = Iot("ACTIVE", ["p"], {"Statement": statements})
    found = diagnosis.diagnose(iot, place, Thing("thing_0", f"{HERE}:cert/c0", "c0"), refused)
    assert isinstance(found, Refusal) if said is None else found.name == "PolicyForbids" and said in found.cause


# A thing that can't connect


PROXY = Proxy("http", "proxy", 3128, "", "")


@pytest.fixture
def no_broken_files(monkeypatch: pytest.MonkeyPatch) -> ThingFiles:
    monkeypatch.setattr(diagnosis, "broken_file", lambda thing, files: None)
    return ThingFiles(*map(Path, "abc"))


def verify_error(code: int) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError("any")
    error.verify_code = code
    return error


@pytest.mark.parametrize(
    ("error", "said", "of_proxies"),
    [
        (verify_error(62), "for another host", False),
        (verify_error(64), "for another host", False),
        (verify_error(63), "not trusted", False),
        (verify_error(18), "not trusted", False),
        (ssl.SSLError("any"), "TLS failed", False),
        (ConnectionResetError("any"), "TLS failed", True),
        (BrokenPipeError("any"), "TLS failed", True),
        (EOFError("any"), "TLS failed", True),
        (TimeoutError("any"), "does not answer", True),
        (ConnectionRefusedError("any"), "nothing listens there", True),
        (socket.gaierror("any"), "resolve", True),
        (OSError(errno.ENETUNREACH, "any"), "network error", True),
    ],
)
def test_why_a_thing_can_not_connect_is_said(
    no_broken_files: ThingFiles, error: Exception, said: str, of_proxies: bool
) -> None:
    found = diagnosis.connect_failure(error, "thing_0", Endpoint("host", 8883), no_broken_files)
    assert isinstance(found, ElfError)
    assert found.cause.startswith("thing_0 can't connect to host:8883: ")
    assert said in found.cause
    assert ("--proxy" in found.remedy) is of_proxies
    through = diagnosis.connect_failure(error, "thing_0", Endpoint("host", 8883, PROXY), no_broken_files)
    assert isinstance(through, ElfError)
    assert "through the proxy http://proxy:3128" in through.cause
    assert "--proxy" not in through.remedy


def test_what_is_known_already_and_what_is_not_known_stay_as_they_are(no_broken_files: ThingFiles) -> None:
    for error in (ElfError("Name", "a", "b"), KeyError("any")):
        assert diagnosis.connect_failure(error, "thing_0", Endpoint("host"), no_broken_files) is error


@pytest.mark.parametrize(("proxy", "told"), [("http://p", "NO_PROXY"), (None, "set --proxy")])
def test_a_proxy_in_the_environment_is_named(
    no_broken_files: ThingFiles, monkeypatch: pytest.MonkeyPatch, proxy: str | None, told: str
) -> None:
    if proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy)
    found = diagnosis.connect_failure(TimeoutError(), "thing_0", Endpoint("host"), no_broken_files)
    assert isinstance(found, ElfError)
    assert told in found.remedy


def test_a_things_own_files_are_looked_at_first(tmp_path: Path) -> None:
    files = ThingFiles(*(tmp_path / name for name in ("certificate", "public", "private")))
    said = []
    for path, content in ((None, None), (files.certificate, " \n"), (files.certificate, "x"), (files.private_key, "x")):
        if path:
            path.write_text(content or "")
        found = diagnosis.connect_failure(TimeoutError(), "thing_0", Endpoint("host"), files)
        assert isinstance(found, ElfError)
        said.append(found.cause.partition(":")[0])
    assert said == [
        f"thing_0 has no file {files.certificate}",
        f"the file {files.certificate} of thing_0 is empty",
        f"thing_0 has no file {files.private_key}",
        f"the file {files.certificate} of thing_0 has no key or certificate",
    ]
