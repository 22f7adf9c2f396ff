# SPDX-License-Identifier: Apache-2.0
"""Which things, certificates and policies of AWS are this ELF's, and whether they are really gone.

AWS is eventually consistent: for a while it may not find what there is. So what the fleet has recorded, as made or as
asked for, counts as gone only if AWS says so twice, ABSENCE_S apart, or confirms its deletion. When it said so first is
in `Fleet.missing_since`, by what it is (the parameter of AWS's calls) and its name.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from iot_elf import aws, defaults, state
from iot_elf.aws import RetryLater, all_pages, concurrently, once_visible, unless_gone, users_of
from iot_elf.errors import ElfError, error_names
from iot_elf.state import Fleet, Thing, policy_name
from iot_elf.text import as_typed, listed, log

ABSENCE_S = 5.0  # between two answers that something is not found
REPEATS = 4  # of that pause, while AWS answers now this, now that


# Whether it is gone


class Reading:
    """A block in which AWS is asked for what belongs together.

    At its end, it raises RetryLater if something was not found that has to be asked for again: once for all of it.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.missing = False  # whether something was not found, be that believed or not
        self._doubtful: Exception | None = None

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._doubtful and not kind:
            raise _ask_again(self._doubtful) from self._doubtful

    def find(self, what: tuple[str, str], call: Callable[..., Any], **parameters: Any) -> Any:
        """Return the answer to a call about something that is recorded, or None if AWS does not find it."""
        try:
            answer = call(**parameters)
        except Exception as error:
            if not aws.is_not_found(error):
                raise
            self.missing = True
            if not _is_said_again(self._fleet, what):
                self._doubtful = error
            return None
        if answer:  # an empty list may also be one of something that is gone
            self._fleet.missing_since.pop(what, None)
        return answer


def _is_said_again(fleet: Fleet, what: tuple[str, str]) -> bool:
    """Note that AWS does not find something; return whether it said so before, long enough ago."""
    now = time.monotonic()
    return now - fleet.missing_since.setdefault(what, now) >= ABSENCE_S


def _ask_again(error: Exception) -> RetryLater:
    return RetryLater(error, REPEATS * ABSENCE_S, "not found, which may pass", least_s=ABSENCE_S)


def _is_gone(fleet: Fleet, arn: str) -> bool:
    """Return whether AWS has confirmed that a certificate is deleted."""
    return fleet.missing_since.get(("certificateId", arn.rpartition("/")[2])) == -math.inf


def find_thing(iot: Any, fleet: Fleet, name: str) -> Any:
    """Return DescribeThing's answer, or None if the thing is gone. Raises RetryLater; botocore's errors."""
    with Reading(fleet) as reading:
        return reading.find(("thingName", name), iot.describe_thing, thingName=name)


def resume(iot: Any, fleet: Fleet, name: str) -> Thing:
    """Return a thing as an earlier attempt left it, without its certificate if that is gone.

    Raises RetryLater; botocore's errors.
    """
    thing = fleet.things[name]
    if certificate_id := thing.certificate_id:
        with Reading(fleet) as reading:
            what = "certificateId", certificate_id
            described = reading.find(what, iot.describe_certificate, certificateId=certificate_id)
        if not described:
            thing = fleet.record(thing._replace(certificate_arn=None, certificate_id=None, policy_arn=None))
    return thing


def delete(iot: Any, fleet: Fleet, thing: Thing, call: Callable[..., Any], **parameters: Any) -> None:
    """Delete a thing, its policy or one of its certificates; what is not known (None) counts as done.

    AWS is distributed: "it can take up to five minutes after a policy is detached before it's ready to be deleted"
    (DetachPolicy, AWS IoT API reference); of a certificate, DetachThingPrincipal says "several seconds".
    Raises ElfError if something else uses it; RetryLater, to repeat all that comes before the deletion, too, if AWS is
    not ready for it or does not find it; botocore's errors.
    """
    if None in parameters.values():
        return
    what = next(iter(parameters.items()))
    try:
        call(**parameters)
    except Exception as error:
        name = error_names(error)[0]
        if aws.is_not_found(error):
            # An earlier attempt that got no answer may have deleted it.
            if not aws.may_have_arrived(error) and not _is_said_again(fleet, what):
                raise _ask_again(error) from error
        elif name == "VersionConflictException":
            raise RetryLater(error, REPEATS * ABSENCE_S, "changed meanwhile") from error
        elif name in ("DeleteConflictException", "CertificateStateException"):
            if users := once_visible(functools.partial(_other_users, iot, fleet, thing, *what)):
                raise ElfError(
                    "StillAttached",
                    f"AWS refuses to delete {what[1]}: it is attached to {listed(users)}",
                    "detach it there if nobody needs it, then run the same command again; if this misc/ is an old "
                    "copy, `elf.py clean --adopt` deletes it, and all else of this ELF's ID",
                ) from error
            raise RetryLater(error, defaults.CONSISTENCY_S, "still attached according to AWS") from error
        else:
            raise
    fleet.missing_since[what] = -math.inf


