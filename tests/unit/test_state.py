"""What misc/ says of the fleet is checked when it is read, survives a crash, and is repaired after one."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.program import constant

from iot_elf import places, state, storage
from iot_elf.errors import ElfError
from iot_elf.events import EventQueue
from iot_elf.places import Place
from iot_elf.state import CLEANING, CREATING, READY, Fleet, RecordedFleet, Thing, UnansweredRequest
from iot_elf.storage import StateDirectory

from .stand_ins import Clock, logged

HERE = "arn:aws:iot:us-west-2:123456789012"
ELF_ID = "urn:uuid:01234567-89ab-cdef-0123-456789abcdef"
KEYS = {"certificatePem": "PEM", "keyPair": {"PublicKey": "PUB", "PrivateKey": "PRV"}}


def recorded(number: int = 0, **more: Any) -> dict[str, Any]:
    """What things.json has of a thing."""
    return {"certificateArn": f"{HERE}:cert/c{number}", "certificateId": f"c{number}", **more}


def thing(number: int = 0, stage: str = READY, **more: Any) -> Thing:
    return Thing(f"thing_{number}", f"{HERE}:cert/c{number}", f"c{number}", stage=stage, **more)


@pytest.fixture(autouse=True)
def _no_waits_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def write(directory: Path, things: Any = None, elf: Any = None, journal: str | None = None) -> None:
    contents = {
        "things.json": None if things is None else json.dumps(things),
        "elf.json": None if elf is None else json.dumps(elf),
        "things.journal": journal,
    }
    for name, content in contents.items():
        if content is not None:
            (directory / name).write_text(content)
            (directory / name).chmod(0o600)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def private_files(directory: Path) -> dict[str, str]:
    files = [path for path in directory.iterdir() if path.suffix in (".pem", ".pub", ".prv")]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    return {path.name: path.read_text() for path in files}


# After a crash


@pytest.mark.parametrize(
    ("things", "journal", "repaired", "files", "unanswered"),
    [
        # changes that a crash left in the journal
        (
            [{"thing_0": recorded(0)}],
            json.dumps({"thing_1": recorded(1)}) + "\n" + json.dumps({"thing_0": None}) + "\n",
            [{"thing_1": recorded(1)}],
            {},
            None,
        ),
        # keys in things.json, where the original program kept them
        (
            [{"thing_0": {**recorded(0), **KEYS}}],
            None,
            [{"thing_0": recorded(0)}],
            {"thing_0.pem": "PEM", "thing_0.pub": "PUB", "thing_0.prv": "PRV"},
            None,
        ),
        # a request for a certificate whose answer never came
        (
            [{"thing_0": {"elf_stage": CREATING, "elf_asked": 990.0}}],
            None,
            [{"thing_0": {"elf_stage": CREATING}}],
            {},
            [[990.0, 1000.0]],
        ),
        # a key that only the journal has
        (
            [],
            json.dumps({"thing_0": {**recorded(0), **KEYS}}) + "\n",
            [{"thing_0": recorded(0)}],
            {"thing_0.pem": "PEM", "thing_0.pub": "PUB", "thing_0.prv": "PRV"},
            None,
        ),
    ],
)
def test_what_a_crash_left_behind_is_repaired_by_the_next_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    things: Any,
    journal: str | None,
    repaired: Any,
    files: Mapping[str, str],
    unanswered: Any,
) -> None:
    Clock(monkeypatch, state)
    write(tmp_path, things, {"elf_id": ELF_ID}, journal)
    with logged() as lines, Fleet(tmp_path).held("elf.py send", False, 0, EventQueue()):
        assert read(tmp_path / "things.json") == repaired
        assert private_files(tmp_path) == files
        assert read(tmp_path / "elf.json").get("unanswered") == unanswered
        assert not (tmp_path / "things.journal").exists()
    changes = (journal or "").count("\n")
    said = f"WARNING recovered {changes} change{'s' if changes > 1 else ''} from a run that was interrupted"
    assert lines == [said] * bool(changes)


def test_a_fleet_that_is_as_it_should_be_is_not_written(tmp_path: Path) -> None:
    write(tmp_path, [{"thing_0": recorded(0)}], {"elf_id": ELF_ID})
    before = {path: path.stat().st_ino for path in tmp_path.iterdir()}
    with logged() as lines, Fleet(tmp_path).held("elf.py send", False, 0, EventQueue()):
        assert {path: path.stat().st_ino for path in before} == before
    assert lines == []
    assert {*tmp_path.iterdir()} == {*before}


def test_a_fleet_that_can_not_be_written_is_read_and_not_repaired(tmp_path: Path) -> None:
    write(tmp_path, [{"thing_0": {**recorded(0), **KEYS}}])
    (tmp_path / ".lock").mkdir()  # which no command can open
    fleet = Fleet(tmp_path)
    with fleet.held("elf.py send", False, 0, EventQueue()):
        assert [*fleet.things] == ["thing_0"]
    assert private_files(tmp_path) == {}


@pytest.mark.parametrize(
    ("asked", "known", "unanswered"),
    [
        (990.0, [], [(990.0, 1000.0)]),
        (571.0, [], [(571.0, 1000.0)]),
        (569.0, [], [(569.0, 999.0)]),  # no call takes longer
        (990.0, [(1.0, 2.0)], [(1.0, 2.0), (990.0, 1000.0)]),
        (990.0, [(990.0, 995.0)], [(990.0, 995.0)]),  # an earlier repair was interrupted
        (1100.0, [], [(470.0, 1530.0)]),  # set back by less than that
        (4600.0, [], [(1.0, 5030.0)]),  # an hour ahead of the clock, which was set back
        (4600.0, [(1.0, 5030.0)], [(1.0, 5030.0)]),
    ],
)
def test_a_request_without_an_answer_ended_when_its_call_must_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: float, known: Any, unanswered: Any
) -> None:
    assert constant("MAX_CALL_S") == 430.0  # 10 attempts of 25 s, and 9 pauses of 20 s
    Clock(monkeypatch, state)
    write(tmp_path, [{"thing_0": {"elf_stage": CREATING, "elf_asked": asked}}], {"unanswered": known})
    fleet = Fleet(tmp_path)
    with fleet.locked(EventQueue()):
        assert fleet.unanswered == [UnansweredRequest(*times) for times in unanswered]
        assert fleet.things["thing_0"].certificate_requested_at is None


def test_keys_that_are_on_disk_are_not_overwritten_with_those_of_the_original(tmp_path: Path) -> None:
    things = [{"thing_0": {**recorded(0), **KEYS}}, {"thing_1": {**recorded(1), **KEYS, "elf_stage": CREATING}}]
    write(tmp_path, things)
    for number in range(2):
        (tmp_path / f"thing_{number}.prv").write_text("newer")
        (tmp_path / f"thing_{number}.prv").chmod(0o600)
    with Fleet(tmp_path).locked(EventQueue()):
        pass
    files = private_files(tmp_path)
    assert (files["thing_0.prv"], files["thing_1.prv"], files["thing_0.pub"]) == ("newer", "PRV", "PUB")


def test_unfinished_copies_are_removed_but_not_one_that_send_writes_without_a_lock(tmp_path: Path) -> None:
    write(tmp_path, [{"thing_0": recorded(0)}], {"elf_id": ELF_ID})
    for name in ("things.json", "thing_0.pem", "amazon-root-ca.pem"):
        (tmp_path / f".{name}.abcd_123.elf-half").touch()
    with Fleet(tmp_path).locked(EventQueue()):
        assert [path.name for path in tmp_path.glob(".*half")] == [".amazon-root-ca.pem.abcd_123.elf-half"]


# Recording


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced from now on, in order: the names of files, without their random part, or "directory"."""
    found: list[str] = []

    def witness(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        found.append("directory" if path.is_dir() else storage._UNFINISHED.sub(r"\1", path.name))

    monkeypatch.setattr(os, "fsync", witness)
    return found


def test_a_key_is_in_the_journal_before_it_is_in_its_file_and_there_before_things_json_replaces_it(
    tmp_path: Path, order: list[str]
) -> None:
    write(tmp_path, [{"thing_0": recorded(0)}])
    fleet = Fleet(tmp_path)
    with fleet.locked(EventQueue()):
        order.clear()
        fleet.record(thing(1), {**KEYS, "more": "not recorded"})
        assert order == ["things.journal", "thing_1.pem", "thing_1.pub", "thing_1.prv", "directory"]
        assert read(tmp_path / "things.journal") == {"thing_1": {**recorded(1), **KEYS}}
        assert fleet.things["thing_1"] == thing(1)
        order.clear()
    assert order == ["things.json", "directory"]
    assert read(tmp_path / "things.json") == [{"thing_0": recorded(0)}, {"thing_1": recorded(1)}]
    assert not (tmp_path / "things.journal").exists()


def test_what_could_not_be_recorded_is_not_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [{"thing_0": recorded(0)}])
    fleet = Fleet(tmp_path)
    with fleet.locked(EventQueue()):
        with monkeypatch.context() as patch:
            patch.setattr(storage.Journal, "append", fail)
            for change in (lambda: fleet.record(thing(1), KEYS), lambda: fleet.forget(fleet.things["thing_0"])):
                with pytest.raises(OSError, match="full"):
                    change()
        assert fleet.things == {"thing_0": thing(0)}
        assert private_files(tmp_path) == {}


