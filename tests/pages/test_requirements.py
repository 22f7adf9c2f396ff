"""The pins of requirements-local.txt fit each other, so that pip has nothing to search."""

from __future__ import annotations

import importlib.metadata

from packaging.requirements import Requirement
from support.program import ROOT


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "requirements-local.txt").read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if line and line[0] not in "#-"]
    return {requirement.name: requirement for requirement in parsed}


def test_the_botocore_is_the_one_that_ministack_asks_for() -> None:
    asked = [Requirement(text) for text in importlib.metadata.requires("ministack") or ()]
    (botocore,) = (requirement for requirement in asked if requirement.name == "botocore")
    assert pins()["botocore"].specifier == botocore.specifier


def test_each_pin_is_what_is_installed() -> None:
    for name, requirement in pins().items():
        assert requirement.specifier.contains(importlib.metadata.version(name)), requirement
