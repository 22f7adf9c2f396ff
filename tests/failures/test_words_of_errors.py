"""Every failure that ELF explains is provoked: here what is wrong with this machine, with Python, or with ELF itself.

Its user reads what is wrong, with the names, and what to do. The files test_words_of_*.py have the others.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import botocore
import pytest
from support.http_proxy import HttpProxy, denied
from support.machine import WITHOUT_PACKAGES, hamper, limited, posix_only
from support.program import ROOT, TESTS, Limits, constant
from support.shell import Elf, InProcess, Pair

from iot_elf.errors import how_to_install

from .words import PROVOKED_BY, Explained

# A thread's traceback on the terminal is no explanation either.
pytestmark = [
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.usefixtures("impatient"),
]

ONCE = ("--duration", "0.01")
SHORT_S = 0.5  # a time-out of ELF's, where nothing could answer in time
BOTOCORE = Path(botocore.__file__).parent


def test_every_failure_is_provoked_by_a_test_that_exists() -> None:
    assert list(PROVOKED_BY) == [names.split()[0] for names in constant("FAILURES")]
    tests = set(PROVOKED_BY.values())
    names = "|".join({test.partition("[")[0] for test in tests})
    files = [path for path in TESTS.rglob("test_*.py") if re.search(rf"^def ({names})\(", path.read_text(), re.M)]
    options = ["--collect-only", "-q", "-p", "no:xdist", "-o", "addopts="]
    command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert tests - {line.partition("::")[2] for line in listed.splitlines()} == set()


def test_a_system_without_amazons_roots_is_explained(pair: Pair, tmp_path: Path, explained: Explained) -> None:
    """A distribution's botocore can be without them; this one has nothing else missing."""
    (tmp_path / "botocore").mkdir()
    for path in BOTOCORE.iterdir():
        if path.name != "cacert.pem":
            (tmp_path / "botocore" / path.name).symlink_to(path)
    environment = {"PYTHONPATH": str(tmp_path), "SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": str(tmp_path / "none")}
    endpoint = pair.to_broker[:2]
    shutil.copytree(pair.misc, tmp_path / "misc", ignore=shutil.ignore_patterns("amazon-root-ca.pem"))
    result = pair("send", *endpoint, *ONCE, status=1, env=environment | {"ELF_MISC_DIR": str(tmp_path / "misc")})
    failure = (
        "neither botocore nor this system has the Amazon root certificates",
        "download https://www.amazontrust.com/repository/AmazonRootCA1.pem and use it with --root-cert",
    )
    explained(result, failure)


@posix_only
def test_a_python_without_the_packages_is_explained(elf: Elf, tmp_path: Path, explained: Explained) -> None:
    hamper(elf, tmp_path, WITHOUT_PACKAGES)
    explained(elf("create", status=1), "ModuleNotFoundError", "boto", ROOT / "requirements.txt", "uv run elf.py")


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
    result = elf("send", *elf.to_broker, *ONCE, status=1)
    explained(result, "TooFewDescriptors", "2 things need 102 open files", "allows 100", "ulimit -Hn")


def test_a_bug_of_elfs_is_explained_as_such(elf: Elf, tmp_path: Path, explained: Explained) -> None:
    """Such as one that comes out where a user has a module of the name of a package that ELF uses."""
    (tmp_path / "boto3.py").touch()
    result = elf("create", status=1, env={"PYTHONPATH": str(tmp_path)})
    explained(result, "Exception", "AttributeError", "'boto3'", "--debug")


def test_debug_adds_the_traceback(main: InProcess, proxy: HttpProxy) -> None:
    proxy.inject("DescribeEndpoint", denied("DescribeEndpoint"), call=1)
    proxy.inject("CreateThing", denied("CreateThing"), call=1)
    for _ in range(2):
        said = main("create", "--debug", status=1).err
        assert "Traceback (most recent call last)" in said
        assert said.count("what to do: ") == 1
