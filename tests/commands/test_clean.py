"""What `clean` deletes, in AWS and on disk, and what it leaves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator

import pytest
from support.aws import REGION, Account
from support.failures import Explained
from support.http_proxy import HttpProxy, denied
from support.machine import await_end, servers_of
from support.shell import Elf, InProcess, assert_whole

JSON = ("--output", "json")


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Switch between threads so often that a race which can be lost is lost."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval_s)


def test_clean_without_a_fleet_has_nothing_to_do(main: InProcess, account: Account) -> None:
    assert "no things" in main("clean").err
    assert account.is_empty()


def test_what_is_gone_already_counts_as_cleaned(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", 2)
    main("send", *elf.to_broker, "--duration", "0.01")
    arn = elf.recorded()["thing_0"]["certificateArn"]
    account.iot.detach_policy(policyName="policy-thing_0", target=arn)
    account.iot.delete_policy(policyName="policy-thing_0")
    account.iot.detach_thing_principal(thingName="thing_0", principal=arn)
    account.iot.update_certificate(certificateId=arn.rpartition("/")[2], newStatus="INACTIVE")
    account.iot.delete_certificate(certificateId=arn.rpartition("/")[2])
    account.iot.delete_thing(thingName="thing_0")
    account.iot.detach_thing_principal(thingName="thing_1", principal=elf.recorded()["thing_1"]["certificateArn"])
    main("clean")
    assert account.is_empty()
    assert elf.files() == ["elf.json"]


def test_errors_that_come_at_once_are_told_apart(
    main: InProcess, elf: Elf, account: Account, eager_threads: None
) -> None:
    main("create", 10)
    for name, thing in elf.recorded().items():
        account.iot.detach_thing_principal(thingName=name, principal=thing["certificateArn"])
        account.iot.update_certificate(certificateId=thing["certificateId"], newStatus="INACTIVE")
        account.iot.delete_certificate(certificateId=thing["certificateId"])
        account.iot.delete_thing(thingName=name)
    main("clean")
    assert elf.recorded() == {}


def test_clean_leaves_the_thing_that_fails_and_finishes_it_later(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", 3)
    protected = f"arn:aws:iot:{REGION}:{account.id}:thing/thing_1"
    main.use(
        account.iam_user(
            {
                "Version": "2012-10-17",
                "Statement": [
                    {"Effect": "Allow", "Action": "iot:*", "Resource": "*"},
                    {"Effect": "Deny", "Action": "iot:DeleteThing", "Resource": protected},
                ],
            }
        )
    )
    failed = main("clean", status=1)
    assert "thing_1: AWS denies iot:DeleteThing to " in failed.err
    assert list(elf.recorded()) == ["thing_1"]
    assert account.things() == ["thing_1"]
    assert {"elf.json", "things.json"} <= set(elf.files())
    assert not {"thing_0.prv", "thing_2.prv"} & set(elf.files())
    main.use(account.credentials)
    main("clean")
    assert account.is_empty()
    assert elf.files() == ["elf.json"]


def test_a_half_cleaned_thing_is_not_sent_from(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", 2)
    main("send", *elf.to_broker, "--duration", "0.01")
    deny = {"Effect": "Deny", "Action": "iot:DeleteThing", "Resource": "*"}
    main.use(
        account.iam_user({"Version": "2012-10-17", "Statement": [{**deny, "Effect": "Allow", "Action": "*"}, deny]})
    )
    main("clean", status=1)
    main.use(account.credentials)
    assert "elf.py clean" in main("send", *elf.to_broker, status=1).err


@pytest.mark.parametrize("option", ["--only-local", "--force"])
def test_only_local_makes_no_aws_call_and_says_what_it_leaves(
    elf: Elf, account: Account, witness: Callable[[str], list[str]], option: str
) -> None:
    elf("create")
    before, connections = account.snapshot(), witness("connect")
    assert connections  # the witness sees what there is to see
    lines = elf("clean", option).lines
    assert witness("connect") == connections
    assert any("left in AWS IoT" in line and "thing_0" in line and REGION in line for line in lines)
    assert account.snapshot() == before
    assert elf.files() == ["elf.json"]


def test_clean_deletes_no_file_that_is_not_elfs(main: InProcess, elf: Elf) -> None:
    main("create")
    for name in ("notes.txt", "other.pem", "thing_00.prv", "thing_1.pem"):
        (elf.misc / name).write_text("mine")
    main("clean")
    assert elf.files() == ["elf.json", "notes.txt", "other.pem", "thing_00.prv", "thing_1.pem"]


@pytest.mark.sample(2)
@pytest.mark.parametrize("count", [1, 3, 4])
def test_what_is_half_cleaned_does_not_count_against_the_things_asked_for(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy, count: int
) -> None:
    main("create", 3)
    old = account.certificates()
    proxy.inject("DeleteThing", denied("DeleteThing"), onwards=True)
    main("clean", status=1)
    assert "AWS denies iot:DeleteThing" in main("create", count, status=1).err
    proxy.reset()
    main("create", count)
    assert_whole(elf, account, count)
    assert not old.keys() & account.certificates().keys()
    main("clean")
    assert account.is_empty()


def test_some_are_cleaned_by_name_and_pattern_and_the_rest_stays(
    main: InProcess, elf: Elf, account: Account, explained: Explained
) -> None:
    main("create", 4)
    main("send", *elf.to_broker, "--duration", "0.01")
    before, recorded, about = account.snapshot(), elf.recorded(), elf.elf_json()
    for names in (("thing_9",), ("thing_1", "thing_9*"), ("",)):
        explained(
            main("clean", *names, *JSON, status=1), "NoSuchThing", names[-1], "thing_0, thing_1, thing_2, thing_3"
        )
    assert (account.snapshot(), elf.recorded()) == (before, recorded)
    cleaned = main("clean", "thing_3", "thing_[1]", *JSON)
    assert "ELF cleaned up 2 things, 2 left" in cleaned.err
    summary = json.loads(cleaned.out.splitlines()[-1])
    assert {key: summary[key] for key in ("cleaned", "left", "failed")} == {"cleaned": 2, "left": 2, "failed": []}
    rest = {name: recorded[name] for name in ("thing_0", "thing_2")}
    assert (elf.recorded(), elf.elf_json()) == (rest, about)
    assert account.things() == [*rest]
    assert account.policies() == [f"policy-{name}" for name in rest]
    assert account.certificates() == {thing["certificateId"]: "ACTIVE" for thing in rest.values()}
    assert not {"thing_1.prv", "thing_3.prv"} & {*elf.files()}
    assert "2 acknowledged" in main("send", *elf.to_broker, "--count", 1).err
    explained(main("create", 2, status=1), "TooManyThings", "2 requested: thing_2", "elf.py clean thing_2`")
    assert "ELF created 2 things" in main("create", 4).err  # what is missing of 4
    assert_whole(elf, account, 4)
    assert rest.items() <= elf.recorded().items()
    main("clean", "*")
    assert account.is_empty()
    assert elf.files() == ["elf.json"]
    assert "elf_id" not in elf.elf_json()
    explained(main("clean", "thing_0", status=1), "NoThings", "elf.py create")


def test_a_part_that_is_only_half_cleaned_is_finished_without_the_rest(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy
) -> None:
    main("create", 4)
    proxy.inject("DeleteThing", denied("DeleteThing"), onwards=True)
    assert "continue with `python elf.py clean thing_1 thing_2`" in main("clean", "thing_2", "thing_1", status=1).err
    proxy.reset()
    sent = main("send", *elf.to_broker, "--duration", "0.01").err
    assert "thing_1, thing_2; finish with `python elf.py clean thing_1 thing_2`" in sent
    main("clean", "thing_1")
    main("create", 4)  # finishes the other, and makes both again
    assert_whole(elf, account, 4)


def test_only_local_forgets_some_and_keeps_what_belongs_to_the_rest(
    main: InProcess, elf: Elf, account: Account, explained: Explained
) -> None:
    main("create", 3)
    before = account.snapshot()
    about = elf.elf_json() | {"unanswered": [[1e9, 1e9 + 1]]}
    (elf.misc / "elf.json").write_text(json.dumps(about))
    said = main("clean", "--only-local", "thing_1").err
    assert "left in AWS IoT, with their certificates and policies: thing_1 (" in said
    assert (account.snapshot(), [*elf.recorded()], elf.elf_json()) == (before, ["thing_0", "thing_2"], about)
    entries = [{"thing_1": {"elf_stage": "creating"}}, *({name: each} for name, each in elf.recorded().items())]
    (elf.misc / "things.json").write_text(json.dumps(entries))
    adopt = f"elf.py create 3 --prefix thing --adopt --region {REGION}`"
    explained(main("clean", "thing_1", status=1), "ThingsUnknown", ": thing_1;", adopt)  # its certificate is in AWS
    assert account.snapshot() == before
    main("clean", "thing_2")
    assert account.things() == ["thing_0", "thing_1"]


def test_a_thing_that_is_half_made_is_cleaned_alone(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy
) -> None:
    main("create", 1)
    proxy.inject("CreateKeysAndCertificate", denied("CreateKeysAndCertificate"), onwards=True)
    main("create", 3, status=1)
    proxy.reset()
    assert "finish with `python elf.py create 3`" in main("send", *elf.to_broker, "--duration", "0.01").err
    main("clean", "thing_[12]")
    assert_whole(elf, account, 1)


def test_the_embedded_aws_iot_stays_until_the_last_thing_is_cleaned(local: Elf) -> None:
    local("--local", "create", 2)
    (server,) = servers_of(local)
    local("clean", "thing_0")
    assert server.is_running()
    assert [line.split()[0] for line in local("list").out.splitlines()] == ["NAME", "thing_1", "1"]
    local("clean", "thing_1")
    await_end(server)