def fail(*_: object) -> None:
    raise OSError(errno.ENOSPC, "full")


def test_a_change_without_a_lock_is_a_fault_of_the_program(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        Fleet(tmp_path).record(thing(0))


def test_changes_that_can_not_be_merged_stay_in_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [{"thing_0": recorded(0)}])
    fleet = Fleet(tmp_path)
    with monkeypatch.context() as patch, fleet.locked(EventQueue()):
        assert fleet.merge_journal()
        fleet.record(thing(1))
        patch.setattr(state, "write_private", fail)
        assert not fleet.merge_journal()
    assert read(tmp_path / "things.json") == [{"thing_0": recorded(0)}]
    assert Fleet(tmp_path).things == {"thing_0": thing(0), "thing_1": thing(1)}


def test_changes_are_merged_into_things_json_and_the_journal_is_empty(tmp_path: Path) -> None:
    write(tmp_path, [{"thing_0": recorded(0)}])
    fleet = Fleet(tmp_path)
    with fleet.locked(EventQueue()):
        fleet.record(thing(1))
        assert fleet.merge_journal()
        assert (tmp_path / "things.journal").read_bytes() == b""
        assert len(read(tmp_path / "things.json")) == 2


@pytest.mark.parametrize(
    ("it", "goes"),
    [
        (thing(0), True),
        (thing(0, CLEANING), True),
        (Thing("thing_0", stage=CLEANING), True),
        (thing(0, CREATING), True),
        (Thing("thing_0"), False),  # may be somebody else's, who has these files
    ],
)
def test_the_files_of_a_thing_go_with_it_if_they_are_its_own(tmp_path: Path, it: Thing, goes: bool) -> None:
    write(tmp_path, [{"thing_0": state.thing_entry(it)}])
    for suffix in ("pem", "pub", "prv"):
        (tmp_path / f"thing_0.{suffix}").touch(0o600)
    fleet = Fleet(tmp_path)
    with fleet.locked(EventQueue()):
        fleet.forget(it)
        assert read(tmp_path / "things.journal") == {"thing_0": None}
    assert fleet.things == {}
    assert len(private_files(tmp_path)) == (0 if goes else 3)
    assert not (tmp_path / "things.json").exists()


