"""The IAM policy that the README prints: enough for every command, and not larger than it needs to be."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from harness import ROOT, Account, Elf, InProcess

ONCE = ("--duration", "0.01")

# The commands that need an action; the last one is where its lack shows.
NEEDED_BY = {
    "iot:DescribeEndpoint": ["create"],
    "iot:CreateThing": ["create"],
    "iot:CreateKeysAndCertificate": ["create"],
    "iot:AttachThingPrincipal": ["create"],
    "iot:CreatePolicy": ["create", "send"],
    "iot:AttachPolicy": ["create", "send"],
    "iot:GetPolicy": ["create", "send again"],
    "iot:DetachPolicy": ["create", "send", "clean"],
    "iot:DeletePolicy": ["create", "send", "clean"],
    "iot:UpdateCertificate": ["create", "clean"],
    "iot:DetachThingPrincipal": ["create", "clean"],
    "iot:DeleteCertificate": ["create", "clean"],
    "iot:DeleteThing": ["create", "clean"],
}


def policy_of_the_readme() -> dict[str, Any]:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## On AWS\n")[1].split("\n## ")[0]
    match = re.search(r"^```json\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
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
    policy = policy_of_the_readme()
    assert {statement["Effect"] for statement in policy["Statement"]} == {"Allow"}
    assert sorted(actions_of(policy)) == sorted(NEEDED_BY)


def test_the_policy_is_enough_for_every_command(elf: Elf, account: Account) -> None:
    elf.environment |= account.user(policy_of_the_readme())
    elf("create", 2)
    window = elf.subscribe("--count", 2)
    elf("send", *elf.broker, "--append-thing-name", *ONCE)
    window.end()
    elf("create", 3)
    elf("send", *elf.broker, *ONCE)
    elf("clean")
    assert account.is_empty()


@pytest.mark.parametrize("action", NEEDED_BY)
def test_the_policy_is_not_larger_than_needed(main: InProcess, elf: Elf, account: Account, action: str) -> None:
    *before, last = NEEDED_BY[action]
    for command in before:
        main(command, *(elf.broker + ONCE if command == "send" else ()))
    if last == "send again":  # where the policy is there already, such as after a crash between two steps
        main("send", *elf.broker, *ONCE)
        things = json.loads((elf.misc / "things.json").read_text())
        for key in ("elf_policy", "elf_policy_arn"):
            del things[0]["thing_0"][key]
        (elf.misc / "things.json").write_text(json.dumps(things))
        last = "send"
    policy = policy_of_the_readme()
    main.use(account.user(without(policy, action)))
    arguments = elf.broker + ONCE if last == "send" else ()
    denied = main(last, *arguments, status=1)
    assert "AWS denies it" in denied.err
    assert action in denied.err

    main.use(account.user(policy))
    main(last, *arguments)
    main("clean")
    assert account.is_empty()
