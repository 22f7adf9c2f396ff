"""What tests of failures use."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.networks import Impostor
from support.program import Limits
from support.shell import InProcess, Pair

SHORT_S = 0.5  # a time-out of ELF's, where nothing could answer in time


@pytest.fixture
def impatient(limits: Limits) -> None:
    """Be quick to believe a failure, in this process: what is tried again for a while is tested elsewhere."""
    limits(PROPAGATION_S=0.0, POLICY_CHANGE_S=3.0, CALL_ATTEMPTS=2, FIRST_CONNECT_S=SHORT_S)
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
