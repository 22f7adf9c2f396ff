"""Every operation that ELF calls meets every fault on the way to AWS; answers never come, or lack something."""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from typing import Any, NamedTuple

import pytest
from botocore import xform_name
from support.aws import Account
from support.failures import Explained
from support.http_proxy import (
    CUT_AFTER,
    CUT_BEFORE,
    HANG,
    HANG_AFTER,
    INTERNAL_FAILURE,
    OPERATIONS,
    THROTTLED,
    UNAVAILABLE,
    Answer,
    Fault,
    HttpProxy,
    denied,
)
from support.machine import PATIENCE_S
from support.program import Limits, program_text, set_limits
from support.shell import Elf, InProcess, Result

THINGS = ["thing_0", "thing_1"]
PASSING = {
    "500": INTERNAL_FAILURE,
    "503": UNAVAILABLE,
    "429": THROTTLED,
    "cut-before": CUT_BEFORE,
    "cut-after": CUT_AFTER,
    "hang": HANG,
}
# botocore pauses for a random part of a second before it makes a call again: with this seed for a small one.
SEED = next(seed for seed in itertools.count() if max(random.Random(seed).choices(range(100), k=3)) < 10)
UNNAMED = ("CreateKeysAndCertificate", "cut-after")  # AWS gives no handle on what this one leaves behind

ONCE = ("--duration", "0.01")


class Situation(NamedTuple):
    """Where an operation is called: by which command, after what, and what else has to go wrong for it."""

    command: str
    after: tuple[str, ...] = ()
    provoked_by: tuple[tuple[str, Fault], ...] = ()
    stops: int = 1  # so many things go without, where the operation is denied for one


CREATE = Situation("create")
ADOPT = Situation("adopt", after=("create", "lose keys"))
FIRST_SEND = Situation("send", after=("create",))
CLEAN = Situation("clean", after=("create", "send"))
CLEAN_EDITED = Situation("clean", after=("create", "send", "edit a policy"))

# A row for each operation that ELF calls, but for the one that asks why a broker refuses a thing.
SITUATIONS = {
    "DescribeEndpoint": CREATE._replace(stops=2),
    "CreateThing": CREATE,
    "CreateKeysAndCertificate": CREATE,
    "AttachThingPrincipal": CREATE,
    "ListThings": ADOPT._replace(stops=2),
    "ListThingPrincipals": ADOPT._replace(stops=2),
    "ListPrincipalThings": ADOPT,
    "ListAttachedPolicies": ADOPT,
    "ListCertificates": CREATE._replace(provoked_by=(("CreateKeysAndCertificate", CUT_BEFORE),), stops=0),
    "CreatePolicy": FIRST_SEND,
    "CreatePolicyVersion": Situation("send named", after=("create", "send", "earlier policies")),
    "GetPolicy": FIRST_SEND._replace(provoked_by=(("CreatePolicy", CUT_AFTER),)),  # made again, it exists already
    "AttachPolicy": FIRST_SEND,
    "DescribeThing": Situation("clean", after=("create without certificates",)),
    "DetachPolicy": CLEAN,
    "DeletePolicy": CLEAN,
    "UpdateCertificate": CLEAN,
    "ListTargetsForPolicy": CLEAN_EDITED,
    "ListPolicyVersions": CLEAN_EDITED,
    "DeletePolicyVersion": CLEAN_EDITED,
    "DetachThingPrincipal": CLEAN,
    "DeleteCertificate": CLEAN,
    "DeleteThing": CLEAN,
}
CHANGES = [name for method, _, name, _ in OPERATIONS if method != "GET" and not name.startswith("List")]
MOMENTS = {"before-aws-acts": HANG, "after-aws-acts": HANG_AFTER}
DIAGNOSIS = "DescribeCertificate"


def lose_keys(elf: Elf) -> None:
    for path in (elf.misc / "things.json", *elf.misc.glob("thing_*")):
        path.unlink()


