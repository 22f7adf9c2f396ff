"""What is wrong with this machine, with Python, or with ELF itself is explained."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import botocore
import pytest
from support.failures import Explained
from support.http_proxy import HttpProxy, denied
from support.machine import WITHOUT_PACKAGES, hamper, limited, posix_only
from support.program import ROOT, Limits
from support.shell import Elf, InProcess, Pair

from iot_elf.errors import how_to_install

# A thread's traceback on the terminal is no explanation either.
pytestmark = [
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.usefixtures("impatient"),
]

ONCE = ("--duration", "0.01")
JSON = ("--output", "json")
SHORT_S = 0.5  # a time-out of ELF's, where nothing could answer in time
BOTOCORE = Path(botocore.__file__).parent


def test_a_system_without_amazons_roots_is_explained(pair: Pair, tmp_path: Path, explained: Explained) -> None:
    """A distribution's botocore can be without them; this one has nothing else missing."""
    (tmp_path / "botocore").mkdir()
    for path in BOTOCORE.iterdir():
        if path.name != "cacert.pem":
            (tmp_path / "botocore" / path.name).symlink_to(path)
    environment = {"PYTHONPATH": str(tmp_path), "SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": str(tmp_path / "none")}
    endpoint = pair.to_broker[:2]
    shutil.copytree(pair.misc, tmp_path / "misc", ignore=shutil.ignore_patterns("amazon-root-ca.pem"))
    environment["ELF_MISC_DIR"] = str(tmp_path / "misc")
    result = pair("send", *endpoint, *ONCE, *JSON, status=1, env=environment)
    explained(result, "RootsMissing", "https://www.amazontrust.com/repository/AmazonRootCA1.pem", "--root-cert")


@posix_only
def test_a_python_without_the_packages_is_explained(elf: Elf, tmp_path: Path, explained: Explained) -> None:
    hamper(elf, tmp_path, WITHOUT_PACKAGES)
    explained(elf("create", *JSON, status=1), "PackageMissing", "boto", ROOT / "requirements.txt", "uv run elf.py")


@pytest.mark.parametrize(
    ("posix", "python", "base", "says"),
    [
        (True, "/v e/bin/python", "/usr", "`'/v e/bin/python' -m pip install -r /elf/requirements.txt"),
        (False, r"C:\v e\python.exe", r"C:\base", r'`"C:\v e\python.exe" -m pip install -r /elf/requirements.txt'),
        (
            True,
            "/usr/bin/python3",
            sys.prefix,
            "`/usr/bin/python3 -m venv venv; venv/bin/python -m pip install -r /elf/require",
        ),
        (False, r"C:\python.exe", sys.prefix, r"`py -m venv venv; venv\Scripts\python -m pip install -r /elf/require"),
    ],
)
def test_packages_are_installed_in_a_virtual_environment_for_others_may_be_refused(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, limits: Limits, posix: bool, python: str, base: str, says: str
) -> None:
    limits(POSIX=posix, HERE=Path("/elf"))
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr(sys, "base_prefix", base)
    assert how_to_install("requirements.txt").startswith(says)


@posix_only
def test_a_system_that_allows_few_open_files_is_explained(
    elf: Elf, pair: Pair, tmp_path: Path, explained: Explained
) -> None:
    shutil.copytree(pair.misc, elf.misc)
    hamper(elf, tmp_path, limited("RLIMIT_NOFILE", 100))
    result = elf("send", *elf.to_broker, *ONCE, *JSON, status=1)
    explained(result, "TooFewDescriptors", "2 things", "102 open files", "100", "ulimit -Hn")


def test_a_bug_of_elfs_is_explained_as_such(elf: Elf, tmp_path: Path, explained: Explained) -> None:
    """Such as one that comes out where a user has a module of the name of a package that ELF uses."""
    (tmp_path / "boto3.py").touch()
    result = elf("create", *JSON, status=1, env={"PYTHONPATH": str(tmp_path)})
    explained(result, "Unexpected", "AttributeError", "'boto3'", "--debug")


def test_debug_adds_the_traceback(main: InProcess, proxy: HttpProxy) -> None:
    proxy.inject("DescribeEndpoint", denied("DescribeEndpoint"), call=1)
    proxy.inject("CreateThing", denied("CreateThing"), call=1)
    for _ in range(2):
        said = main("create", "--debug", status=1).err
        assert "Traceback (most recent call last)" in said
        assert said.count("what to do: ") == 1