def test_requests_without_an_answer_are_remembered_until_they_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, state)
    write(tmp_path, [{"thing_0": {"elf_stage": CREATING}}])
    fleet = Fleet(tmp_path)
    with fleet.locked(EventQueue()):
        asked = fleet.record(fleet.things["thing_0"]._replace(certificate_requested_at=990.0))
        assert fleet.record_unanswered(asked).certificate_requested_at is None
        clock.now = 1010.0
        fleet.record_unanswered(fleet.things["thing_0"])
        assert [call[:2] for call in fleet.unanswered] == [(990.0, 1000.0), (1010.0, 1010.0)]
        assert read(tmp_path / "elf.json") == {"unanswered": [[990.0, 1000.0], [1010.0, 1010.0]]}
        fleet.forget_unanswered([])
        assert len(fleet.unanswered) == 2
        fleet.forget_unanswered(fleet.unanswered[:1])
        assert RecordedFleet(tmp_path).unanswered == [UnansweredRequest(1010.0, 1010.0)]
        fleet.forget_unanswered(fleet.unanswered)
        assert RecordedFleet(tmp_path).unanswered == []


# Where the fleet is


def test_a_place_is_recorded_once_and_forgotten_with_the_roots(tmp_path: Path) -> None:
    write(tmp_path, [{"thing_0": recorded(0)}], {"elf_id": ELF_ID, "was_local": True})
    (tmp_path / "amazon-root-ca.pem").touch(0o600)
    fleet = Fleet(tmp_path)
    place = Place(region="us-west-2", account="123456789012", endpoint_url="https://Iot", source="env")
    fleet.record_place(place)
    in_file = {"region": "us-west-2", "account": "123456789012", "endpoint_url": "https://iot"}
    assert read(tmp_path / "elf.json") == {"elf_id": ELF_ID, "fleet": in_file}
    number = (tmp_path / "elf.json").stat().st_ino
    fleet.record_place(place)
    assert (tmp_path / "elf.json").stat().st_ino == number
    assert RecordedFleet(tmp_path).place == place._replace(endpoint_url="https://iot", source=None)
    fleet.forget_place()
    assert read(tmp_path / "elf.json") == {"elf_id": ELF_ID}
    fleet.forget_place(and_id=True)
    assert read(tmp_path / "elf.json") == {}
    assert not (tmp_path / "amazon-root-ca.pem").exists()


