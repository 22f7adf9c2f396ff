"""What is this ELF's, and when it is gone: AWS says twice that it does not find it, or confirms its deletion."""

from __future__ import annotations

import collections
import json
from types import SimpleNamespace
from typing import Any

import pytest
from support.program import constant

import elf
from iot_elf import ownership
from iot_elf.aws import RetryLater
from iot_elf.errors import ElfError
from iot_elf.state import CLEANING, CREATING, READY, Thing

from .stand_ins import Clock, Pages, logged, refusal

HERE = "arn:aws:iot:us-west-2:123456789012"
ARN, OTHER = f"{HERE}:cert/c0", f"{HERE}:cert/other"
ID = "urn:uuid:01234567-89ab-cdef-0123-456789abcdef"
OTHER_ID = ID.replace("0", "f")
GONE = refusal("ResourceNotFoundException", 404)
LATE = refusal("ResourceNotFoundException", 404, MayHaveArrived=True)  # after an attempt that got no answer
CONFLICT = refusal("DeleteConflictException", 409)
DENIED = refusal("AccessDeniedException", 403)
THING = Thing("a", ARN, "c0", stage=CLEANING)


class Call:
    """A call to AWS with its answers, one after the other; how often it was made."""

    def __init__(self, *answers: Any) -> None:
        self._answers, self.calls = list(answers), 0

    def __call__(self, **_: Any) -> Any:
        self.calls += 1
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Iot(Pages):
    """What AWS answers about things, principals and policies."""

    def __init__(self, **lists: list[Any]) -> None:
        self.lists: dict[str, list[Any]] = collections.defaultdict(list, lists)
        self.deleted: list[dict[str, str]] = []

    def list_thing_principals(self, **_: str) -> Any:
        return {"principals": self.lists["principals"]}

    def list_targets_for_policy(self, **_: str) -> Any:
        return {"targets": self.lists["targets"]}

    def list_policy_versions(self, **_: str) -> Any:
        return {"policyVersions": self.lists["versions"]}

    def delete_policy_version(self, **what: str) -> None:
        self.deleted.append(what)

    def list_principal_things(self, principal: str) -> Any:
        return {"things": self.lists["things"]}

    def list_attached_policies(self, target: str) -> Any:
        return {"policies": [{"policyName": name} for name in self.lists["policies"]]}


class Fleet:
    """Things, and what AWS did not find, in memory."""

    elf_id = "mine"

    def __init__(self, thing: Thing = THING) -> None:
        self.things, self.missing_since = {thing.name: thing}, dict[tuple[str, str], float]()

    def record(self, thing: Thing) -> Thing:
        self.things[thing.name] = thing
        return thing


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch, ownership)


# Whether it is gone


def found(fleet: Any, call: Call, what: tuple[str, str] = ("thingName", "a")) -> Any:
    with ownership.Reading(fleet) as reading:
        return reading.find(what, call)


def test_what_is_not_found_is_asked_for_again_and_then_gone(clock: Clock) -> None:
    fleet, call = Fleet(), Call(GONE, GONE, GONE, GONE, {"version": 1}, GONE)
    with pytest.raises(RetryLater) as raised:
        found(fleet, call)
    assert (raised.value.error, raised.value.least_s) == (GONE, constant("ABSENCE_S"))
    clock.now += 4.9  # it is repeated for another reason
    with pytest.raises(RetryLater):
        found(fleet, call)
    clock.now += 0.2
    assert found(fleet, call) is None
    assert found(fleet, call) is None
    assert found(fleet, call) == {"version": 1}  # after all
    with pytest.raises(RetryLater):
        found(fleet, call)


def test_what_is_missing_together_is_asked_for_again_together(clock: Clock) -> None:
    fleet: Any = Fleet()
    thing, certificate = Call(GONE, GONE), Call(GONE, GONE)
    for _ in range(2):
        try:
            with ownership.Reading(fleet) as reading:
                reading.find(("thingName", "a"), thing)
                reading.find(("certificateId", "c0"), certificate)
        except RetryLater:
            clock.now += 5
    assert (thing.calls, certificate.calls) == (2, 2)


