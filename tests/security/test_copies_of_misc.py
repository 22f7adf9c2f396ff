"""Copies and backups of misc/, and a misc/ that is lost: nothing is taken over, or deleted, without being asked for."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from support.aws import REGION, Account
from support.failures import failure_of
from support.http_proxy import HANG_AFTER, Answer, Fault, HttpProxy, denied
from support.machine import PATIENCE_S
from support.shell import Elf, InProcess, Result, assert_whole

ONCE = ("--duration", "0.01")
OTHER_ID = "urn:uuid:00000000-0000-4000-8000-000000000000"


def told(result: Result, command: str) -> list[str]:
    """The arguments of a command with --adopt that ELF has told."""
    found = re.search(rf"elf\.py ((--misc-dir \S+ )?{command} [^`]*--adopt[^`]*)`", result.err)
    assert found, result.err
    return shlex.split(found[1])


class Misc:
    """What misc/ is at some time, to be put back."""

    def __init__(self, elf: Elf, directory: Path) -> None:
        self._misc, self.copy = elf.misc, directory
        shutil.copytree(elf.misc, directory)

    def restore(self) -> None:
        shutil.rmtree(self._misc)
        shutil.copytree(self.copy, self._misc)


# Copies


def test_copies_that_were_made_after_a_clean_have_an_elf_id_each(
    main: InProcess, elf: Elf, account: Account, tmp_path: Path
) -> None:
    main("create")
    main("clean")
    copy = Misc(elf, tmp_path / "copy").copy
    main("create", 2)
    before = account.snapshot()
    assert failure_of(main("create", 2, "--misc-dir", copy, "--output", "json", status=1)) == "ThingOfOthers"
    main("clean", "--misc-dir", copy)
    assert account.snapshot() == before
    main("clean")
    assert account.is_empty()


def test_a_copy_leaves_alone_what_the_other_one_made_since(
    main: InProcess, elf: Elf, account: Account, tmp_path: Path
) -> None:
    main("create")
    copy = Misc(elf, tmp_path / "copy").copy
    main("create", 3)
    before, elf_id = account.snapshot(), elf.elf_json()["elf_id"]
    refused = main("create", 2, "--misc-dir", copy, "--output", "json", status=1)
    assert failure_of(refused) == "ThingsUnknown"
    assert all(fact in refused.err for fact in ("thing_1, thing_2", elf_id, "another copy of misc/"))
    assert account.snapshot() == before
    assert failure_of(main("create", 3, "--misc-dir", copy, "--prefix", "lamp", "--output", "json", status=1))
    left = main("clean", "--misc-dir", copy, "--output", "json", status=1)
    assert failure_of(left) == "ThingsUnknown"
    assert account.things() == ["thing_1", "thing_2"]
    assert json.loads((copy / "elf.json").read_text()) == {"elf_id": elf_id}
    main(*told(left, "clean"))
    assert account.is_empty()
    assert json.loads((copy / "elf.json").read_text()) == {}


def test_a_copy_that_adopts_has_new_keys_and_names_the_number_that_takes_all(
    main: InProcess, elf: Elf, account: Account, tmp_path: Path
) -> None:
    main("create")
    copy = Misc(elf, tmp_path / "copy").copy
    main("create", 3)
    old = account.certificates()
    assert failure_of(main("create", 2, "--adopt", "--misc-dir", copy, "--output", "json", status=1)) == "ThingsUnknown"
    assert account.certificates() == old
    refused = main("create", 2, "--misc-dir", copy, status=1)
    main(*told(refused, "create"))
    elf.misc = copy
    assert_whole(elf, account, 3)
    assert len(old.keys() & account.certificates().keys()) == 1


def test_a_thing_that_a_copy_has_half_made_keeps_the_certificate_that_the_other_gave_it(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy, tmp_path: Path
) -> None:
    proxy.inject("CreateKeysAndCertificate", denied("CreateKeysAndCertificate"))
    main("create", status=1)
    copy = Misc(elf, tmp_path / "copy").copy
    main("create")
    before = account.snapshot()
    for command in ("create", "clean"):
        refused = main(command, "--misc-dir", copy, "--output", "json", status=1)
        assert failure_of(refused) == "ThingsUnknown"
        assert account.snapshot() == before
    main(*told(refused, "clean"))
    assert account.is_empty()


# Backups


@pytest.mark.sample(3)
@pytest.mark.parametrize("has_sent", [False, True], ids=["", "sent"])
@pytest.mark.parametrize("same_id", [False, True], ids=["another ID", "the same ID"])
def test_of_a_backup_from_before_a_new_fleet_all_is_said_and_cleaned(
    main: InProcess, elf: Elf, account: Account, tmp_path: Path, same_id: bool, has_sent: bool
) -> None:
    main("create", 2)
    if has_sent:
        main("send", *elf.to_broker, *ONCE)
    backup = Misc(elf, tmp_path / "backup")
    main("clean", *(["--only-local"] if same_id else []))
    main("create", 2, *(["--adopt"] if same_id else []))
    if has_sent:
        main("send", *elf.to_broker, *ONCE)
    elf_id, before = elf.elf_json()["elf_id"], account.snapshot()
    backup.restore()
    os.utime(elf.misc / "things.json", (0, 0))  # what was made lately is tried again for a while
    for command in (("create", 2), ("create", 3), ("send", *elf.to_broker, *ONCE), ("clean",)):
        refused = main(*command, "--output", "json", status=1)
        assert told(refused, "clean") == ["clean", "--adopt", elf_id]
        assert failure_of(refused) == "ThingsReplaced"
        assert account.snapshot() == before
    main("clean", "--adopt", elf_id)
    assert account.is_empty()
    assert elf.elf_json() == {}


def test_a_backup_of_which_aws_has_nothing_is_made_again_or_cleaned(
    main: InProcess, elf: Elf, account: Account, tmp_path: Path
) -> None:
    main("create", 2)
    backup = Misc(elf, tmp_path / "backup")
    main("clean")
    backup.restore()
    assert "missing in AWS, creating again" in main("create", 2).err
    assert_whole(elf, account, 2)
    main("clean")
    assert account.is_empty()


def test_a_thing_whose_certificate_its_owner_replaced_does_not_keep_others_waiting(
    main: InProcess, elf: Elf, account: Account
) -> None:
    main("create", 2)
    certificate = elf.recorded()["thing_0"]
    iot = account.iot
    iot.detach_thing_principal(thingName="thing_0", principal=certificate["certificateArn"])
    iot.update_certificate(certificateId=certificate["certificateId"], newStatus="INACTIVE")
    iot.delete_certificate(certificateId=certificate["certificateId"])
    new = iot.create_keys_and_certificate(setAsActive=True)
    iot.attach_thing_principal(thingName="thing_0", principal=new["certificateArn"])
    assert "thing_0: AWS has another certificate" in main("create", 3).err
    assert account.certificate_of("thing_0") == new["certificateId"]
    assert "clean --adopt" in main("clean", status=1).err
    assert list(elf.recorded()) == ["thing_0"]
    main("clean", "--adopt")
    assert account.is_empty()


# A misc/ that is lost


def test_a_lost_misc_is_adopted_or_cleaned_by_its_elf_id(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", 2)
    elf_id = elf.elf_json()["elf_id"]
    shutil.rmtree(elf.misc)
    assert failure_of(main("clean", "--adopt", elf_id, "--output", "json", status=1)) == "PlaceUnknown"
    assert failure_of(main("create", 2, "--adopt", OTHER_ID, "--output", "json", status=1)) == "NothingToAdopt"
    assert "elf_id" not in (elf.elf_json() if (elf.misc / "elf.json").exists() else {})
    main("create", 2, "--adopt", elf_id.removeprefix("urn:uuid:"))
    assert_whole(elf, account, 2)
    assert elf.elf_json()["elf_id"] == elf_id
    main("create", 2, "--adopt", elf_id)
    shutil.rmtree(elf.misc)
    main("clean", "--adopt", elf_id, "--region", REGION)
    assert account.is_empty()
    assert elf.elf_json() == {}
    assert "no things to clean up" in main("clean", "--adopt", elf_id, "--region", REGION).err


def test_things_of_two_elf_ids_are_not_mixed(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", 1, "--prefix", "lamp", "--misc-dir", elf.cwd)
    main("create")
    lamps = json.loads((elf.cwd / "elf.json").read_text())["elf_id"]
    before = account.snapshot()
    assert failure_of(main("create", "--adopt", lamps, "--output", "json", status=1)) == "OtherElfId"
    assert account.snapshot() == before
    main("clean", "--adopt", lamps)
    assert account.is_empty()


@pytest.mark.parametrize("command", ["create", "clean"])
def test_without_an_elf_id_nothing_can_be_adopted(main: InProcess, account: Account, command: str) -> None:
    result = main(command, "--adopt", "--region", REGION, "--output", "json", status=1 if command == "clean" else 0)
    assert failure_of(result) == ("NoElfId" if command == "clean" else "")


@pytest.mark.parametrize("option", [(), ("--adopt",)], ids=["", "adopt"])
def test_what_only_things_json_has_lost_keeps_its_certificates(
    main: InProcess, elf: Elf, account: Account, option: tuple[str, ...]
) -> None:
    main("create", 3)
    main("send", *elf.to_broker, *ONCE)
    before, recorded = account.snapshot(), {name: thing["certificateArn"] for name, thing in elf.recorded().items()}
    (elf.misc / "things.json").unlink()
    main("create", 3, *option)
    assert account.snapshot() == before
    assert_whole(elf, account, 3)
    main("send", *elf.to_broker, *ONCE)
    assert {name: thing["certificateArn"] for name, thing in elf.recorded().items()} == recorded
    assert account.snapshot() == before
    main("clean")
    assert account.is_empty()


@pytest.mark.parametrize("lost", ["pem", "prv", "another's pem", "another's prv", "no PEM"])
def test_a_certificate_whose_key_is_not_in_misc_is_not_taken_up(
    main: InProcess, elf: Elf, account: Account, lost: str
) -> None:
    main("create", 2)
    before, path = account.snapshot(), elf.misc / f"thing_0.{lost.split()[-1].lower()}"
    path.unlink()
    if "another" in lost:
        shutil.copy(path.with_stem("thing_1"), path)
    elif lost == "no PEM":
        path.write_text("nothing")
    (elf.misc / "things.json").unlink()
    refused = main("create", 2, "--output", "json", status=1)
    assert failure_of(refused) == "ThingsUnknown"
    assert "misc/ lacks: thing_0;" in refused.err
    assert account.snapshot() == before
    assert elf.recorded() == {}
    main("create", 2, "--adopt")
    assert_whole(elf, account, 2)


def test_a_clean_without_things_json_says_what_is_left(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", 2)
    before = account.snapshot()
    (elf.misc / "things.json").unlink()
    left = main("clean", "--output", "json", status=1)
    assert failure_of(left) == "ThingsUnknown"
    assert account.snapshot() == before
    main(*told(left, "clean"))
    assert account.is_empty()
    assert elf.files() == ["elf.json"]


# The ELF ID


def test_after_only_local_the_elf_id_stays_and_its_things_are_adopted_when_asked(
    main: InProcess, elf: Elf, account: Account
) -> None:
    main("create", 2)
    elf_id, before = elf.elf_json()["elf_id"], account.snapshot()
    main("clean", "--only-local")
    assert elf.elf_json() == {"elf_id": elf_id}
    for options in ((), ("--prefix", "lamp")):
        assert failure_of(main("create", 2, *options, "--output", "json", status=1)) == "ThingsUnknown"
    assert account.snapshot() == before
    main("create", 2, "--adopt")
    assert_whole(elf, account, 2)
    assert not before[1].keys() & account.certificates().keys()


@pytest.mark.parametrize("operation", ["ListThings", "DeleteThing"])
def test_the_elf_id_stays_until_aws_confirms_that_all_is_deleted(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy, operation: str
) -> None:
    main("create")
    elf_json = elf.elf_json()
    proxy.inject(operation, denied(operation), onwards=True)
    assert f"AWS denies iot:{operation}" in main("clean", status=1).err
    assert elf.elf_json() == elf_json
    proxy.reset()
    main("clean")
    assert elf.elf_json() == {}
    assert account.is_empty()


def test_a_list_of_things_that_is_out_of_date_does_not_count(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy
) -> None:
    main("create", 2)
    main("clean", "--only-local")
    things: list[Any] = [{"thingName": "thing_0"}, {"thingName": "thing_7"}]
    body = json.dumps({"things": things}).encode()
    late = Fault(answer=Answer(200, body, (("Content-Type", "application/json"), ("x-amzn-RequestId", "1"))))
    main("clean", "--adopt", "--region", REGION)
    assert elf.elf_json() == {}
    main("create")
    proxy.inject("ListThings", late, call=proxy.calls["ListThings"] + 1)
    main("clean")
    assert elf.elf_json() == {}
    assert account.is_empty()


# Interruptions


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("command", "operation"),
    [
        *(("create", name) for name in ("UpdateCertificate", "DeleteCertificate", "AttachThingPrincipal")),
        *(("clean", name) for name in ("UpdateCertificate", "DeleteCertificate", "DeleteThing")),
    ],
)
def test_an_adoption_that_is_killed_goes_on(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy, command: str, operation: str
) -> None:
    main("create")
    main("clean", "--only-local")
    arguments = (command, "--adopt", "--region", REGION)
    proxy.inject(operation, HANG_AFTER, call=proxy.calls[operation] + 1)
    window = elf.start(*arguments)
    proxy.await_hang(PATIENCE_S)
    window.signal(signal.SIGKILL)
    window.end(-signal.SIGKILL)
    proxy.release()
    proxy.await_quiet(PATIENCE_S)
    proxy.reset()
    main(*arguments)
    if command == "create":
        assert_whole(elf, account, 1)
        main("clean")
    assert account.is_empty()
