"""What `list` shows of a fleet: from what is on disk, and whatever else is at work there."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable

import pytest
from support.aws import REGION, Account
from support.machine import PATIENCE_S, kill_servers_of
from support.shell import Elf, InProcess, Pair

JSON = ("--output", "json")


def test_list_shows_the_things_and_where_they_live(pair: Pair) -> None:
    result = pair("list")
    head, *rows, where = result.out.splitlines()
    assert result.err == ""
    assert head.split() == ["NAME", "CERTIFICATE", "POLICY", "SINCE", "(UTC)"]
    for name, row in zip(("thing_0", "thing_1"), rows, strict=True):
        since = time.strftime("%Y-%m-%d %H:%M", time.gmtime((pair.misc / f"{name}.prv").stat().st_mtime))
        certificate = pair.account.certificate_of(name)[:8]
        assert re.split("  +", row) == [name, certificate, f"policy-{name}", since]
    assert where.startswith(f"2 things in region {REGION}, account {pair.account.id}, endpoint http://")
    assert max(map(len, (head, *rows))) <= 80


def test_list_in_json_has_an_object_a_thing_and_the_summary(pair: Pair) -> None:
    *things, summary = map(json.loads, pair("list", *JSON).out.splitlines())
    assert things == [
        {
            "event": "thing",
            "thingName": name,
            "certificateId": pair.account.certificate_of(name),
            "policyName": f"policy-{name}",
            "stage": "ready",
            "since": (pair.misc / f"{name}.prv").stat().st_mtime,
        }
        for name in ("thing_0", "thing_1")
    ]
    assert summary.pop("endpointUrl").startswith("http://")
    assert summary == {
        **{"event": "summary", "command": "list", "exitStatus": 0, "things": 2},
        **{"local": False, "localRuns": False, "region": REGION, "account": pair.account.id},
    }


def test_of_no_things_list_says_what_to_do(elf: Elf) -> None:
    assert elf("list").out == f"no things yet; now: {elf.typed} --local create 3\n"
    assert not elf.misc.exists()
    assert json.loads(elf("list", *JSON).out)["things"] == 0


def test_list_asks_nobody(elf: Elf, witness: Callable[[str], list[str]]) -> None:
    elf("create")
    asked = len(witness("connect"))
    elf("list", env={"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": ""})
    assert asked
    assert len(witness("connect")) == asked


def test_list_waits_for_no_other_elf_and_keeps_none_waiting(elf: Elf, account: Account) -> None:
    window = elf.start("create", 40, "--verbose")
    window.await_line("associated with cert")
    listed = elf("list").out
    assert re.search(r"^thing_\d+ +[0-9a-f]{8} +-", listed, re.MULTILINE)
    window.end()
    assert len(elf("list").out.splitlines()) == 42
    assert len(account.things()) == 40


def test_list_works_where_nothing_can_be_written(pair: Pair) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in pair.misc.iterdir()}
    pair.misc.chmod(0o500)
    try:
        assert "thing_1" in pair("list").out
    finally:
        pair.misc.chmod(0o700)
    assert {path.name: path.stat().st_mtime_ns for path in pair.misc.iterdir()} == before


def test_list_tells_what_is_not_complete(elf: Elf) -> None:
    elf("create", 2)
    entries = json.loads((elf.misc / "things.json").read_text())
    entries += [{"thing_2": {"elf_stage": "creating"}}]
    (elf.misc / "things.json").write_text(json.dumps(entries))
    (elf.misc / "thing_1.prv").unlink()
    rows = [re.split("  +", row) for row in elf("list").out.splitlines()[2:4]]
    assert [row[3] for row in rows] == ["no key", "creating"]
    assert rows[1][:3] == ["thing_2", "-", "-"]


def test_list_says_whether_the_embedded_aws_iot_runs(local: Elf) -> None:
    local("--local", "create")
    assert local("list").out.endswith("1 thing in the embedded AWS IoT (--local), region us-west-2, running\n")
    kill_servers_of(local)
    deadline = time.monotonic() + PATIENCE_S
    while "not running" not in (out := local("list").out):
        assert time.monotonic() < deadline, out
    assert json.loads(local("list", *JSON).out.splitlines()[-1])["localRuns"] is False


def test_list_refuses_what_is_not_elfs(main: InProcess, elf: Elf) -> None:
    elf.misc.mkdir()
    (elf.misc / "things.json").write_text("{}")
    assert f"could not read {elf.misc / 'things.json'}: " in main("list", status=1).err


@pytest.mark.skipif(os.name == "nt", reason="Windows shows any path")
def test_list_shows_a_path_that_the_terminal_has_no_characters_for(elf: Elf) -> None:
    out = elf("--misc-dir", elf.cwd / "\u017e", "list", env={"PYTHONIOENCODING": "ascii"}).out
    assert "\\u017e" in out