def test_a_local_fleet_is_remembered_as_the_last_one_and_its_address_is_not(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.record_place(Place(region="us-west-2", endpoint_url="http://localhost:1", local=True))
    assert read(tmp_path / "elf.json") == {"fleet": {"region": "us-west-2", "local": True}}
    fleet.forget_place()
    assert read(tmp_path / "elf.json") == {"was_local": True}
    assert RecordedFleet(tmp_path).was_local


def test_without_a_recorded_place_any_certificate_tells_it(tmp_path: Path) -> None:
    assert RecordedFleet(tmp_path).place is None
    write(tmp_path, [{"a_0": {"elf_stage": CREATING}}, {"thing_0": recorded(0)}])
    assert RecordedFleet(tmp_path).place == Place(region="us-west-2", account="123456789012", partition="aws")
    write(tmp_path, [{"thing_0": {"elf_stage": CREATING}}])
    assert RecordedFleet(tmp_path).place is None


def in_place(number: int, old: str, new: str) -> dict[str, Any]:
    """What things.json has of a thing of another partition, region or account."""
    return {"certificateArn": f"{HERE}:cert/c{number}".replace(old, new), "certificateId": f"c{number}"}


ELSEWHERE = ("us-west-2", "eu-west-1")
OTHERS = ("123456789012", "210987654321")


@pytest.mark.parametrize(
    ("entries", "place", "journal", "names"),
    [
        ([], {}, [], ""),
        ([{"thing_0": recorded(0)}, {"thing_1": {"elf_stage": CREATING}}], {}, [], ""),
        ([{"thing_0": recorded(0)}], {"region": "us-west-2", "account": "123456789012"}, [], ""),
        ([{"thing_0": recorded(0)}], {"region": "us-west-2", "local": True}, [], ""),
        ([{"thing_0": recorded(0)}], {"region": "eu-west-1"}, [], "thing_0 of region us-west-2, eu-west-1"),
        ([{"thing_0": recorded(0)}], {"region": "us-west-2", "account": "210987654321"}, [], "thing_0 210987654321"),
        ([{"thing_0": recorded(0)}], {"region": "us-west-2", "partition": "aws-cn"}, [], "thing_0"),
        ([{"thing_0": in_place(0, "arn:aws:", "arn:aws-cn:")}], {}, [], "thing_0, partition aws-cn"),
        ([{"thing_0": in_place(0, "arn:aws:iot:us-west-2", "arn:aws-cn:iot:cn-north-1")}], {}, [], ""),
        ([{"thing_0": in_place(0, "us-west-2", "cn-north-1")}], {}, [], ""),  # an emulator's
        ([{"a_0": in_place(0, *ELSEWHERE)}, {"b_0": recorded(1)}], {}, [], "a_0 b_0 eu-west-1 us-west-2"),
        ([{"a_0": in_place(0, *OTHERS)}, {"b_0": recorded(1)}], {}, [], "a_0 b_0 123456789012 210987654321"),
        ([{"a_0": in_place(0, *ELSEWHERE)}, {"a_0": recorded(1)}], {}, [], "a_0 eu-west-1 us-west-2"),
        ([{"a_0": recorded(0)}], {}, [{"b_0": in_place(1, *ELSEWHERE)}], "a_0 b_0 eu-west-1 us-west-2"),
        ([{"a_0": recorded(0)}], {}, [{"a_0": in_place(1, *ELSEWHERE)}], "a_0 eu-west-1 us-west-2"),
        ([{"a_0": recorded(0)}], {}, [{"b_0": in_place(1, *ELSEWHERE)}, {"b_0": None}], ""),
    ],
)
def test_things_of_several_places_are_named_with_them(
    tmp_path: Path, entries: list[Any], place: dict[str, Any], journal: list[Any], names: str
) -> None:
    lines = "".join(json.dumps(entry) + "\n" for entry in journal)
    write(tmp_path, entries, {"fleet": place} if place else None, lines)
    found = RecordedFleet(tmp_path).disagreement
    assert bool(found) is bool(names)
    assert {*names.replace(",", "").split()} <= {*re.findall(r"[\w-]+", found.cause if found else "")}


def test_a_thing_that_is_in_things_json_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [{"thing_0": recorded(0)}, {"thing_0": recorded(0)}])
    assert len(RecordedFleet(tmp_path).things) == 1
    write(tmp_path, [{"thing_0": recorded(0)}, {"thing_0": recorded(1)}])
    with pytest.raises(ElfError, match="thing_0 is there twice"):
        RecordedFleet(tmp_path)


