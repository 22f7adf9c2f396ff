"""The IAM policy that docs/aws.md prints: enough for every command, and not larger than it needs to be."""

from __future__ import annotations

import json
import os
import re
import time
from typing import Any, NamedTuple

import pytest
from support.aws import Account
from support.failures import Explained
from support.program import ROOT, Limits
from support.shell import Elf, InProcess, Result

ONCE = ("--duration", "0.01")


class Need(NamedTuple):
    """Where an action is needed: in which command, after what, and that command's exit status without it."""

    command: str
    after: tuple[str, ...] = ()
    status: int = 1


ADOPT = Need("create --adopt", after=("create", "clean --only-local"))
SEND = Need("send", after=("create",))
NAMED = Need("send --client-id {thing_name}", after=("create", "send", "earlier policies"))
CLEAN = Need("clean", after=("create", "send"))
CLEAN_EDITED = Need("clean", after=("create", "send", "edit a policy"))

NEEDED_BY = {
    "iot:DescribeEndpoint": Need("create"),
    "iot:CreateThing": Need("create"),
    "iot:CreateKeysAndCertificate": Need("create"),
    "iot:AttachThingPrincipal": Need("create"),
    "iot:ListThings": Need("clean", after=("create",)),  # which asks for things of the same ELF ID
    "iot:ListThingPrincipals": ADOPT,
    "iot:ListPrincipalThings": ADOPT,
    "iot:ListAttachedPolicies": ADOPT,
    "iot:ListCertificates": Need("create", after=("create", "lose an answer"), status=0),
    "iot:CreatePolicy": SEND,
    "iot:CreatePolicyVersion": NAMED,
    "iot:AttachPolicy": SEND,
    "iot:GetPolicy": Need("send", after=("create", "send", "lose the record of a policy")),
    "iot:DescribeThing": CLEAN,
    "iot:DescribeCertificate": Need("create", after=("create", "delete the thing")),
    "iot:DetachPolicy": CLEAN,
    "iot:DeletePolicy": CLEAN,
    "iot:ListTargetsForPolicy": CLEAN_EDITED,
    "iot:ListPolicyVersions": CLEAN_EDITED,
    "iot:DeletePolicyVersion": CLEAN_EDITED,
    "iot:UpdateCertificate": CLEAN,
    "iot:DetachThingPrincipal": CLEAN,
    "iot:DeleteCertificate": CLEAN,
    "iot:DeleteThing": CLEAN,
}
DIAGNOSIS = "iot:DescribeCertificate"  # without it, ELF says less exactly why a broker refuses a thing, too