def _other_users(iot: Any, fleet: Fleet, thing: Thing, kind: str, name: str) -> set[str]:
    """Ask AWS what else uses a thing, its policy or its certificate, which may still count as attached to each other.

    Versions of a policy that edits have made, which AWS requires to be deleted first, are deleted.
    """
    if kind == "thingName":
        return _others(fleet, thing, aws.principals_of(iot, name))
    if kind == "policyName":
        targets = all_pages(iot.get_paginator("list_targets_for_policy"), "targets", policyName=name)
        if others := _others(fleet, thing, targets):
            return others
        for version in iot.list_policy_versions(policyName=name)["policyVersions"]:
            if not version["isDefaultVersion"]:
                unless_gone(iot.delete_policy_version, policyName=name, policyVersionId=version["versionId"])
        return set()
    arn = next(arn for arn in (thing.certificate_arn, *thing.lost) if arn and arn.endswith(f"/{name}"))
    return users_of(iot, arn) - {f"thing {thing.name}", f"policy {policy_name(thing.name)}"}


def _others(fleet: Fleet, thing: Thing, principals: list[str]) -> set[str]:
    return {arn for arn in principals if not _is_gone(fleet, arn)} - {thing.certificate_arn, *thing.lost}


# Whose it is


def list_own_things(iot: Any, elf_id: str) -> set[str]:
    """Ask AWS for the names of an ELF's things, by the attribute that make_thing() sets."""
    query = {"attributeName": "elf_id", "attributeValue": elf_id, "PaginationConfig": {"PageSize": 250}}
    things = all_pages(iot.get_paginator("list_things"), "things", **query)
    return {thing["thingName"] for thing in things}


def plan_deletion(
    iot: Any, fleet: Fleet, name: str, document_of: Callable[[str, str], Mapping[str, Any]]
) -> tuple[Thing, int | None]:
    """Ask AWS what there is to delete of a thing, and record that this has begun.

    A thing or policy of the same name that someone else made is logged, and left alone. `document_of` returns the
    document of ELF's policy, for a thing and for an ARN of its account and region. Certificates of this ELF's thing
    whose keys are lost are recorded.
    Returns the thing with only what is this ELF's, and its version in AWS: None if it is gone, or someone else's.
    Raises ElfError for a certificate that is not this ELF's; RetryLater; botocore's errors.
    """
    thing, policy = fleet.things[name], policy_name(name)  # which it may have without its being recorded yet
    arn, certificate = thing.certificate_arn, ("certificateId", thing.certificate_id or "")
    with Reading(fleet) as reading:
        described, attached = concurrently(
            lambda: reading.find(("thingName", name), iot.describe_thing, thingName=name),
            lambda: reading.find(certificate, aws.attached_policies, iot=iot, arn=arn) if arn else None,
        )
        attributes = (described or {}).get("attributes", {})
        is_own = bool(described) and _is_own_thing(iot, thing, attributes, owner_of(fleet, attributes), reading)
        is_attached = policy in (attached or ())
        found = None
        if not is_attached and thing.policy_name:
            found = reading.find(("policyName", policy), iot.get_policy, policyName=policy)
        elif not is_attached and (arn or is_own):
            found = aws.unless_missing(iot.get_policy, policyName=policy)
        if reading.missing and arn and not attached:  # then the certificate may be gone, too
            reading.find(certificate, iot.describe_certificate, certificateId=thing.certificate_id)
    if described and not is_own:
        log.warning("thing %s was made by someone else: left alone%s", name, hint(described))
    if is_attached or (found and _is_own_policy(thing, found, document_of)):
        thing = thing._replace(policy_name=policy)
    else:
        thing = thing._replace(policy_name=None, policy_arn=None)
    if (arn or is_own) and (is_own or not described):  # the next clean takes what is CLEANING for this ELF's
        thing = thing._replace(stage=state.CLEANING)
    fleet.record(thing)
    if is_own and not arn:
        thing = record_lost_certificates(iot, fleet, name)
    return thing, described["version"] if is_own else None


