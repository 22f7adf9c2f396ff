"""What is wrong in misc/ is explained: no fleet, another ELF at work, files and directories that ELF cannot use."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.aws import Account
from support.failures import Explained, failure_of
from support.http_proxy import LATE, HttpProxy, denied
from support.machine import NOT_AS_ROOT, PATIENCE_S, can_unshare, hamper, posix_only, read_only
from support.shell import Elf, InProcess, Pair

# A thread's traceback on the terminal is no explanation either.
pytestmark = [
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.usefixtures("impatient"),
]

needs_namespaces = pytest.mark.skipif(not can_unshare(), reason="this machine gives a user no namespaces")
ONCE = ("--duration", "0.01")
JSON = ("--output", "json")


def test_a_command_before_create_is_explained(main: InProcess, explained: Explained) -> None:
    explained(main("send", status=1), "NoThings", "elf.py create", "elf.py --local create")


@pytest.mark.parametrize(
    ("arguments", "failure", "facts"),
    [
        pytest.param(
            ("create", 1), "TooManyThings", ("1 requested: thing_1", "elf.py clean thing_1`"), id="fewer things"
        ),
        pytest.param(
            ("send", "--region", "eu-west-1"),
            *("PlaceDiffers", ("--region eu-west-1 ", "region us-west-2, ", "--misc-dir")),
            id="another region",
        ),
        pytest.param(("clean", "--local"), "PlaceDiffers", ("--local ", "--misc-dir"), id="another kind of place"),
    ],
)
def test_a_command_that_does_not_fit_the_fleet_is_explained(
    main_of_pair: InProcess, explained: Explained, arguments: tuple[object, ...], failure: str, facts: tuple[str, ...]
) -> None:
    explained(main_of_pair(*arguments, status=1), failure, *facts)


def test_a_subscription_that_hears_too_little_is_explained(
    main_of_pair: InProcess, pair: Pair, explained: Explained
) -> None:
    result = main_of_pair("subscribe", *pair.to_broker, "--duration", "0.1", "--count", 3, status=1)
    explained(result, "TooFewMessages", "0 messages in 0.1 s, not 3")


def test_a_fleet_that_is_half_made_is_explained(main: InProcess, proxy: HttpProxy, explained: Explained) -> None:
    proxy.inject("CreateKeysAndCertificate", denied("CreateKeysAndCertificate"), onwards=True)
    main("create", status=1)
    explained(main("send", status=1), "NoneComplete", "elf.py create 1`", "elf.py clean`")


def test_another_elf_at_work_is_named_with_its_process(
    main_of_pair: InProcess, pair: Pair, explained: Explained
) -> None:
    window = pair.subscribe()
    facts = (pair.misc, "`elf.py subscribe`", window.process.pid, "--wait 60", "--misc-dir")
    explained(main_of_pair("clean", status=1), "DirectoryInUse", *facts)


@pytest.mark.parametrize(
    ("file", "content", "fact"),
    [
        pytest.param("things.json", "{thing_0}", "line 1", id="things.json is not JSON"),
        pytest.param("things.json", "{}", "not a JSON list", id="things.json is not ELF's"),
        pytest.param("things.json", '[{"../t": {}}]', "'../t'", id="things.json has a hostile name"),
        pytest.param("things.json", "[" * 100_000, "recursion", id="things.json is a thousand levels deep"),
        pytest.param("things.json", b"\xff", "utf-8", id="things.json is not UTF-8"),
        pytest.param("things.json", '{"version": 2}', "not a JSON list", id="things.json is a newer ELF's"),
        pytest.param("things.json", '[{"thing_0": {"elf_x": 1}}]', "elf_x", id="things.json says more"),
        pytest.param(
            "things.json",
            *('[{"thing_0": {"elf_stage": "asleep"}}]', "stage of thing_0"),
            id="things.json has a stage of a newer ELF",
        ),
        pytest.param("elf.json", "not JSON", "line 1", id="elf.json is not JSON"),
        pytest.param("elf.json", '{"elf_id": "me"}', "URN", id="elf.json has another ID"),
        pytest.param("things.journal", "not JSON\n", "line 1", id="the journal is not JSON"),
    ],
)
def test_a_state_that_elf_cannot_use_is_explained(
    main_of_pair: InProcess,
    misc: Path,
    explained: Explained,
    file: str,
    content: str | bytes,
    fact: str,
) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (misc / file).write_bytes(data)
    explained(main_of_pair("clean", status=1), "StateUnreadable", misc / file, fact)
    assert (misc / file).read_bytes() == data


@pytest.mark.skipif(os.name != "posix", reason="symbolic links are POSIX's")
@pytest.mark.parametrize(
    ("file", "content"),
    [("things.json", "[]"), ("things.journal", ""), ("elf.json", "{}"), (".lock", "[]")],
    ids=["things.json", "things.journal", "elf.json", ".lock"],
)
def test_a_symbolic_link_is_not_written_through(
    main_of_pair: InProcess, misc: Path, tmp_path: Path, explained: Explained, file: str, content: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(content)
    (misc / file).unlink(missing_ok=True)
    (misc / file).symlink_to(elsewhere)
    (misc / "amazon-root-ca.pem").touch()  # as `send` writes it on AWS: it is ELF's, whatever is wrong with elf.json
    explained(main_of_pair("create", 3, status=1), "SymbolicLink", misc / file)
    assert elsewhere.read_text() == content


@needs_namespaces
def test_a_disk_that_is_read_only_is_explained(
    elf: Elf, account: Account, tmp_path: Path, explained: Explained
) -> None:
    elf.misc.mkdir()
    hamper(elf, tmp_path, read_only(elf.misc))
    explained(elf("create", *JSON, status=1), "OperatingSystemError", elf.misc)
    assert account.is_empty()


@posix_only
def test_a_directory_that_may_not_be_written_is_explained(
    elf: Elf, account: Account, tmp_path: Path, explained: Explained
) -> None:
    elf.misc.mkdir(mode=0o500)
    hamper(elf, tmp_path, NOT_AS_ROOT)
    explained(elf("create", *JSON, status=1), "OperatingSystemError", elf.misc)
    assert account.is_empty()


@pytest.mark.parametrize(
    ("at", "reason"),
    [
        pytest.param("misc", "Not a directory", id="a file"),
        pytest.param("", "Not a directory", id="a file above"),
        pytest.param("misc/.lock/x", "Is a directory", id="a directory for a file"),
    ],
)
def test_a_misc_that_is_no_directory_is_explained(
    main: InProcess, account: Account, tmp_path: Path, explained: Explained, at: str, reason: str
) -> None:
    directory = tmp_path / "deep"
    (directory / at).parent.mkdir(parents=True, exist_ok=True)
    (directory / at).touch()
    explained(main("create", "--misc-dir", directory / "misc", status=1), "OperatingSystemError", reason, directory)
    assert account.is_empty()


def test_a_misc_that_disappears_in_mid_run_is_explained(
    main: InProcess, proxy: HttpProxy, elf: Elf, account: Account, tmp_path: Path, explained: Explained
) -> None:
    proxy.inject("CreateKeysAndCertificate", LATE)
    with proxy.while_hanging(lambda: elf.misc.rename(tmp_path / "trash"), PATIENCE_S):
        result = main("create", status=1)
    explained(result, "FileMissing", elf.misc)
    (tmp_path / "trash").rename(elf.misc)
    main("clean")
    assert account.is_empty()


ANOTHERS_KEY = "thing_1.prv"


@pytest.mark.parametrize(
    ("file", "content", "failure", "named"),
    [
        pytest.param("thing_0.prv", None, "KeyMissing", "thing_0.prv", id="no key"),
        pytest.param("thing_0.pem", None, "KeyMissing", "thing_0.pem", id="no certificate"),
        pytest.param("thing_0.prv", "", "KeyEmpty", "thing_0.prv", id="an empty key"),
        pytest.param("thing_0.pem", "\n", "KeyEmpty", "thing_0.pem", id="an empty certificate"),
        pytest.param(
            "thing_0.prv", "-----BEGIN ENCRYPTED", "KeyEncrypted", "thing_0.prv", id="a key with a passphrase"
        ),
        pytest.param("thing_0.prv", "0123", "KeyInvalid", "thing_0.prv", id="no key in it"),
        pytest.param("thing_0.pem", "true", "KeyInvalid", "thing_0.pem", id="no certificate in it"),
        pytest.param("thing_0.prv", ANOTHERS_KEY, "KeyMismatch", "thing_0.prv", id="another thing's key"),
    ],
)
def test_a_file_of_a_thing_that_is_spoilt_stops_that_thing_alone(
    main_of_pair: InProcess,
    pair: Pair,
    misc: Path,
    explained: Explained,
    file: str,
    content: str | None,
    failure: str,
    named: str,
) -> None:
    if content is None:
        (misc / file).unlink()
    else:
        (misc / file).write_text((misc / content).read_text() if content == ANOTHERS_KEY else content)
    result = main_of_pair("send", *pair.to_broker, *ONCE, *JSON, status=1)
    explained(result, failure, "thing_0", misc / named)
    assert "1 acknowledged, 0 lost" in result.err
    assert failure_of(result) == failure


def test_things_that_fail_for_different_reasons_have_that_of_the_first(
    main_of_pair: InProcess, pair: Pair, misc: Path
) -> None:
    for file in ("thing_0.prv", "thing_1.pem"):
        (misc / file).unlink()
    result = main_of_pair("send", *pair.to_broker, *ONCE, *JSON, status=1)
    assert failure_of(result) == "NoneConnected"
    assert ": thing_" in result.out
    assert sum("what to do: restore it" in line for line in result.lines) == 1


@posix_only
def test_a_key_that_may_not_be_read_is_explained(elf: Elf, pair: Pair, tmp_path: Path, explained: Explained) -> None:
    shutil.copytree(pair.misc, elf.misc)
    (elf.misc / "thing_0.prv").chmod(0)
    hamper(elf, tmp_path, NOT_AS_ROOT)
    elf.environment |= pair.account.credentials
    result = elf("send", *elf.to_broker, *ONCE, *JSON, "--things", 1, status=1)
    assert any(f"{elf.misc / 'thing_0.prv'}: Permission denied" in line for line in result.lines)
    assert failure_of(result) == "KeyUnreadable"
