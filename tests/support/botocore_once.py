"""What botocore works out anew for each session or call, always with the same result: once a process.

A user has one session a process; the tests have one for each command.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import botocore.hooks
import botocore.session
import botocore.useragent


def work_once(put: Callable[[ModuleType, str, Any], object]) -> None:
    """Keep the results of these functions; `put` is setattr(), or a monkeypatch's."""
    for module, name in (
        (botocore.session, "create_loader"),  # which looks for service descriptions, and parses megabytes of them
        (botocore.hooks, "accepts_kwargs"),  # asked of a hundred handlers
        (botocore.useragent, "sanitize_user_agent_string_component"),  # a fifth of a call's time
    ):
        put(module, name, functools.cache(getattr(module, name)))
