"""What AWS has of an ELF and misc/ lacks: which commands are told, and how many things are looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

from iot_elf import adoption
from iot_elf.places import Place
from iot_elf.state import Fleet

ID = "urn:uuid:01234567-89ab-cdef-0123-456789abcdef"
OTHER_ID = ID.replace("0", "f")
ARN = "arn:aws:iot:eu-west-1:123456789012:thing/thing_0"


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    monkeypatch.setenv("ELF_MISC_DIR", str(tmp_path))
    fleet = Fleet(tmp_path)
    fleet.elf_id = ID
    return fleet


@pytest.mark.parametrize(
    ("lacking", "wanted", "adopt", "local", "create"),
    [
        ({"thing_0"}, {"thing_0", "thing_1"}, "", False, "create 2 --prefix thing --adopt --region r"),
        ({"thing_9"}, {"thing_0"}, "", False, "create 10 --prefix thing --adopt --region r"),
        ({"lamp_9"}, {"thing_0"}, "", False, "create 1 --prefix thing --adopt --region r"),
        ({"a:b_1"}, {"a:b_0"}, OTHER_ID, False, f"create 2 --prefix a:b --adopt {OTHER_ID} --region r"),
        ({"thing_1"}, {"thing_0"}, "", True, "create 2 --prefix thing --adopt --local"),
        ({"thing_1"}, set(), "", False, None),
    ],
)
def test_the_commands_that_adopt_are_told_whole(
    fleet: Fleet, lacking: set[str], wanted: set[str], adopt: str, local: bool, create: str | None
) -> None:
    error = adoption.things_unknown(lacking, fleet, adopt, Place("r", local=local), wanted)
    assert adopt or ID in error.cause
    assert (f"elf.py {create}`" in error.remedy) is bool(create)
    assert ("create" in error.remedy) is bool(create)
    options = " ".join(part for part in ("--adopt", adopt, "--local" if local else "--region r") if part)
    assert f"elf.py clean {options}`" in error.remedy


@pytest.mark.parametrize("count", [0, 1, 10, 11, 1000])
def test_no_more_than_a_sample_is_looked_at(count: int) -> None:
    looked = adoption._spread(range(count))
    assert len(looked) == min(count, adoption.SAMPLE)
    assert not looked or looked[-1] >= count * 0.9 - 1
    assert sorted({*looked}) == list(looked)


@pytest.mark.parametrize(
    ("place", "adopt", "names", "command"),
    [
        (Place("r"), None, [], None),
        (Place(local=True), None, [], None),
        (Place(), None, [], "clean --region R"),
        (Place(), None, ["thing_1", "lamp_*"], "clean thing_1 'lamp_*' --region R"),
        (Place(), "", [], "clean --adopt --region R"),
        (Place(), ID, [], f"clean --adopt {ID} --region R"),
    ],
)
def test_a_region_that_nothing_tells_is_asked_for(
    fleet: Fleet, place: Place, adopt: str | None, names: list[str], command: str | None
) -> None:
    if not command:
        adoption.refuse_unknown_place(fleet, place, adopt, names)
        return
    with pytest.raises(adoption.ElfError) as raised:
        adoption.refuse_unknown_place(fleet, place, adopt, names)
    assert f"elf.py {command}`" in raised.value.remedy
