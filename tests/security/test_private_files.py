"""What ELF keeps in misc/: which files, and readable by their owner alone."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from support.aws import REGION, Account
from support.shell import Elf, InProcess

ONCE = ("--duration", "0.01")


def modes(directory: Path) -> dict[str, int]:
    paths = {".": directory} | {path.name: path for path in directory.iterdir()}
    return {name: stat.S_IMODE(path.stat().st_mode) for name, path in paths.items()}


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_no_file_is_ever_open_to_others_whatever_the_umask(elf: Elf, witness: Callable[[str], list[str]]) -> None:
    options = ("--mqtt-endpoint", elf.to_broker[1])
    elf("create", umask=0)
    elf("send", *options, *ONCE, status=1, umask=0)  # with Amazon's roots, which makes that file too
    assert modes(elf.misc) == {".": 0o700} | dict.fromkeys(elf.files(), 0o600)
    assert set(elf.files()) == {
        *("elf.json", "things.json", "amazon-root-ca.pem", "thing_0.pem", "thing_0.pub", "thing_0.prv")
    }
    elf("clean", umask=0)
    assert modes(elf.misc) == {".": 0o700, "elf.json": 0o600}
    assert witness("exposed") == []


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_files_that_others_could_read_are_shut(main: InProcess, elf: Elf) -> None:
    main("create")
    elf.misc.chmod(0o755)
    (elf.misc / "thing_0.prv").chmod(0o644)
    (elf.misc / "things.json").chmod(0o644)
    assert "other users could read" in main("create", 2).err
    assert {mode for name, mode in modes(elf.misc).items() if name != "."} == {0o600}
    assert modes(elf.misc)["."] == 0o700


def test_things_json_has_the_shape_of_the_original_without_keys(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", 2)
    entries: list[dict[str, Any]] = json.loads((elf.misc / "things.json").read_text())
    assert [list(entry) for entry in entries] == [["thing_0"], ["thing_1"]]
    for entry in entries:
        ((name, recorded),) = entry.items()
        certificate_id = account.certificate_of(name)
        assert recorded == {
            "certificateArn": f"arn:aws:iot:{REGION}:{account.id}:cert/{certificate_id}",
            "certificateId": certificate_id,
        }
    main("send", *elf.to_broker, *ONCE)
    assert elf.recorded()["thing_1"]["elf_policy"] == "policy-thing_1"
    assert (
        elf.recorded()["thing_1"]["elf_policy_arn"]
        == (account.iot.get_policy(policyName="policy-thing_1")["policyArn"])
    )


def test_a_thing_has_its_certificate_and_both_keys_in_files(main: InProcess, elf: Elf, account: Account) -> None:
    main("create")
    text = (elf.misc / "thing_0.pem").read_text()
    described = account.iot.describe_certificate(certificateId=account.certificate_of("thing_0"))
    assert text.strip() == described["certificateDescription"]["certificatePem"].strip()
    certificate = x509.load_pem_x509_certificate(text.encode())
    public = serialization.load_pem_public_key((elf.misc / "thing_0.pub").read_bytes())
    private = serialization.load_pem_private_key((elf.misc / "thing_0.prv").read_bytes(), password=None)
    assert certificate.public_key() == public == private.public_key()


def test_a_colon_is_in_the_name_of_a_thing_and_not_of_a_file(main: InProcess, elf: Elf, account: Account) -> None:
    """Windows takes none."""
    main("create", "--prefix", "a:b")
    assert account.things() == ["a:b_0"]
    assert {name for name in elf.files() if name.startswith("a")} == {"a+b_0.pem", "a+b_0.pub", "a+b_0.prv"} | (
        {"amazon-root-ca.pem"} & set(elf.files())
    )
    main("send", *elf.to_broker, *ONCE)
    main("clean")
    assert account.is_empty()
    assert elf.files() == ["elf.json"]