def owner_of(fleet: Fleet, attributes: Mapping[str, str]) -> str | None:
    """Return the ELF ID in a thing's attributes if this command takes it for its own, else the fleet's."""
    owner = attributes.get("elf_id")
    return owner if owner and owner == fleet.adopted else fleet.elf_id


def elf_id_in(described: Mapping[str, Any]) -> str:
    """Return the ELF ID in AWS's description of a thing, or "" if it has none that can be one."""
    owner: str = described.get("attributes", {}).get("elf_id", "")
    return owner if state.ELF_ID.fullmatch(owner) else ""


def hint(described: Mapping[str, Any]) -> str:
    """Return how to delete a thing of another ELF ID, if AWS's description of it says so."""
    owner, region = elf_id_in(described), described["thingArn"].split(":")[3:4]
    command = as_typed(f"`elf.py clean --adopt {owner} --region {''.join(region)}`")
    return f"; if it is yours, {command} deletes it" if owner else ""


def _is_own_thing(iot: Any, thing: Thing, attributes: Mapping[str, str], elf_id: str | None, reading: Reading) -> bool:
    """Return whether a thing that AWS describes is the one that the fleet has recorded.

    It has this elf_id, or the recorded certificate (the original program set no elf_id). A thing of the original's that
    an earlier attempt detached has neither; it is ELF's if nothing was added to it since.
    """
    if elf_id and attributes.get("elf_id") == elf_id:
        return True
    principals = reading.find(("thingName", thing.name), aws.principals_of, iot=iot, name=thing.name) or []
    return thing.certificate_arn in principals or (thing.stage == state.CLEANING and not attributes and not principals)


def _is_own_policy(
    thing: Thing, policy: Mapping[str, Any], document_of: Callable[[str, str], Mapping[str, Any]]
) -> bool:
    """Return whether ELF made a policy of a thing's that its certificate does not have (any more).

    It has ELF's document, for its account and region; or an earlier attempt detached it. Another is logged.
    """
    is_detached = thing.stage == state.CLEANING and bool(thing.policy_arn)
    name, arn = thing.name, policy["policyArn"]
    own = document_of(name, arn), state.earlier_policy_document(name, arn)
    if is_detached or json.loads(policy["policyDocument"]) in own:
        return True
    if thing.policy_name:
        log.warning("policy %s was made by someone else: left alone", thing.policy_name)
    return False


def modified_at(policy: Mapping[str, Any], fleet: Fleet) -> float:
    """Return when a policy that AWS describes was last changed, by AWS's clock; now, if it does not say so."""
    date = policy.get("lastModifiedDate")
    return date.timestamp() if date else fleet.clock.now()


@contextlib.contextmanager
def making_version(policy: str) -> Iterator[None]:
    """Raise RetryLater if AWS may have made a policy's new version, which a repetition sees; ElfError if it can't."""
    try:
        yield
    except Exception as error:
        if error_names(error)[0] == "VersionsLimitExceededException":
            raise ElfError(
                "PolicyFull",
                f"policy {policy} has five versions, AWS's maximum, and needs a new one",
                f"`aws iot list-policy-versions --policy-name {policy}` shows them: delete one that nobody needs "
                f"(`aws iot delete-policy-version --policy-name {policy} --policy-version-id ID`)",
            ) from error
        if aws.may_have_arrived(error):
            raise RetryLater(error, REPEATS * ABSENCE_S, "no answer") from error
        raise


def record_lost_certificates(iot: Any, fleet: Fleet, name: str) -> Thing:
    """Record the certificates that this ELF made for its thing and has lost; return the thing, with all of them.

    They are attached only to that thing, and have its policy or none. Raises ElfError for any other certificate;
    RetryLater; botocore's errors.
    """
    thing = fleet.things[name]
    lost = sorted(_others(fleet, thing, once_visible(aws.principals_of, iot=iot, name=name)))
    for arn in lost:
        users = users_of(iot, arn) if state.ARN.fullmatch(arn) else {arn}
        if users - {f"thing {name}", f"policy {policy_name(name)}"}:
            raise ElfError(
                "CertificateOfOthers",
                f"{name} has a certificate that ELF did not make: {arn}",
                f"detach it (`aws iot detach-thing-principal --thing-name {name} --principal {arn}`)",
            )
    return fleet.record(thing._replace(lost=(*thing.lost, *lost))) if lost else thing