def test_an_empty_list_of_something_does_not_say_that_it_is_there(clock: Clock) -> None:
    fleet, call = Fleet(), Call(GONE, [], GONE)
    with pytest.raises(RetryLater):
        found(fleet, call)
    clock.now += 5
    assert found(fleet, call) == []
    assert found(fleet, call) is None


def test_another_error_is_not_an_absence() -> None:
    with pytest.raises(type(DENIED)):
        found(Fleet(), Call(DENIED))


def delete(fleet: Any, call: Call, iot: Any = None, **parameters: Any) -> None:
    ownership.delete(iot or Iot(), fleet, fleet.things["a"], call, **(parameters or {"policyName": "policy-a"}))


def test_a_deletion_that_finds_nothing_is_repeated_once(clock: Clock) -> None:
    fleet, call = Fleet(), Call(GONE, GONE)
    with pytest.raises(RetryLater):
        delete(fleet, call)
    clock.now += 5
    delete(fleet, call)
    assert found(fleet, Call(GONE), ("policyName", "policy-a")) is None


@pytest.mark.parametrize("answer", [{}, LATE])
def test_what_a_deletion_has_confirmed_is_gone_at_once(answer: Any) -> None:
    fleet = Fleet()
    delete(fleet, Call(answer))
    assert found(fleet, Call(GONE), ("policyName", "policy-a")) is None


@pytest.mark.parametrize("parameters", [{"policyName": None}, {"thingName": "a", "expectedVersion": None}])
def test_what_is_not_known_is_not_deleted(parameters: dict[str, Any]) -> None:
    delete(Fleet(), Call(), **parameters)


@pytest.mark.parametrize(
    ("error", "limit_s", "reason"),
    [
        (CONFLICT, constant("CONSISTENCY_S"), "still attached according to AWS"),
        (refusal("CertificateStateException", 409), constant("CONSISTENCY_S"), "still attached according to AWS"),
        (refusal("VersionConflictException", 409), 20.0, "changed meanwhile"),
    ],
)
def test_a_deletion_that_aws_is_not_ready_for_is_repeated(error: Any, limit_s: float, reason: str) -> None:
    with pytest.raises(RetryLater) as raised:
        delete(Fleet(), Call(error))
    assert (raised.value.limit_s, raised.value.reason) == (limit_s, f"DeleteThing: {reason}")


def test_a_deletion_that_is_denied_fails() -> None:
    with pytest.raises(type(DENIED)):
        delete(Fleet(), Call(DENIED))


@pytest.mark.parametrize(
    ("what", "lists", "others"),
    [
        ({"thingName": "a"}, {}, None),
        ({"thingName": "a"}, {"principals": [ARN]}, None),  # which may still count as attached
        ({"thingName": "a"}, {"principals": [ARN, f"{OTHER}_10", f"{OTHER}_9"]}, f"{OTHER}_9, {OTHER}_10"),
        ({"policyName": "policy-a"}, {"targets": [ARN]}, None),
        ({"policyName": "policy-a"}, {"targets": [ARN, "b"]}, "b"),
        ({"certificateId": "c0"}, {}, None),
        ({"certificateId": "c0"}, {"things": ["a"], "policies": ["policy-a"]}, None),
        ({"certificateId": "c0"}, {"things": ["a", "b"], "policies": ["policy-a"]}, "thing b"),
        ({"certificateId": "c0"}, {"things": ["a"], "policies": ["policy-b"]}, "policy policy-b"),
    ],
)
def test_what_somebody_else_uses_is_not_deleted_and_they_are_named(
    what: dict[str, str], lists: dict[str, Any], others: str | None
) -> None:
    with pytest.raises(ElfError if others else RetryLater) as raised:
        delete(Fleet(), Call(CONFLICT), Iot(**lists), **what)
    if isinstance(raised.value, ElfError):
        assert raised.value.cause == f"AWS refuses to delete {next(iter(what.values()))}: it is attached to {others}"


def test_a_certificate_that_was_deleted_may_still_be_listed() -> None:
    fleet: Any = Fleet(THING._replace(lost=(OTHER,)))
    delete(fleet, Call({}), certificateId="other")
    fleet.things["a"] = THING
    with pytest.raises(RetryLater):
        delete(fleet, Call(CONFLICT), Iot(principals=[OTHER]), thingName="a")
    assert ownership.record_lost_certificates(Iot(principals=[OTHER, ARN]), fleet, "a") == THING