def test_a_request_is_recorded_with_its_place_which_an_earlier_elf_does_not_misread(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.record_place(place := Place("us-west-2", account="123456789012", data_endpoint="a1"))
    fleet.claim()
    with fleet.locked(EventQueue()):
        asked = fleet.record(Thing("thing_0", certificate_requested_at=time.time()))
        fleet.record_unanswered(asked)
        fleet.forget(fleet.things["thing_0"])
        fleet.forget_place(and_id=True)
    assert isinstance(read(tmp_path / "elf.json")["unanswered"][0], dict)  # [since, until] is what it reads
    again = RecordedFleet(tmp_path)
    assert (again.place, again.place_of_unanswered) == (None, place)
    assert again.unanswered == fleet.unanswered


@pytest.mark.parametrize(
    ("mine", "its", "same"),
    [
        (Place("r", account="1"), Place("r", account="1", profile="p"), True),
        (Place("r", account="1"), Place("r", account="2", data_endpoint="a"), False),
        (Place("r", account="1"), Place("s", account="1"), False),
        (Place("r", data_endpoint="a"), Place("r", data_endpoint="a", account="1"), True),
        (Place("r", data_endpoint="a"), Place("r", data_endpoint="b", account="1"), False),
        (Place("r", local=True), Place("r"), False),
        (Place("r", local=True), Place("r", local=True, account="1"), True),
    ],
)
def test_two_places_are_the_same_if_nothing_known_differs(mine: Place, its: Place, same: bool) -> None:
    assert mine.is_same(its) is its.is_same(mine) is same
    assert UnansweredRequest(1.0, 2.0, mine).is_in(its) is same
    assert UnansweredRequest(1.0, 2.0).is_in(its)


@pytest.mark.parametrize(
    ("date", "ahead_s"),
    [(-3600, -3600.0), (3600, 3600.0), (2, 0.0), (-2, 0.0), (None, 7.0), ("soon", 7.0)],
)
def test_aws_s_answers_tell_its_time(monkeypatch: pytest.MonkeyPatch, date: Any, ahead_s: float) -> None:
    now = Clock(monkeypatch, state).now
    clock = state.AwsClock()
    clock.ahead_s = 7.0
    headers = {} if date is None else {"date": date if isinstance(date, str) else formatdate(now + date, usegmt=True)}
    clock.note(SimpleNamespace(headers=headers), model="ignored")
    assert clock.now() == now + ahead_s


@pytest.mark.parametrize(
    ("given", "valid"),
    [
        ({"region": "US-West-2"}, {"region": "us-west-2"}),
        ({"region": "a"}, {"region": "a"}),
        ({"region": "a" * 63}, {"region": "a" * 63}),
        ({"region": "a" * 64}, None),
        ({"region": "us-west-"}, None),
        ({"region": "-us"}, None),
        ({"region": "us.west"}, None),
        ({"region": ""}, None),
        ({"profile": "My Profile"}, {"profile": "My Profile"}),
        ({"profile": "p" * 256}, {"profile": "p" * 256}),
        ({"profile": "p" * 257}, None),
        ({"profile": "a\nb"}, None),
        ({"endpoint_url": "HTTPS://IOT.Example.com/Path"}, {"endpoint_url": "https://iot.example.com/Path"}),
        ({"endpoint_url": "http://localhost:65535"}, {"endpoint_url": "http://localhost:65535"}),
        ({"endpoint_url": "http://localhost:65536"}, None),
        ({"endpoint_url": "http://localhost:0"}, None),
        ({"endpoint_url": "http://localhost:70000"}, None),
        ({"endpoint_url": "http://[::1]:80"}, {"endpoint_url": "http://[::1]:80"}),
        ({"endpoint_url": "ftp://localhost"}, None),
        ({"endpoint_url": "http://a b"}, None),
        ({"endpoint_url": "http://user:password@localhost"}, None),
        ({"account": "123456789012"}, {"account": "123456789012"}),
        ({"account": "12345678901"}, None),
        ({"account": "1234567890123"}, None),
        (
            {"data_endpoint": "ABC-ats.iot.us-west-2.amazonaws.com"},
            {"data_endpoint": "abc-ats.iot.us-west-2.amazonaws.com"},
        ),
        ({"data_endpoint": "a:b"}, None),
        ({"data_endpoint": "a" * 254}, None),
        ({}, {}),
    ],
)
def test_a_place_is_valid_and_in_lower_case_or_refused(given: dict[str, Any], valid: dict[str, Any] | None) -> None:
    if valid is not None:
        assert Place(**given).checked() == Place(**valid)
        return
    with pytest.raises(ElfError) as raised:
        Place(**given).checked()
    assert "password" not in raised.value.cause or "password@" not in raised.value.cause


AWS_URL = "https://iot.us-west-2.amazonaws.com"


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        (Place("r", local=True, endpoint_url="http://x"), "the embedded AWS IoT (--local), region r"),
        (Place("r", "p", AWS_URL, "1", "d", source="env"), "region r, account 1, profile p"),
        (Place("r", None, AWS_URL, source="env"), "region r, credentials from env"),
        (Place("r", None, "http://moto"), "region r, endpoint http://moto"),
        (Place(), ""),
    ],
)
def test_a_place_is_shown_with_what_tells_it_from_others(place: Place, shown: str) -> None:
    assert str(place) == shown


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (None, None),
        ({}, Place()),
        ({"region": "r", "local": True, "of_a_newer_elf": 1}, Place("r", local=True)),
        ({"local": "yes"}, ValueError),
        ({"region": "a b"}, ValueError),
        ({"region": 1}, TypeError),
        (["region"], TypeError),
        ("region", TypeError),
    ],
)
def test_a_recorded_place_is_read_or_refused(value: Any, place: Any) -> None:
    if isinstance(place, type):
        with pytest.raises(place):
            places.recorded_place(value)
    else:
        assert places.recorded_place(value) == place


# What is recorded of a thing


POLICY = {"elf_policy": "policy-thing_0", "elf_policy_arn": f"{HERE}:policy/policy-thing_0"}


@pytest.mark.parametrize(
    ("value", "it"),
    [
        (recorded(0), thing(0)),
        (recorded(0, **POLICY), thing(0, policy_name=POLICY["elf_policy"], policy_arn=POLICY["elf_policy_arn"])),
        (recorded(0, elf_stage=CLEANING), thing(0, CLEANING)),
        (recorded(0, more="of a newer AWS"), thing(0)),
        ({"elf_stage": CREATING}, Thing("thing_0")),
        ({"elf_stage": CLEANING}, Thing("thing_0", stage=CLEANING)),
        ({"elf_stage": CREATING, "elf_asked": 5}, Thing("thing_0", certificate_requested_at=5)),
        (recorded(0, **KEYS), thing(0)),
        ({"elf_stage": CREATING, "elf_policy": "policy-thing_0"}, Thing("thing_0", policy_name="policy-thing_0")),
        ({"elf_stage": CREATING, "elf_lost": [f"{HERE}:cert/c1"]}, Thing("thing_0", lost=(f"{HERE}:cert/c1",))),
    ],
)
def test_a_recorded_thing_is_read(value: dict[str, Any], it: Thing) -> None:
    assert state.recorded_thing("thing_0", value) == it
    assert state.recorded_thing("thing_0", state.thing_entry(it)) == it


