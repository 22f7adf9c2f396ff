"""What `list` shows of a fleet: from what is on disk, and whatever else is at work there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.aws import REGION, Account, AwsService
from support.failures import Explained
from support.machine import PATIENCE_S, kill_servers_of
from support.mqtt import Client
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


def test_list_shows_all_that_another_client_needs_to_be_a_thing(
    main_of_pair: InProcess, pair: Pair, service: AwsService, explained: Explained
) -> None:
    shown, summary = map(json.loads, main_of_pair("list", "thing_1", *JSON).out.splitlines())
    endpoint = pair.account.iot.describe_endpoint(endpointType="iot:Data-ATS")["endpointAddress"]
    assert (shown["thingName"], shown["broker"]) == ("thing_1", f"{endpoint.partition(':')[0]}:8883")
    assert shown["certificate"] == str(pair.misc / "thing_1.pem")
    assert shown["privateKey"] == str(pair.misc / "thing_1.prv")
    assert Path(shown["rootCertificate"]).read_text().startswith("-----BEGIN")
    assert shown["policyName"] == "policy-thing_1"
    for client_id in [each.replace("*", "another") for each in shown["clientIds"]]:
        client = Client(service, pair.misc / "thing_1.pem", pair.misc / "thing_1.prv", client_id)
        assert client.connect() == "Success"
        client.close()
    assert shlex.split(shown["mosquittoPub"])[:3] == ["mosquitto_pub", "-h", endpoint.partition(":")[0]]
    lines = main_of_pair("list", "thing_1").out.splitlines()
    assert lines[-1] == shown["mosquittoPub"]
    assert max(map(len, lines[:-1])) <= 79 + len(str(pair.misc))
    assert "no thing" not in json.dumps(summary)
    explained(main_of_pair("list", "thing_2", *JSON, status=1), "NoSuchThing", "thing_2", "thing_0, thing_1")


def test_several_things_or_a_pattern_are_shown_as_a_table_of_those(
    main_of_pair: InProcess, pair: Pair, explained: Explained
) -> None:
    for names, listed in ((("thing_1", "thing_0"), ["thing_0", "thing_1"]), (("*_1",), ["thing_1"])):
        head, *rows, where = main_of_pair("list", *names).out.splitlines()
        assert head.startswith("NAME ")
        assert [row.split()[0] for row in rows] == listed
        assert where.startswith(f"{len(listed)} of 2 things in region ")
        *things, summary = map(json.loads, main_of_pair("list", *names, *JSON).out.splitlines())
        assert ([each["thingName"] for each in things], summary["things"]) == (listed, len(listed))
    explained(main_of_pair("list", "thing_0", "lamp_*", *JSON, status=1), "NoSuchThing", "lamp_*", "thing_0, thing_1")


def test_no_command_is_shown_for_a_thing_that_can_not_connect(main: InProcess, elf: Elf, explained: Explained) -> None:
    explained(main("list", "thing_0", *JSON, status=1), "NoThings", "create")
    main("create")
    (elf.misc / "thing_0.prv").unlink()
    explained(main("list", "thing_0", *JSON, status=1), "KeyMissing", "thing_0.prv", "backup")
    entries = [*json.loads((elf.misc / "things.json").read_text()), {"thing_1": {"elf_stage": "creating"}}]
    (elf.misc / "things.json").write_text(json.dumps(entries))
    explained(main("list", "thing_1", *JSON, status=1), "NoSuchThing", "not complete: thing_1", "thing_0")


def test_before_the_first_send_list_says_that_a_thing_has_no_policy(local: Elf, explained: Explained) -> None:
    local("--local", "create")
    shown = local("list", "thing_0").out
    assert f"none yet: `{local.typed} send` gives it one" in shown
    assert json.loads(local("list", "thing_0", *JSON).out.splitlines()[0])["policyName"] is None
    explained(local("list", "thing_1", *JSON, status=1), "NoSuchThing", "thing_1", "thing_0")


def test_a_command_of_mosquitto_pub_works_as_it_stands(local: Elf) -> None:
    if not shutil.which("mosquitto_pub"):
        pytest.skip("mosquitto_pub is not installed")
    local("--local", "create")
    window = local.subscribe("--count", 1)
    subprocess.run(shlex.split(local("list", "thing_0").out.splitlines()[-1]), check=True, timeout=PATIENCE_S)
    assert window.end().received == [("elf/thing_0", '{"msg": "hello"}')]