@pytest.mark.parametrize(("targets", "deleted"), [([], ["2", "3"]), ([ARN], ["2", "3"]), (["b"], [])])
def test_versions_that_edits_of_a_policy_made_are_deleted_unless_somebody_uses_it_and_aws_gets_time_to_see_it(
    targets: list[str], deleted: list[str]
) -> None:
    versions = [{"versionId": v, "isDefaultVersion": v == "1"} for v in "123"]
    iot = Iot(targets=targets, versions=versions)
    with pytest.raises((ElfError, RetryLater)):
        delete(Fleet(), Call(CONFLICT), iot)
    assert iot.deleted == [{"policyName": "policy-a", "policyVersionId": version} for version in deleted]


# Whose it is


@pytest.mark.parametrize(
    ("principals", "users", "recorded"),
    [
        ([], [], ()),
        ([OTHER], ["a"], (OTHER,)),
        ([f"{OTHER}2", OTHER], [], (OTHER, f"{OTHER}2")),
        ([OTHER], ["a", "b"], None),
        (["not-an-arn"], [], None),
    ],
)
def test_a_lost_certificate_is_recorded_before_anything_is_done_with_it(
    principals: list[str], users: list[str], recorded: tuple[str, ...] | None
) -> None:
    fleet: Any = Fleet(Thing("a"))
    iot = Iot(principals=principals, things=users)
    if recorded is None:
        with pytest.raises(ElfError) as raised:
            ownership.record_lost_certificates(iot, fleet, "a")
        assert raised.value.name == "CertificateOfOthers"
    else:
        assert ownership.record_lost_certificates(iot, fleet, "a") is fleet.things["a"]
    assert fleet.things["a"].lost == (recorded or ())


@pytest.mark.parametrize(
    ("stage", "attributes", "principals", "elf_id", "is_own"),
    [
        (READY, {"elf_id": "mine"}, [], "mine", True),
        (READY, {"elf_id": "mine"}, [OTHER], "mine", True),
        (READY, {"elf_id": "yours"}, [], "mine", False),
        (READY, {"elf_id": "yours"}, [ARN], "mine", True),
        (READY, {}, [], "mine", False),
        (READY, {}, [], None, False),
        (READY, {}, [ARN, OTHER], None, True),
        (READY, {}, [OTHER], None, False),
        # an earlier clean detached what the original program made
        (CLEANING, {}, [], "mine", True),
        (CLEANING, {}, [], None, True),
        (CLEANING, {}, [OTHER], "mine", False),
        (CLEANING, {"owner": "you"}, [], "mine", False),
        (CLEANING, {"elf_id": "yours"}, [], "mine", False),
        (CLEANING, {"owner": "you"}, [ARN], "mine", True),
        (CREATING, {}, [], "mine", False),
    ],
)
def test_clean_takes_a_thing_for_its_own_only_by_its_id_or_certificate_or_if_nothing_was_added_to_it(
    stage: str, attributes: dict[str, str], principals: list[str], elf_id: str | None, is_own: bool
) -> None:
    thing, reading = Thing("a", ARN, "c0", stage=stage), ownership.Reading(Fleet())  # type: ignore[arg-type]
    assert ownership._is_own_thing(Iot(principals=principals), thing, attributes, elf_id, reading) is is_own


def test_a_thing_without_a_recorded_certificate_is_not_taken_for_one_that_has_others() -> None:
    thing, reading = Thing("a", stage=CLEANING), ownership.Reading(Fleet())  # type: ignore[arg-type]
    assert not ownership._is_own_thing(Iot(principals=[OTHER]), thing, {}, "mine", reading)
    assert not ownership._is_own_thing(Iot(), thing, {"elf_id": ""}, None, reading)


EARLIER_DOCUMENT: dict[str, Any] = {
    "Version": "2012-10-17",
    "Statement": [
        {"Effect": "Allow", "Action": "iot:Connect", "Resource": f"{HERE}:client/thing_0-*"},
        {"Effect": "Allow", "Action": ["iot:Publish", "iot:Receive"], "Resource": f"{HERE}:topic/*"},
        {"Effect": "Allow", "Action": "iot:Subscribe", "Resource": f"{HERE}:topicfilter/*"},
    ],
}