@pytest.mark.parametrize(
    "value",
    [
        {},  # ready, without a certificate
        [],
        None,
        {"certificateArn": f"{HERE}:cert/c0"},
        {"certificateId": "c0", "elf_stage": CREATING},
        recorded(0, certificateId="c1"),
        recorded(0, certificateArn="arn:aws:iot:us-west-2:12:cert/c0"),
        recorded(0, certificateArn=5),
        recorded(0, elf_stage="retired"),
        recorded(0, elf_of_a_newer_elf=1),
        recorded(0, keyPair="k"),
        recorded(0, elf_policy="policy-thing_1"),
        recorded(0, elf_policy_arn="arn:aws:iot:us-west-2:123456789012:policy/other"),
        recorded(0, elf_policy="policy-thing_0", elf_policy_arn="arn:aws:iot:us-east-1:123456789012:policy/p"),
        recorded(0, elf_asked="yesterday"),
        recorded(0, elf_asked=0),
        recorded(0, elf_lost=f"{HERE}:cert/c1"),
        recorded(0, elf_lost=["c1"]),
        recorded(0, elf_lost=[1]),
        recorded(0, elf_lost=None),
    ],
)
def test_a_thing_that_elf_did_not_record_so_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="valid"):
        state.recorded_thing("thing_0", value)


def test_what_a_newer_elf_recorded_is_named_and_cut() -> None:
    for key, shown in (("elf_colour", "'elf_colour'"), ("elf_" + "x" * 200, "'elf_" + "x" * 134)):
        with pytest.raises(ValueError, match=f"^{shown} of thing_0 is not valid$"):
            state.recorded_thing("thing_0", recorded(0, **{key: 1, "elf_too": 2}))


@pytest.mark.parametrize(("name", "is_valid"), [("a" * 128, True), ("a" * 129, False), ("", False), ("a b", False)])
def test_a_thing_has_a_name_that_aws_allows(name: str, is_valid: bool) -> None:
    if is_valid:
        assert state.recorded_thing(name, recorded(0)).name == name
    else:
        with pytest.raises(ValueError, match="is not a valid thing"):
            state.recorded_thing(name, recorded(0))


@pytest.mark.parametrize(
    ("value", "time_s"),
    [(1, 1.0), (0.5, 0.5), (1.7e9, 1.7e9), (9.9e10, 9.9e10)]
    + [(value, None) for value in (0, -1, 1e11, True, "1", None, math.nan, math.inf)],
)
def test_a_recorded_time_is_a_time(value: Any, time_s: float | None) -> None:
    if time_s:
        assert state.recorded_time(value) == time_s
    else:
        with pytest.raises(ValueError, match="a time is not valid"):
            state.recorded_time(value)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("thing_0", "policy-thing_0"),
        ("a:b", "policy_a-b_" + "c01e4db33cd2b86d9ea1d19fd6c4b3e4"),
        ("a" * 128, "policy-" + "a" * 128),
    ],
)
def test_a_policys_name_is_that_of_its_thing(name: str, policy: str) -> None:
    if ":" not in name:
        assert state.policy_name(name) == policy
        return
    assert state.policy_name(name)[:-32] == policy[:-32]
    assert state.policy_name("a:b") != state.policy_name("a-b") != state.policy_name("a::b")
    assert len(state.policy_name("a:" * 64)) == 128


def test_things_are_in_the_order_of_their_numbers_whatever_the_order_of_their_changes(tmp_path: Path) -> None:
    write(tmp_path, [{f"thing_{number}": recorded(number)} for number in (10, 9)])
    (tmp_path / "things.journal").write_text(json.dumps({"thing_2": recorded(2)}) + "\n")
    fleet = RecordedFleet(tmp_path)
    assert [*fleet.things] == ["thing_2", "thing_9", "thing_10"]
    assert fleet.ready == [*fleet.things.values()]


def test_only_things_that_are_complete_are_ready(tmp_path: Path) -> None:
    stages = [CREATING, READY, CLEANING]
    write(tmp_path, [{f"thing_{n}": recorded(n, elf_stage=stage)} for n, stage in enumerate(stages)])
    assert RecordedFleet(tmp_path).ready == [thing(1)]


@pytest.mark.parametrize(
    ("entries", "names"),
    [([{"thing_0": None}], []), ([{}], None), ([{"a": None, "b": None}], None), (["thing_0"], None)],
)
def test_an_entry_is_one_thing(tmp_path: Path, entries: Any, names: list[str] | None) -> None:
    write(tmp_path, entries)
    if names is not None:
        assert [*RecordedFleet(tmp_path).things] == names
    else:
        with pytest.raises(ElfError, match=r"things\.json: an entry is not"):
            RecordedFleet(tmp_path)


@pytest.mark.parametrize(
    ("elf", "is_valid"),
    [
        ({}, True),
        ({"elf_id": ELF_ID}, True),
        ({"elf_id": ELF_ID[:-1]}, False),
        ({"elf_id": ELF_ID + "0"}, False),
        ({"elf_id": 5}, False),
        ({"unanswered": [[1, 2]]}, True),
        ({"unanswered": [[1]]}, False),
        ({"unanswered": [[1, 0]]}, False),
    ],
)
def test_what_elf_json_says_is_checked(tmp_path: Path, elf: Any, is_valid: bool) -> None:
    write(tmp_path, elf=elf)
    if is_valid:
        assert RecordedFleet(tmp_path).elf_id == elf.get("elf_id")
    else:
        with pytest.raises(ElfError, match=r"elf\.json"):
            RecordedFleet(tmp_path)


