"""AWS takes its time: ELF waits for what it has not done yet, and says so once."""

from __future__ import annotations

import re

import pytest
from support.aws import Account
from support.http_proxy import HttpProxy, aws_error
from support.program import Limits
from support.shell import Elf, InProcess

ONCE = ("--duration", "0.01")
IN_USE = {
    "DeletePolicy": aws_error(409, "DeleteConflictException", "The policy is attached to one or more resources."),
    "DeleteCertificate": aws_error(409, "DeleteConflictException", "Things must be detached before deletion."),
    "DeleteThing": aws_error(400, "InvalidRequestException", "Cannot delete. Thing thing_0 is still attached."),
}


@pytest.mark.parametrize("operation", IN_USE)
def test_clean_waits_for_what_aws_still_counts_as_attached_and_says_so_once(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy, operation: str
) -> None:
    main("create", 2)
    main("send", *elf.to_broker, *ONCE)
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
    main("send", *elf.to_broker, *ONCE)
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
    assert "trying again" in main("create", "--adopt").err
    assert list(account.certificates()) == [elf.recorded()["thing_0"]["certificateId"]]
    main("clean")
    assert account.is_empty()


def test_a_refusal_to_delete_what_nothing_uses_asks_to_try_later(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy, limits: Limits
) -> None:
    limits(CONSISTENCY_S=0.5)
    main("create")
    main("send", *elf.to_broker, *ONCE)
    proxy.inject("DeletePolicy", IN_USE["DeletePolicy"], onwards=True)
    said = main("clean", status=1).err
    assert "thing_0: AWS refuses to delete it: The policy is attached to one or more resources." in said
    assert "what to do: run the same command again later: AWS lists nothing else that uses it" in said
    proxy.reset()
    main("clean")
    assert account.is_empty()


def test_what_was_just_made_is_waited_for_until_aws_finds_it(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy
) -> None:
    missing = aws_error(404, "ResourceNotFoundException", "The certificate given in the principal does not exist.")
    proxy.inject("AttachThingPrincipal", missing)
    proxy.inject("AttachPolicy", missing)
    said = main("create").err + main("send", *elf.to_broker, *ONCE).err
    for operation in ("AttachThingPrincipal", "AttachPolicy"):
        assert f"{operation}: not visible in AWS yet: trying again for up to 10 s" in said
    assert len(account.certificates()) == len(account.policies()) == 1
    main("clean")
    assert account.is_empty()


def test_a_thing_that_somebody_changes_while_it_is_deleted_is_looked_at_again(
    main: InProcess, account: Account, proxy: HttpProxy
) -> None:
    main("create")
    proxy.reset()
    account.iot.update_thing(thingName="thing_0", attributePayload={"attributes": {"color": "red"}, "merge": True})
    proxy.inject("DeleteThing", aws_error(409, "VersionConflictException", "The version does not match."))
    assert "DeleteThing: changed meanwhile: trying again" in main("clean").err
    assert proxy.calls["DescribeThing"] == 2
    assert account.is_empty()
