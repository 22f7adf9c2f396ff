"""AWS takes its time, slows its callers down, leaves fields out of answers: ELF waits, says so, and can be stopped."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from typing import Any

import pytest
from support.aws import Account
from support.http_proxy import CUT_BEFORE, THROTTLED, Answer, Fault, HttpProxy, aws_error
from support.program import Limits
from support.shell import Elf, InProcess

from iot_elf.aws import run_parallel
from iot_elf.events import EventQueue

ONCE = ("--duration", "0.01")
STOPPED_WITHIN_S = 3.0  # less than ELF waits for calls under way at Ctrl-C
IN_USE = {
    "DeletePolicy": aws_error(409, "DeleteConflictException", "The policy is attached to one or more resources."),
    "DeleteCertificate": aws_error(409, "DeleteConflictException", "Things must be detached before deletion."),
    "DeleteThing": aws_error(400, "InvalidRequestException", "Cannot delete. Thing thing_0 is still attached."),
}


# A signal


def unanswered(elf: Elf) -> list[Any]:
    return list(elf.elf_json().get("unanswered", []))


def test_a_signal_ends_the_wait_for_a_turn_and_no_call_counts_as_sent_that_was_not(elf: Elf, account: Account) -> None:
    window = elf.start("create", 60, "--rate", "0.1", "--verbose")
    window.await_line("Thing:'thing_[0-9]+' associated")
    window.signal(signal.SIGTERM)
    signalled = time.monotonic()
    result = window.end(143)
    assert time.monotonic() - signalled < STOPPED_WITHIN_S
    assert "got no answer" not in result.err
    recorded = elf.things()
    assert {thing["certificateId"] for thing in recorded.values() if "certificateId" in thing} == set(
        account.certificates()
    )
    assert set(account.things()) <= set(recorded)
    cleaned = elf("clean", "--rate", "200")
    assert "got no answer" not in cleaned.err
    assert unanswered(elf) == []
    assert account.is_empty()


def test_a_signal_ends_the_pause_after_a_throttled_call_for_a_certificate(
    elf: Elf, account: Account, proxy: HttpProxy
) -> None:
    proxy.inject("CreateKeysAndCertificate", THROTTLED, onwards=True)
    window = elf.start("create", 3)
    window.await_line("CreateKeysAndCertificate: AWS is busy: trying again")
    window.signal(signal.SIGTERM)
    signalled = time.monotonic()
    window.end(143)
    assert time.monotonic() - signalled < STOPPED_WITHIN_S
    proxy.reset()
    assert "got no answer" not in elf("clean").err
    assert account.is_empty()


# What AWS has not done yet


@pytest.mark.parametrize("operation", IN_USE)
def test_what_counts_as_attached_for_a_while_is_waited_for_and_said_once(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy, operation: str
) -> None:
    main("create", 2)
    main("send", *elf.broker, *ONCE)
    for call in (1, 2):  # of which each may be another thing's
        proxy.inject(operation, IN_USE[operation], call=call)
    before = proxy.calls[operation]
    said = main("clean").err
    assert proxy.calls[operation] - before > 2
    assert len(re.findall(f"{operation}: still attached according to AWS: .* up to 300 s", said)) == 1
    assert account.is_empty()


def test_things_that_wait_hold_up_no_others(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy, limits: Limits
) -> None:
    limits(CALLS_IN_FLIGHT=1)
    main("create", 3)
    main("send", *elf.broker, *ONCE)
    proxy.inject("DeletePolicy", IN_USE["DeletePolicy"])
    said = main("clean", "--verbose").err
    order = re.findall(r"Thing:'(thing_\d)' cleaned up", said)
    assert order[-1] == "thing_0"
    assert sorted(order) == ["thing_0", "thing_1", "thing_2"]
    assert account.is_empty()


def test_a_lost_certificate_that_waits_to_be_deleted_is_not_left_behind(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy
) -> None:
    main("create")
    main("clean", "--only-local")
    proxy.inject("DeleteCertificate", IN_USE["DeleteCertificate"])
    assert "trying again" in main("create").err
    assert list(account.certificates()) == [elf.things()["thing_0"]["certificateId"]]
    main("clean")
    assert account.is_empty()


def test_a_refusal_that_outlasts_what_aws_says_blames_nobody(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy, limits: Limits
) -> None:
    limits(CONSISTENCY_S=0.5)
    main("create")
    main("send", *elf.broker, *ONCE)
    proxy.inject("DeletePolicy", IN_USE["DeletePolicy"], onwards=True)
    said = main("clean", status=1).err
    assert "thing_0: AWS refuses to delete it: The policy is attached to one or more resources." in said
    assert "what to do: run the same command again later: AWS lists nothing else that uses it" in said
    proxy.reset()
    main("clean")
    assert account.is_empty()


def test_a_signal_ends_the_wait_for_what_aws_has_not_done_yet(elf: Elf, account: Account, proxy: HttpProxy) -> None:
    elf("create")
    elf("send", *elf.broker, *ONCE)
    proxy.inject("DeletePolicy", IN_USE["DeletePolicy"], onwards=True)
    window = elf.start("clean")
    window.await_line("trying again for up to 300 s")
    window.signal(signal.SIGINT)
    signalled = time.monotonic()
    window.end(130)
    assert time.monotonic() - signalled < STOPPED_WITHIN_S
    proxy.reset()
    elf("clean")
    assert account.is_empty()


@pytest.mark.parametrize(
    "attached", ["a certificate to the policy", "a thing to the certificate", "a certificate to the thing"]
)
def test_somebody_else_whom_aws_names_is_named_at_once(
    main: InProcess, elf: Elf, account: Account, attached: str
) -> None:
    main("create", 2)
    main("send", *elf.broker, *ONCE)
    iot = account.iot
    arn = elf.things()["thing_0"]["certificateArn"]
    theirs = iot.create_keys_and_certificate(setAsActive=False)["certificateArn"]
    iot.create_thing(thingName="theirs")
    user, detach = {
        "a certificate to the policy": (
            theirs,
            lambda: iot.detach_policy(policyName="policy-thing_0", target=theirs),
        ),
        "a thing to the certificate": (
            "thing theirs",
            lambda: iot.detach_thing_principal(thingName="theirs", principal=arn),
        ),
        "a certificate to the thing": (
            theirs,
            lambda: iot.detach_thing_principal(thingName="thing_0", principal=theirs),
        ),
    }[attached]
    if attached == "a certificate to the policy":
        iot.attach_policy(policyName="policy-thing_0", target=theirs)
    elif attached == "a thing to the certificate":
        iot.attach_thing_principal(thingName="theirs", principal=arn)
    else:
        iot.attach_thing_principal(thingName="thing_0", principal=theirs)
    said = main("clean", status=1).err
    assert re.search(rf"thing_0: AWS refuses to delete \S+: it is attached to {user}$", said, re.MULTILINE)
    assert "trying again" not in said
    assert "what to do: detach it there if nobody needs it, then run the same command again" in said
    assert list(elf.things()) == ["thing_0"]
    detach()
    main("clean")
    assert account.things() == ["theirs"]
    assert list(account.certificates()) == [theirs.rpartition("/")[2]]


def test_an_edited_policy_that_others_use_keeps_its_versions(main: InProcess, elf: Elf, account: Account) -> None:
    main("create")
    main("send", *elf.broker, *ONCE)
    account.edit_policy("policy-thing_0", lambda statements: statements.pop())
    theirs = account.iot.create_keys_and_certificate(setAsActive=False)["certificateArn"]
    account.iot.attach_policy(policyName="policy-thing_0", target=theirs)
    main("clean", status=1)
    assert len(account.iot.list_policy_versions(policyName="policy-thing_0")["policyVersions"]) == 2


def test_what_was_just_made_is_waited_for_until_aws_finds_it(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy
) -> None:
    missing = aws_error(404, "ResourceNotFoundException", "The certificate given in the principal does not exist.")
    proxy.inject("AttachThingPrincipal", missing)
    proxy.inject("AttachPolicy", missing)
    said = main("create").err + main("send", *elf.broker, *ONCE).err
    for operation in ("AttachThingPrincipal", "AttachPolicy"):
        assert f"{operation}: not visible in AWS yet: trying again for up to 10 s" in said
    assert len(account.certificates()) == len(account.policies()) == 1
    main("clean")
    assert account.is_empty()


# Limits


def test_a_limit_of_the_account_is_met_once_a_thing_and_stops_the_rest(
    main: InProcess, account: Account, proxy: HttpProxy
) -> None:
    proxy.inject("CreateThing", aws_error(410, "LimitExceededException", "No more things."), onwards=True)
    began = time.monotonic()
    said = main("create", 300, status=1).err
    assert time.monotonic() - began < 10.0
    assert "the account's limit is reached: No more things." in said
    assert f"{proxy.calls['CreateThing']} of 300 things failed" in said
    assert proxy.calls["CreateThing"] < 300
    assert account.things() == []


def test_throttling_is_said_once(main: InProcess, account: Account, proxy: HttpProxy) -> None:
    for call in range(1, 5):
        proxy.inject("CreateThing", THROTTLED, call=call)
        proxy.inject("AttachThingPrincipal", THROTTLED, call=call)
    said = main("create", 4).err
    assert len(re.findall("AWS throttles CreateThing: slowing down", said)) == 1
    assert said.count("throttles") == 1
    assert len(account.things()) == 4


# Answers that lack something


def answer(content: dict[str, Any]) -> Fault:
    return Fault(answer=Answer(200, json.dumps(content).encode(), (("Content-Type", "application/json"),)))


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
    main: InProcess, elf: Elf, proxy: HttpProxy, operation: str, content: dict[str, Any], lacking: str
) -> None:
    if operation in ("ListThings", "ListAttachedPolicies"):
        main("create")
        (elf.misc / "things.json").unlink()
    proxy.inject(operation, answer(content), call=proxy.calls[operation] + 1, onwards=True)
    said = main("create", status=1).err
    assert f"the server at {proxy.url} (no {lacking} in its answer to {operation}) is not AWS IoT" in said
    assert "KeyError" not in said


@pytest.mark.parametrize("operation", ["ListThings", "ListThingPrincipals"])
def test_a_list_that_aws_leaves_out_is_empty(main: InProcess, elf: Elf, proxy: HttpProxy, operation: str) -> None:
    main("create")
    (elf.misc / "things.json").unlink()
    proxy.inject(operation, answer({}), call=proxy.calls[operation] + 1)
    assert "created 1 thing in region" in main("create").err


def test_a_step_that_is_stopped_leaves_no_thread_behind(module: Any) -> None:
    """Threads wait for work without using the processor, and end with the loop."""
    before = threading.active_count()
    inbox = EventQueue()
    assert dict(run_parallel(inbox, range(50), lambda number: number * 2)) == {n: 2 * n for n in range(50)}
    assert threading.active_count() == before


def test_a_list_of_certificates_without_a_date_is_read(main: InProcess, proxy: HttpProxy) -> None:
    proxy.inject("CreateKeysAndCertificate", CUT_BEFORE)
    proxy.inject("ListCertificates", answer({}))
    assert "none found" in main("create").err


def test_an_identity_without_an_account_is_explained(main: InProcess, elf: Elf, proxy: HttpProxy) -> None:
    main("create")
    (elf.misc / "elf.json").write_text(json.dumps({"elf_id": elf.elf_json()["elf_id"]}))  # as the original left it
    name = "GetCallerIdentity"
    body = f'<{name}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{name}Result/></{name}Response>'
    proxy.inject("POST /", Fault(answer=Answer(200, body.encode(), (("Content-Type", "text/xml"),))))
    assert "(no Account in its answer to GetCallerIdentity) is not AWS IoT" in main("clean", status=1).err
    main("clean")