@pytest.mark.parametrize("journal", [json.dumps({"thing_1": recorded(1)}) + "\n", "{"])
def test_what_another_command_merges_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: str
) -> None:
    """Between things.json and the journal, which is empty then, or half written again."""
    write(tmp_path, [{"thing_0": recorded(0)}], {}, json.dumps({"thing_1": recorded(1)}) + "\n")
    merged, read_file = [{"thing_0": recorded(0)}, {"thing_1": recorded(1)}], storage.read_file

    def merge_before(path: Path) -> bytes:
        if path.name == "things.journal" and path.stat().st_size:
            storage.write_private(tmp_path / "things.json", json.dumps(merged))
            path.write_text("")
            return b"half\n" if journal == "{" else b""
        return read_file(path)

    monkeypatch.setattr(storage, "read_file", merge_before)
    assert list(RecordedFleet(tmp_path).things) == ["thing_0", "thing_1"]


def test_reading_ends_though_another_command_never_stops_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, [{"thing_0": recorded(0)}], {})
    versions = iter(range(100))
    monkeypatch.setattr(StateDirectory, "version", lambda its: next(versions))
    assert list(RecordedFleet(tmp_path).things) == ["thing_0"]
    (tmp_path / "things.json").write_text("{")
    with pytest.raises(ElfError, match="StateUnreadable"):
        RecordedFleet(tmp_path)


def test_a_things_files_are_not_those_of_another_whose_name_is_spelt_otherwise(tmp_path: Path) -> None:
    """macOS and Windows ignore the case of file names: one file has both names, as here."""
    write(tmp_path, [], {"elf_id": ELF_ID})
    fleet = Fleet(tmp_path)
    with fleet.locked(EventQueue()):
        fleet.record(Thing("lamp_0"))
        fleet.record(Thing("Lamp_0"))  # none has files yet
        fleet.record(thing()._replace(name="lamp_0"), KEYS)
        for suffix in ("pem", "pub", "prv"):
            (tmp_path / f"LAMP_0.{suffix}").hardlink_to(tmp_path / f"lamp_0.{suffix}")
        (tmp_path / "Lamp_0.prv").symlink_to("lamp_0.prv")
        before = private_files(tmp_path)
        for name, keys in (("LAMP_0", None), ("LAMP_0", KEYS), ("Lamp_0", KEYS)):
            with pytest.raises(ElfError, match="KeyFileTaken"):
                fleet.record(thing(1)._replace(name=name), keys)
        fleet.record(thing(2)._replace(name="lamp_0"), KEYS)  # its own may be replaced
    assert private_files(tmp_path) == before
    assert list(RecordedFleet(tmp_path).things) == ["Lamp_0", "lamp_0"]


def test_that_a_disk_keeps_nothing_private_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def commands() -> list[str]:
        with logged() as lines:
            for _ in range(2):
                fleet = Fleet(tmp_path)
                fleet.claim()
                with fleet.held("elf.py create", True, 0, EventQueue()), fleet.locked(EventQueue()):
                    fleet.open()
        return [line for line in lines if line.startswith("WARNING")]

    tmp_path.chmod(0o777)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "chmod", lambda path, mode: None)
        (said,) = commands()
        assert "can't keep other users from reading the keys" in said
        assert read(tmp_path / "elf.json")["exposed"] is True
        assert commands() == []
    (said,) = commands()  # on another disk
    assert "made private" in said
    assert "exposed" not in read(tmp_path / "elf.json")


def test_a_colon_in_a_things_name_is_a_plus_in_its_files(tmp_path: Path) -> None:
    names = [path.name for path in RecordedFleet(tmp_path).files("a:b_0")]
    assert names == ["a+b_0.pem", "a+b_0.pub", "a+b_0.prv"]


@pytest.mark.parametrize(("changed_at", "ago_s"), [(990, 10.0), (1010, 0.0), (None, math.inf)])
def test_when_the_things_last_changed_is_known_from_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed_at: int | None, ago_s: float
) -> None:
    Clock(monkeypatch, state)
    if changed_at:
        write(tmp_path, [])
        os.utime(tmp_path / "things.json", (changed_at, changed_at))
    assert RecordedFleet(tmp_path).changed_s_ago() == ago_s


# Whose the directory is


