"""docs/troubleshooting.md has the table of failures in prose, and more on some others: all are ELF's own words."""

from __future__ import annotations

import re
import string

import pytest
from support.program import ROOT, constant, program_text


def with_ellipses(template: str) -> str:
    """Put an ellipsis for each {name} of a message, and one for several side by side."""
    parts = [text + ("…" if name is not None else "") for text, name, _, _ in string.Formatter().parse(template)]
    return normal("".join(parts))


def normal(text: str) -> str:
    return re.sub(r"…( ?…)+", "…", " ".join(text.split()))


@pytest.fixture(scope="session")
def causes() -> dict[str, str]:
    """The remedy of each failure, by its cause."""
    failures = constant("FAILURES")
    found = {with_ellipses(cause): with_ellipses(remedy) for cause, remedy in failures.values()}
    assert len(found) == len(failures)
    return found


@pytest.fixture(scope="session")
def rows() -> dict[str, str]:
    """What the tables of the page say to do, by what one sees."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\|([^|\n]*)\|([^|\n]*)\|$", page, re.MULTILINE)
    assert len(cells) == len(re.findall(r"^\|", page, re.MULTILINE))
    headers = {cells[index - 1] for index, (cell, _) in enumerate(cells) if set(cell) == {"-"}}
    found = [
        (normal(cause), normal(remedy))
        for cause, remedy in cells
        if (cause, remedy) not in headers and cause.strip("-")
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.fixture(scope="session")
def words() -> str:
    """The source, each text of which is in one piece."""
    return re.sub(r'"\s+f?"', "", program_text())


def test_every_failure_of_the_table_is_on_the_page(causes: dict[str, str], rows: dict[str, str]) -> None:
    assert [cause for cause in causes if cause not in rows] == []


def test_every_row_of_the_page_is_a_failure(words: str, rows: dict[str, str]) -> None:
    assert [(cause, part) for cause in rows for part in cause.split("…") if part not in words] == []


def test_the_page_names_the_same_commands_and_options(causes: dict[str, str], rows: dict[str, str]) -> None:
    lacking = [
        (cause, named)
        for cause, remedy in causes.items()
        for named in re.findall(r"`[^`]+`|(?<![\w-])--[a-z][a-z-]*", remedy)
        if named.strip("`") not in rows.get(cause, "")
    ]
    assert lacking == []