@pytest.mark.parametrize(
    ("stage", "policy_arn", "document", "is_own"),
    [
        (READY, "arn", elf.policy_document("thing_0", ARN), True),
        (READY, "arn", elf.policy_document("thing_1", ARN), False),
        (READY, "arn", EARLIER_DOCUMENT, True),
        (READY, "arn", {**EARLIER_DOCUMENT, "Statement": EARLIER_DOCUMENT["Statement"][:2]}, False),
        (CLEANING, "arn", {"edited": 1}, True),
        (CLEANING, None, {"edited": 1}, False),
        (CLEANING, None, elf.policy_document("thing_0", ARN), True),
    ],
)
def test_clean_takes_a_policy_for_its_own_by_its_document_or_if_it_was_the_things(
    stage: str, policy_arn: str | None, document: Any, is_own: bool
) -> None:
    thing = Thing("thing_0", ARN, "c0", "policy-thing_0" if policy_arn else None, policy_arn, stage)
    policy = {"policyDocument": json.dumps(document), "policyArn": f"{HERE}:policy/policy-thing_0"}
    with logged() as lines:
        assert ownership._is_own_policy(thing, policy, elf.policy_document) is is_own
    assert len(lines) == (stage == READY and not is_own)


def read_by(plan: Any) -> Any:
    """Plan the deletion of a thing which AWS does not have, and whose certificate and policy are gone, too."""
    calls = collections.Counter[str]()

    def missing(name: str) -> Any:
        def call(**_: Any) -> Any:
            calls[name] += 1
            raise GONE

        return call

    iot = SimpleNamespace(
        get_paginator=Iot().get_paginator,
        **{name: missing(name) for name in ("describe_thing", "get_policy", "describe_certificate")},
    )
    return plan(iot), calls


def test_a_thing_of_which_nothing_is_left_is_read_twice(clock: Clock) -> None:
    fleet: Any = Fleet(THING._replace(policy_name="policy-a", policy_arn=f"{HERE}:policy/policy-a", stage=READY))

    def plan(iot: Any) -> Any:
        with pytest.raises(RetryLater):
            ownership.plan_deletion(iot, fleet, "a", elf.policy_document)
        clock.now += 5
        return ownership.plan_deletion(iot, fleet, "a", elf.policy_document)

    (thing, version), calls = read_by(plan)
    assert (thing.policy_name, thing.stage, version) == (None, CLEANING, None)
    assert calls == {"describe_thing": 2, "get_policy": 2, "describe_certificate": 2}


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ({}, ""),
        ({"elf_id": "`reboot`"}, ""),
        ({"elf_id": ID}, f"; if it is yours, `python elf.py clean --adopt {ID} --region eu-west-1` deletes it"),
    ],
)
def test_how_to_delete_a_thing_of_another_elf_is_told_with_its_region(attributes: dict[str, str], told: str) -> None:
    arn = "arn:aws:iot:eu-west-1:123456789012:thing/lamp_0"
    assert ownership.hint({"thingArn": arn, "attributes": attributes}) == told
    assert ownership.hint({"thingArn": arn}) == ""


@pytest.mark.parametrize(
    ("attributes", "adopted", "owner"),
    [({"elf_id": OTHER_ID}, OTHER_ID, OTHER_ID), ({"elf_id": OTHER_ID}, None, ID), ({}, OTHER_ID, ID), ({}, None, ID)],
)
def test_a_command_takes_what_it_adopts_for_its_own(
    attributes: dict[str, str], adopted: str | None, owner: str
) -> None:
    fleet: Any = Fleet()
    fleet.elf_id, fleet.adopted = ID, adopted
    assert ownership.owner_of(fleet, attributes) == owner


def test_a_list_of_things_is_read_in_large_pages() -> None:
    asked: dict[str, Any] = {}

    def paginate(**options: Any) -> Any:
        asked.update(options)
        return [{"things": [{"thingName": "a"}]}, {"things": [{"thingName": "b"}]}]

    iot = SimpleNamespace(get_paginator=lambda operation: SimpleNamespace(paginate=paginate))
    assert ownership.list_own_things(iot, ID) == {"a", "b"}
    assert asked["PaginationConfig"] == {"PageSize": 250}  # ListThings: its most, at 10 calls a second
