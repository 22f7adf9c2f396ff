"""State that somebody forged is refused, and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.aws import Account
from support.failures import assert_explained
from support.shell import Elf, InProcess, Result

ONCE = ("--duration", "0.01")
CERTIFICATE = "a" * 64
ARN = f"arn:aws:iot:us-west-2:123456789012:cert/{CERTIFICATE}"
GOOD = {"certificateArn": ARN, "certificateId": CERTIFICATE}

HOSTILE_THINGS: list[Any] = [
    {"thing_0": {}},
    {"thing_0": {"elf_policy": "policy-thing_0"}},
    {"../../thing_0": GOOD},
    {"a/b": GOOD},
    {"thing_0\x1b[2J": GOOD},
    {"thing_0\n": GOOD},
    {"": GOOD},
    {"x" * 129: GOOD},
    {"thing_0": []},
    {"thing_0": 1},
    {"thing_0": {"certificateArn": 1, "certificateId": 1}},
    {"thing_0": {"certificateArn": ARN, "certificateId": "../" + CERTIFICATE}},
    {"thing_0": {"certificateArn": ARN.replace("us-west-2", "../../x"), "certificateId": CERTIFICATE}},
    {"thing_0": {"certificateArn": ARN + "\n", "certificateId": CERTIFICATE}},
    {"thing_0": {**GOOD, "elf_policy": "policy-thing_1"}},
    {"thing_0": {**GOOD, "elf_policy": {"a": 1}}},
    {
        "thing_0": {
            **GOOD,
            "elf_policy": "policy-thing_0",
            "elf_policy_arn": "arn:aws:iam::aws:policy/AdministratorAccess",
        }
    },
    {"thing_0": {**GOOD, "elf_policy_arn": 1}},
    {"thing_0": {**GOOD, "elf_stage": ["creating"]}},
    {"thing_0": {**GOOD, "elf_stage": "\x1b]0;title\x07"}},
    {"thing_0": {"elf_stage": "creating", "elf_asked": "yesterday"}},
    {"thing_0": {"elf_stage": "creating", "elf_asked": -1}},
    {"thing_0": {"elf_stage": "creating", "elf_asked": 1e300}},
    {"thing_0": {"elf_stage": "creating", "elf_asked": float("nan")}},
    {"thing_0": {"elf_stage": "creating", "elf_asked": float("inf")}},
    {"thing_0": {"elf_stage": "creating", "elf_asked": True}},
    {"thing_0": {**GOOD, "elf_future": 1}},
]
HOSTILE_TEXTS = [
    *(json.dumps([entry]) for entry in HOSTILE_THINGS),
    '[{"thing_0": ' * 50_000,
    '[{"thing_0": {"elf_asked": ' + "9" * 10_000 + "}}]",
    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    '{"version": 99, "things": []}',
    "null",
]


def assert_refused_in_two_lines(result: Result) -> None:
    assert_explained(result, "StateUnreadable")
    err = result.err
    assert err.count(":ERROR - ") == 2
    assert not [char for char in err if ord(char) < 32 and char != "\n"]


@pytest.mark.sample(2)
@pytest.mark.parametrize("command", ["create", "send", "clean"])
@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=range(len(HOSTILE_TEXTS)))
def test_a_forged_things_json_is_refused(
    main: InProcess, elf: Elf, account: Account, tmp_path: Path, text: str, command: str
) -> None:
    elf.misc.mkdir(mode=0o700)
    (elf.misc / "things.json").write_text(text)
    outside = sorted(tmp_path.rglob("*"))
    assert_refused_in_two_lines(main(command, status=1))
    assert (elf.misc / "things.json").read_text() == text
    assert sorted(tmp_path.rglob("*")) == outside
    assert account.is_empty()


@pytest.mark.parametrize(
    "content",
    [
        {"fleet": {"region": "../x"}},
        {"fleet": {"region": "us-west-2\x1b[2J"}},
        {"fleet": {"endpoint_url": "file:///etc/passwd"}},
        {"fleet": {"endpoint_url": "http://127.0.0.1:9/\nHost: x"}},
        {"fleet": {"account": 123456789012}},
        {"fleet": {"data_endpoint": "x y"}},
        {"fleet": {"data_endpoint": "localhost/../x"}},
        {"fleet": {"profile": "\x1b[31m"}},
        {"fleet": {"local": "yes"}},
        {"fleet": []},
        {"unanswered": 1},
        {"unanswered": [[1]]},
        {"unanswered": [[1, "x"]]},
        {"unanswered": [[-1, 1]]},
        {"unanswered": ["ab"]},
        {"elf_id": {"$ne": 1}},
    ],
    ids=str,
)
def test_a_forged_elf_json_is_refused(main: InProcess, elf: Elf, account: Account, content: Any) -> None:
    elf.misc.mkdir(mode=0o700)
    (elf.misc / "elf.json").write_text(json.dumps(content))
    assert_refused_in_two_lines(main("create", status=1))
    assert json.loads((elf.misc / "elf.json").read_text()) == content
    assert account.is_empty()
