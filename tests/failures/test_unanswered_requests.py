"""Requests for certificates whose answer never came: where and when that was, whatever the clock and the fleet do."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
from support.aws import REGION, Account
from support.http_proxy import CUT_AFTER, HttpProxy
from support.program import Limits
from support.shell import Elf, InProcess

from iot_elf import state


@pytest.mark.parametrize("ahead_s", [3600, -3600])
def test_a_clock_that_was_wrong_while_it_was_asked_hides_no_certificate(
    main: InProcess, account: Account, proxy: HttpProxy, monkeypatch: pytest.MonkeyPatch, ahead_s: int
) -> None:
    proxy.inject("CreateKeysAndCertificate", CUT_AFTER)
    with monkeypatch.context() as patch:
        patch.setattr(state, "time", SimpleNamespace(time=lambda: time.time() + ahead_s))
        main("create")
    (lost,) = account.certificates().keys() - {account.certificate_of("thing_0")}
    assert lost in main("clean").err
    assert lost in main("clean").err


def test_a_request_that_is_said_to_come_was_made_before_now(main: InProcess, elf: Elf, account: Account) -> None:
    """An ELF that was killed had recorded it by a clock that was an hour fast."""
    main("create")
    lost = account.iot.create_keys_and_certificate(setAsActive=True)["certificateId"]
    (entry,) = json.loads((elf.misc / "things.json").read_text())
    asked = {"thing_1": {"elf_stage": "creating", "elf_asked": time.time() + 3600}}
    (elf.misc / "things.json").write_text(json.dumps([entry, asked]))
    assert lost in main("create", 2).err
    (call,) = elf.elf_json()["unanswered"]
    assert call["since"] < time.time() < call["until"]
    assert (call["place"]["region"], call["place"]["account"]) == (REGION, account.id)


def test_a_fleet_elsewhere_does_not_look_for_what_was_asked_here(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy, limits: Limits
) -> None:
    limits(CONSISTENCY_S=0.0)
    proxy.inject("CreateKeysAndCertificate", CUT_AFTER)
    main("create")
    (lost,) = account.certificates().keys() - {account.certificate_of("thing_0")}
    main("clean")
    theirs = account.client("iot", "eu-west-1").create_keys_and_certificate(setAsActive=True)["certificateId"]
    said = main("create", "--region", "eu-west-1").err
    assert f"in region {REGION}, account {account.id}" in said
    assert not {lost, theirs} & {*said.replace(",", "").split()}
    main("clean")
    assert account.things("eu-west-1") == []
    assert lost in main("clean").err  # without a fleet, there where it was asked
    account.iot.update_certificate(certificateId=lost, newStatus="INACTIVE")
    account.iot.delete_certificate(certificateId=lost)
    assert "no such certificates found" in main("clean").err
    assert elf.elf_json() == {}


def test_only_local_says_that_it_forgets_requests(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy
) -> None:
    proxy.inject("CreateKeysAndCertificate", CUT_AFTER)
    main("create")
    said = main("clean", "--only-local").err
    assert "1 certificate request got no answer: up to 1 certificate without keys may exist" in said
    assert f"in region {REGION}, account {account.id}" in said
    assert "these requests are forgotten now" in said
    assert [*elf.elf_json()] == ["elf_id"]
