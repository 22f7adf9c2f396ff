"""What tests of failures use: `explained` finds the words of a failure in what a command has said."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.networks import Impostor
from support.program import Limits, constant
from support.shell import InProcess, Pair, Result

from .words import PROVOKED_BY, TOLD, Explained, Words, pattern_of

SHORT_S = 0.5  # a time-out of ELF's, where nothing could answer in time


@pytest.fixture(autouse=True)
def explained(request: pytest.FixtureRequest) -> Iterator[Explained]:
    """Make sure that a command has told a failure in two lines, which mention these facts, and shown no code.

    The failure is the words of these lines, or the name of its entry in ELF's table or in TOLD.
    A test to which PROVOKED_BY points has to do so.
    """
    seen, failures = set(), {**constant("FAILURES"), **TOLD}

    def explained(result: Result, failure: str | Words, *facts: object) -> None:
        if isinstance(failure, str):
            key = next(names for names in failures if failure in names.split())
            seen.add(key.split()[0])
            failure = failures[key]
        cause, remedy = map(pattern_of, failure)
        said = [found for line in result.lines if (found := re.fullmatch(rf"([\w:-]+: )?{cause}", line))]
        helped = r"( \(see elf\.py \w+ --help\))?"
        advised = [line for line in result.lines if re.fullmatch(f"what to do: {remedy}{helped}", line)]
        assert said and len(advised) == 1, f"{cause}\n{remedy}\n{result.err}"
        assert len({line[0] for line in said}) == len(said)  # one for each thing
        for fact in facts:
            assert str(fact) in said[0][0] + advised[0]
        assert "None" not in said[0][0] + advised[0]
        assert "Traceback" not in result.out + result.err

    yield explained
    assert {key for key, test in PROVOKED_BY.items() if test == request.node.name} <= seen


@pytest.fixture
def impatient(limits: Limits) -> None:
    """Be quick to believe a failure, in this process: what is tried again for a while is tested elsewhere."""
    limits(PROPAGATION_S=0.0, POLICY_CHANGE_S=3.0, CALL_ATTEMPTS=2)
    limits(VISIBLE_S=SHORT_S, CONSISTENCY_S=SHORT_S, ABSENCE_S=SHORT_S)


@pytest.fixture
def misc(main_of_pair: InProcess, pair: Pair, tmp_path: Path) -> Path:
    """A copy of the misc/ of `pair`, to be spoilt: `main_of_pair` uses it from now on."""
    copy = tmp_path / "misc"
    shutil.copytree(pair.misc, copy)
    main_of_pair.use({"ELF_MISC_DIR": str(copy)})
    return copy


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[Impostor]:
    impostor = Impostor(tmp_path)
    yield impostor
    impostor.close()