@pytest.mark.parametrize(
    ("names", "elf_id", "is_own"),
    [
        ([], None, True),
        (["notes.txt"], None, False),
        (["notes.txt"], ELF_ID, False),
        (["old_7.pem", "a+b_7.prv"], ELF_ID, True),  # of things that ELF has forgotten
        (["old_7.pem"], None, False),
        (["old.pem"], ELF_ID, False),
        (["thing_0.pem", "thing_0.pub", "thing_0.prv"], None, True),
        (["amazon-root-ca.pem"], ELF_ID, True),
        (["amazon-root-ca.pem"], None, True),  # `send` has written it for a fleet of the original's
        (["local/"], ELF_ID, False),
        (["local/", "local/ministack.log"], None, True),
        (["local/", "local/address.json"], None, True),
    ],
)
def test_a_directory_with_files_of_others_is_not_taken(
    tmp_path: Path, names: list[str], elf_id: str | None, is_own: bool
) -> None:
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    write(tmp_path, [{"thing_0": recorded(0)}], {"elf_id": elf_id} if elf_id else None)
    if is_own:
        Fleet(tmp_path).claim()
    else:
        with pytest.raises(ElfError, match="is not only ELF's"):
            Fleet(tmp_path).claim()


def test_a_file_of_the_name_of_elfs_roots_makes_no_directory_elfs(tmp_path: Path) -> None:
    (tmp_path / "amazon-root-ca.pem").touch()
    with pytest.raises(ElfError, match=r"is not only ELF's: .*amazon-root-ca\.pem"):
        Fleet(tmp_path).claim()


def test_a_directory_that_does_not_exist_is_made_and_claimed(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "misc")
    with fleet.locked(EventQueue()):
        assert not (tmp_path / "misc").exists()  # nobody has claimed it
    fleet.claim()
    with fleet.locked(EventQueue()):
        assert (tmp_path / "misc" / "things.journal").exists()


@pytest.mark.parametrize(
    ("name", "elf_id", "private", "said"),
    [
        ("things.json", ELF_ID, ["", "things.json"], True),
        ("things.json", None, ["", "things.json"], False),  # a new fleet's
        ("notes.txt", ELF_ID, ["things.json"], True),  # somebody else's directory too
    ],
)
def test_others_lose_their_access_to_elfs_files_and_to_a_directory_that_is_only_elfs(
    tmp_path: Path, name: str, elf_id: str | None, private: list[str], said: bool
) -> None:
    write(tmp_path, [{"thing_0": recorded(0)}], {"elf_id": elf_id} if elf_id else None)
    (tmp_path / name).touch()
    for path in (tmp_path, tmp_path / name, tmp_path / "things.json"):
        path.chmod(0o755)
    with logged() as lines, Fleet(tmp_path).held("elf.py send", True, 0, EventQueue()):
        pass
    mode: Callable[[str], int] = lambda of: stat.S_IMODE((tmp_path / of).stat().st_mode) & 0o77  # noqa: E731
    assert [it for it in ("", "things.json", "notes.txt") if (tmp_path / it).exists() and not mode(it)] == private
    assert bool(lines) is said


def test_an_elf_id_is_made_once(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    with logged() as lines:
        fleet.open()
        fleet.open()
    assert state.ELF_ID.fullmatch(fleet.elf_id or "")
    assert read(tmp_path / "elf.json") == {"elf_id": fleet.elf_id}
    assert [line.rpartition(": ")[0] for line in lines] == [
        "INFO Wrote new ELF ID to config",
        "INFO Read ELF ID from config",
    ]


NAMES = ["Lamp_0", "hall:lamp_0", "lamp-a_0", "thing_0", "thing_1", "thing_2", "thing_10", "thing_11"]


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ([], NAMES),
        (["*"], NAMES),
        ([3], NAMES[:3]),
        (["thing_10", "thing_0", "thing_10"], ["thing_0", "thing_10"]),
        (["thing_1*"], ["thing_1", "thing_10", "thing_11"]),
        (["thing_1?"], ["thing_10", "thing_11"]),
        (["thing_[!0-1]"], ["thing_2"]),
        (["*lamp*"], ["hall:lamp_0", "lamp-a_0"]),  # upper and lower case are different, as for AWS
        ([1, "thing_0", "*:*"], ["Lamp_0", "hall:lamp_0", "thing_0"]),
        ([9], ("TooFewThings", "--things 9 ", "8")),
        (["thing_9"], ("NoSuchThing", "thing_9", "thing_0, thing_1, thing_2, thing_10")),
        (["thing_0", "thing_9", "x*"], ("NoSuchThing", "x*, thing_9")),
        (["thing"], ("NoSuchThing", "thing")),
        ([""], ("NoSuchThing", "no thing named ''")),
        (["thing_[0"], ("NoSuchThing", "thing_[0")),
        (["half_0"], ("NoSuchThing", "not complete: half_0")),
        (["half_*"], ("NoSuchThing", "not complete: half_0")),
    ],
)
def test_things_are_chosen_by_number_name_and_pattern_as_a_shell_does(
    wanted: list[int | str], chosen: list[str] | tuple[str, ...]
) -> None:
    if isinstance(chosen, list):
        assert state.choose(NAMES, wanted) == chosen
        return
    with pytest.raises(ElfError) as raised:
        state.choose(NAMES, wanted, incomplete=["half_0"])
    name, *facts = chosen
    assert raised.value.name == name
    assert all(fact in f"{raised.value.cause}; {raised.value.remedy}" for fact in facts)


def test_many_names_are_chosen_in_a_moment() -> None:
    names = [f"thing_{number}" for number in range(100_000)]
    began = time.process_time()
    assert state.choose(names, names[::2]) == names[::2]
    assert time.process_time() - began < 5