class Unlucky:
    """A user with two things, whose calls to AWS go through a proxy that makes them fail."""

    def __init__(self, main: InProcess, elf: Elf, account: Account, proxy: HttpProxy) -> None:
        self.elf, self.account, self.proxy, self._main = elf, account, proxy, main
        self._arguments = {
            "create": ("create", len(THINGS)),
            "adopt": ("create", len(THINGS), "--adopt"),
            "send": ("send", *elf.to_broker, "--duration", "0.01"),
            "clean": ("clean",),
        }
        self._arguments["send named"] = (*self._arguments["send"], "--client-id", "{thing_name}")

    def run(self, command: str, status: int = 0) -> Result:
        return self._main(*self._arguments[command], status=status)

    def prepare(self, step: str) -> None:
        if step == "lose keys":
            lose_keys(self.elf)
        elif step == "earlier policies":
            self.account.use_earlier_policies(self.elf.misc)
        elif step == "edit a policy":
            self.account.edit_policy("policy-thing_0", lambda statements: statements.pop())
        elif step == "create without certificates":
            self.proxy.inject("CreateKeysAndCertificate", denied("CreateKeysAndCertificate"), onwards=True)
            self.run("create", status=1)
        else:
            self.run(step)

    def meet(self, operation: str, fault: Fault, status: int = 0) -> Result:
        """Come to where ELF calls the operation, and have the first call of it go wrong."""
        command = self.approach(operation)
        return self.run_into(operation, fault, command, status)

    def approach(self, operation: str) -> str:
        """Do what comes before the command that calls the operation; return that command."""
        situation = SITUATIONS[operation]
        for step in situation.after:
            self.prepare(step)
        self.proxy.reset()
        for other, provocation in situation.provoked_by:
            self.proxy.inject(other, provocation)
        return situation.command

    def run_into(self, operation: str, fault: Fault, command: str, status: int) -> Result:
        self.proxy.inject(operation, fault)
        with pytest.MonkeyPatch.context() as patch:
            if fault.hangs:
                set_limits(patch.setattr, CALL_TIMEOUT_S=1.0)
            result = self.run(command, status)
        assert self.proxy.faults[operation] == 1
        return result

    def kill(self, operation: str, fault: Fault) -> None:
        """Kill the command that calls the operation while its first call hangs."""
        command = self.approach(operation)
        self.proxy.inject(operation, fault)
        window = self.elf.start(*self._arguments[command])
        self.proxy.await_hang(PATIENCE_S)
        window.kill()
        self.proxy.release()
        self.proxy.await_quiet(PATIENCE_S)

    def finish(self, operation: str) -> str:
        """Run the same command again, then clean; return what they printed."""
        printed = self.run(SITUATIONS[operation].command).err + self.run("clean").err
        assert self.elf.files() == ["elf.json"]
        return printed

    def served(self, operation: str) -> list[str]:
        """Ask AWS which things the operation's command is done with."""
        present, command = self.account.things(), SITUATIONS[operation].command
        if command == "clean":
            return [name for name in THINGS if name not in present]
        if command == "send named":
            return [name for name in present if "policySettlesAt" in self.elf.recorded()[name]]
        complete = []
        for name in present:
            principals = self.account.iot.list_thing_principals(thingName=name)["principals"]
            if principals == [self.elf.recorded().get(name, {}).get("certificateArn")] and (
                command in ("create", "adopt") or self.account.policies_of(name) == [f"policy-{name}"]
            ):
                complete.append(name)
        return complete


@pytest.fixture
def unlucky(main: InProcess, elf: Elf, account: Account, proxy: HttpProxy) -> Unlucky:
    random.seed(SEED)
    return Unlucky(main, elf, account, proxy)


def test_every_operation_that_elf_calls_is_here() -> None:
    called = set(
        re.findall(
            r'\biot\.(?:get_paginator\(")?([a-z_]+)[",(]',
            program_text("elf", "aws", "ownership", "adoption", "sign_in", "diagnosis"),
        )
    )
    assert called == {xform_name(operation) for operation in (*SITUATIONS, DIAGNOSIS)}
    assert {operation for _, _, operation, _ in OPERATIONS} == {*SITUATIONS, DIAGNOSIS}