def policy_of_the_page() -> dict[str, Any]:
    page = (ROOT / "docs" / "aws.md").read_text(encoding="utf-8")
    match = re.search(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert match
    return dict(json.loads(match[1]))


def actions_of(policy: dict[str, Any]) -> list[str]:
    return [action for statement in policy["Statement"] for action in statement["Action"]]


def without(policy: dict[str, Any], action: str) -> dict[str, Any]:
    statements = [
        {**statement, "Action": [other for other in statement["Action"] if other != action]}
        for statement in policy["Statement"]
    ]
    return {**policy, "Statement": [statement for statement in statements if statement["Action"]]}


def test_the_policy_names_single_actions_and_only_allows() -> None:
    policy = policy_of_the_page()
    assert {statement["Effect"] for statement in policy["Statement"]} == {"Allow"}
    assert sorted(actions_of(policy)) == sorted(NEEDED_BY)


def test_the_policy_is_enough_for_every_command(elf: Elf, account: Account) -> None:
    elf.environment |= account.iam_user(policy_of_the_page())
    elf("create", 2)
    window = elf.subscribe("--count", 2)
    elf("send", *elf.to_broker, "--append-thing-name", *ONCE)
    window.end()
    elf("create", 3)
    elf("send", *elf.to_broker, *ONCE)
    elf("clean")
    assert account.is_empty()


class LimitedUser:
    """A user who has the policy of the page, or less."""

    def __init__(self, main: InProcess, elf: Elf, account: Account) -> None:
        self.elf, self._main, self._account = elf, main, account
        self.policy = policy_of_the_page()
        self.may(self.policy)

    def may(self, policy: dict[str, Any]) -> None:
        self._main.use(self._account.iam_user(policy))

    def run(self, command: str, status: int = 0) -> Result:
        arguments = (*self.elf.to_broker, *ONCE) if command.startswith("send") else ()
        return self._main(*command.split(), *arguments, status=status)

    def prepare(self, step: str) -> None:
        if step == "lose the record of a policy":  # as a crash between two steps does
            (entry,) = json.loads((self.elf.misc / "things.json").read_text())
            for key in ("elf_policy", "elf_policy_arn"):
                del entry["thing_0"][key]
            (self.elf.misc / "things.json").write_text(json.dumps([entry]))
        elif step == "delete the thing":
            (principal,) = self._account.iot.list_thing_principals(thingName="thing_0")["principals"]
            self._account.iot.detach_thing_principal(thingName="thing_0", principal=principal)
            self._account.iot.delete_thing(thingName="thing_0")
        elif step == "earlier policies":
            self._account.use_earlier_policies(self.elf.misc)
        elif step == "edit a policy":
            self._account.edit_policy("policy-thing_0", lambda statements: statements.pop())
        elif step == "lose an answer":
            asked = {"unanswered": [[time.time() - 120, time.time() - 60]]}
            (self.elf.misc / "elf.json").write_text(json.dumps(self.elf.elf_json() | asked))
        else:
            self.run(step)


@pytest.fixture
def limited_user(main: InProcess, elf: Elf, account: Account) -> LimitedUser:
    return LimitedUser(main, elf, account)


@pytest.mark.sample(3)
@pytest.mark.parametrize("action", NEEDED_BY)
def test_the_policy_is_not_larger_than_needed(limited_user: LimitedUser, account: Account, action: str) -> None:
    need = NEEDED_BY[action]
    for step in need.after:
        limited_user.prepare(step)
    limited_user.may(without(limited_user.policy, action))
    denied = limited_user.run(need.command, status=need.status)
    assert re.search(rf"AWS denies {action} to arn:aws:iam::{account.id}:user/user-[0-9]+: ", denied.err)
    assert "Traceback" not in denied.err

    limited_user.may(limited_user.policy)
    assert "denies" not in limited_user.run(need.command).err
    limited_user.run("clean")
    assert account.is_empty()


def test_without_describe_thing_the_owner_of_a_name_is_not_known(
    limited_user: LimitedUser, account: Account, explained: Explained
) -> None:
    account.iot.create_thing(thingName="thing_0")
    limited_user.may(without(limited_user.policy, "iot:DescribeThing"))
    explained(limited_user.run("create", status=1), "AccessDenied", "iot:DescribeThing")
    limited_user.may(limited_user.policy)
    explained(limited_user.run("create", status=1), "ThingOfOthers", "thing_0")
    assert account.snapshot() == (["thing_0"], {}, [])


def test_without_describe_certificate_a_refusal_is_told_less_exactly(
    limited_user: LimitedUser, account: Account, limits: Limits, explained: Explained
) -> None:
    limits(POLICY_CHANGE_S=2.0)
    for command in ("create", "send"):
        limited_user.run(command)
    account.iot.update_certificate(certificateId=account.certificate_of("thing_0"), newStatus="INACTIVE")
    os.utime(limited_user.elf.misc / "things.json", (0, 0))  # what was made lately is tried again for a while
    limited_user.may(without(limited_user.policy, DIAGNOSIS))
    denied = limited_user.run("send", status=1)
    explained(denied, "ConnectRefused", "thing_0", "localhost:")
    assert "thing_0: the broker refuses iot:Connect, and AWS gives no reason; trying again for up to" in denied.err
    assert "INACTIVE" not in denied.err
    limited_user.may(limited_user.policy)
    explained(limited_user.run("send", status=1), "CertificateNotActive", "thing_0", "INACTIVE")
