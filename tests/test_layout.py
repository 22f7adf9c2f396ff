"""How the program is laid out: which module uses which, and who has a constant."""

from __future__ import annotations

import pytest
from harness import Limits


@pytest.mark.parametrize("name", ["NO_SUCH_CONSTANT_S", "Path", "main", "threading"])
def test_only_a_constant_of_the_program_can_be_changed(limits: Limits, name: str) -> None:
    with pytest.raises(LookupError, match=f"{name} is assigned by no module of the program"):
        limits(**{name: 1})