@pytest.mark.sample(13)  # which is another fault for each second operation
@pytest.mark.parametrize(
    ("operation", "fault"), [case for case in itertools.product(SITUATIONS, PASSING) if case != UNNAMED]
)
def test_a_passing_fault_is_ridden_out_and_leaves_nothing_behind(
    unlucky: Unlucky, account: Account, operation: str, fault: str
) -> None:
    unlucky.meet(operation, PASSING[fault])
    assert unlucky.served(operation) == THINGS
    unlucky.finish(operation)
    assert account.is_empty()


def test_a_certificate_whose_answer_is_lost_is_named_and_left_to_the_user(unlucky: Unlucky, account: Account) -> None:
    operation, fault = UNNAMED
    printed = unlucky.meet(operation, PASSING[fault]).err + unlucky.finish(operation)
    assert (account.things(), account.policies()) == ([], [])
    (certificate_id,) = account.certificates()
    assert certificate_id in printed
    arn = account.iot.describe_certificate(certificateId=certificate_id)["certificateDescription"]["certificateArn"]
    assert account.iot.list_principal_things(principal=arn)["things"] == []
    assert account.iot.list_attached_policies(target=arn)["policies"] == []


@pytest.mark.sample(2)
@pytest.mark.parametrize("operation", SITUATIONS)
def test_a_denied_call_is_explained_and_stops_no_other_thing(
    unlucky: Unlucky, account: Account, operation: str
) -> None:
    stops = SITUATIONS[operation].stops
    result = unlucky.meet(operation, denied(operation), status=1 if stops else 0)
    assert len([line for line in result.lines if f"AWS denies iot:{operation} to" in line]) == 1
    assert len([line for line in result.lines if line.startswith("what to do: ")]) == 1
    assert "Traceback" not in result.out + result.err
    assert len(unlucky.served(operation)) == len(THINGS) - stops
    unlucky.finish(operation)
    assert account.is_empty()


@pytest.mark.sample(5)
@pytest.mark.parametrize(("operation", "moment"), [*itertools.product(CHANGES, MOMENTS)])
def test_clean_empties_the_account_after_a_kill_in_mid_call(
    unlucky: Unlucky, account: Account, operation: str, moment: str
) -> None:
    unlucky.kill(operation, MOMENTS[moment])
    printed = unlucky.run("clean").err
    assert unlucky.elf.files() == ["elf.json"]
    assert (account.things(), account.policies()) == ([], [])
    unanswered = len(THINGS) if SITUATIONS[operation].command == "create" else 0
    assert len(account.certificates()) <= unanswered
    assert all(certificate_id in printed for certificate_id in account.certificates())


@pytest.mark.sample(2)
@pytest.mark.parametrize("fault", [*PASSING, "403"])
def test_a_fault_in_asking_why_a_thing_is_refused_costs_the_reason_at_the_most(
    unlucky: Unlucky, account: Account, limits: Limits, main: InProcess, fault: str
) -> None:
    limits(PROPAGATION_S=0.0)
    for command in ("create", "send"):
        unlucky.run(command)
    account.iot.update_certificate(certificateId=account.certificate_of("thing_1"), newStatus="INACTIVE")
    result = unlucky.run_into(DIAGNOSIS, PASSING.get(fault) or denied(DIAGNOSIS), "send", status=1)
    assert "thing_1" in "".join(line for line in result.err.splitlines() if ":ERROR - " in line)
    assert ("INACTIVE" in result.err) is (fault in PASSING)
    assert "what to do: " in result.err
    assert "Traceback" not in result.out + result.err
    assert "sent 1 message from 1 thing: 1 acknowledged, 0 lost" in result.err
    assert "INACTIVE" in unlucky.run("send", status=1).err
    unlucky.run("clean")
    assert account.is_empty()


# Answers that never came


