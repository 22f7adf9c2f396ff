"""What docs/how-it-works.md quotes of ELF is what its source says, word for word."""

from __future__ import annotations

import re
import textwrap

import pytest
from support.program import ELF, ROOT, program_text

PAGE = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
QUOTATIONS = [
    (part.partition("\n")[0], quotation)
    for part in PAGE.split("\n## ")
    for quotation in re.findall(r"^```python\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
]
STEPS = {"Make", "Authorise", "Connect", "Retire"}  # of a thing: these stand in elf.py itself
CALLS = {"Publish and subscribe"}  # these in the package
LINES = 14  # a quotation is to be read at a glance


@pytest.mark.parametrize(("heading", "quotation"), [pytest.param(*each, id=each[0]) for each in QUOTATIONS])
def test_a_quotation_is_what_elf_says(heading: str, quotation: str) -> None:
    text = ELF.read_text(encoding="utf-8") if heading in STEPS else program_text()
    assert any(textwrap.indent(quotation, " " * depth) in text for depth in (0, 4, 8)), heading
    assert len(quotation.splitlines()) <= LINES


def test_each_step_of_a_thing_is_quoted() -> None:
    assert {heading for heading, _ in QUOTATIONS} == STEPS | CALLS