@pytest.mark.parametrize("fault", [CUT_AFTER, INTERNAL_FAILURE._replace(is_forwarded=True)], ids=["cut", "500"])
def test_a_certificate_whose_answer_was_lost_is_named_until_it_is_gone(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy, limits: Limits, fault: Fault
) -> None:
    def certificate() -> str:
        return str(account.iot.create_keys_and_certificate(setAsActive=True)["certificateId"])

    earlier = certificate()
    time.sleep(3)  # AWS counts certificates in seconds
    proxy.inject("CreateKeysAndCertificate", fault)
    said = main("create", 2).err
    named = {account.certificate_of(name) for name in ("thing_0", "thing_1")}
    (lost,) = set(account.certificates()) - named - {earlier}
    told = "1 certificate request got no answer: up to 1 certificate without keys may exist"
    assert re.search(rf"{told}, from 20\d\d-.* UTC to 20\d\d-.* UTC", said)
    assert re.findall(r"certificate ([0-9a-f]{64}), ACTIVE, made at 20\d\d-\S+ \S+ UTC, is attached to", said) == [lost]
    assert lost in main("create", 2).err
    assert lost in main("send", *elf.to_broker, *ONCE).err
    assert lost in main("clean").err
    assert account.snapshot() == ([], {earlier: "ACTIVE", lost: "ACTIVE"}, [])
    assert lost in main("clean").err
    account.iot.update_certificate(certificateId=lost, newStatus="INACTIVE")
    account.iot.delete_certificate(certificateId=lost)
    limits(CONSISTENCY_S=0.0)
    assert "no such certificates found" in main("clean").err
    assert "no things to clean up" in main("clean").err
    assert elf.elf_json() == {}


# Answers that lack something


def answer(content: dict[str, Any]) -> Fault:
    headers = (("Content-Type", "application/json"), ("x-amzn-RequestId", "0"))
    return Fault(answer=Answer(200, json.dumps(content).encode(), headers))


@pytest.mark.parametrize(
    ("operation", "content", "lacking"),
    [
        ("DescribeEndpoint", {}, "endpointAddress"),
        ("CreateKeysAndCertificate", {"certificateArn": "arn"}, "certificateId"),
        ("ListThings", {"things": [{"thingArn": "arn"}]}, "things.thingName"),
        ("ListAttachedPolicies", {"policies": [{"policyArn": "arn"}]}, "policies.policyName"),
    ],
)
def test_an_answer_that_lacks_what_elf_needs_is_explained(
    main: InProcess,
    elf: Elf,
    proxy: HttpProxy,
    operation: str,
    content: dict[str, Any],
    lacking: str,
    explained: Explained,
) -> None:
    if operation in ("ListThings", "ListAttachedPolicies"):
        main("create")
        lose_keys(elf)
    proxy.inject(operation, answer(content), call=proxy.calls[operation] + 1, onwards=True)
    result = main("create", "--adopt", status=1)
    explained(result, "NotAws", proxy.url, f"no {lacking} in its answer to {operation}")


@pytest.mark.parametrize("operation", ["ListThings", "ListThingPrincipals"])
def test_a_list_that_aws_leaves_out_is_empty(main: InProcess, elf: Elf, proxy: HttpProxy, operation: str) -> None:
    main("create")
    lose_keys(elf)
    proxy.inject(operation, answer({}), call=proxy.calls[operation] + 1)
    assert "created 1 thing in region" in main("create", "--adopt").err


def test_a_list_of_certificates_without_a_date_is_read(main: InProcess, proxy: HttpProxy) -> None:
    proxy.inject("CreateKeysAndCertificate", CUT_BEFORE)
    proxy.inject("ListCertificates", answer({}))
    assert "no such certificates found" in main("create").err


def test_an_identity_without_an_account_is_explained(
    main: InProcess, elf: Elf, proxy: HttpProxy, explained: Explained
) -> None:
    main("create")
    (elf.misc / "elf.json").write_text(json.dumps({"elf_id": elf.elf_json()["elf_id"]}))  # as the original left it
    name = "GetCallerIdentity"
    body = f'<{name}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{name}Result/></{name}Response>'
    proxy.inject("POST /", Fault(answer=Answer(200, body.encode(), (("Content-Type", "text/xml"),))))
    explained(main("clean", status=1), "NotAws", "no Account in its answer to GetCallerIdentity")
    main("clean")
