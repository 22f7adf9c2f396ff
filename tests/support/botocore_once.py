"""What botocore works out anew for each session or call, always with the same result: once a process.

A user has one session a process; the tests have one for each command.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import botocore.client
import botocore.hooks
import botocore.session
import botocore.useragent


def work_once(put: Callable[[Any, str, Any], object]) -> None:
    """Keep the results of these functions; `put` is setattr(), or a monkeypatch's."""
    for module, name in (
        (botocore.session, "create_loader"),  # which looks for service descriptions, and parses megabytes of them
        (botocore.hooks, "accepts_kwargs"),  # asked of a hundred handlers
        (botocore.useragent, "sanitize_user_agent_string_component"),  # a fifth of a call's time
    ):
        put(module, name, functools.cache(getattr(module, name)))
    for of_class, name, key in (
        (botocore.hooks.EventAliaser, "_alias_event_name", str),  # asked of each event, and of a hundred handlers
        (botocore.client.ClientCreator, "_load_service_model", str),  # whose shapes are made when they are asked for
        (botocore.client.ClientCreator, "_create_methods", lambda model: model.service_name),  # 270 of IoT's
    ):
        put(of_class, name, _once_for_each(getattr(of_class, name), key))


def _once_for_each(method: Callable[..., Any], key: Callable[[Any], str]) -> Callable[..., Any]:
    """The method, whose result depends on its arguments alone; `key` returns the name of the first."""
    results: dict[tuple[object, ...], Any] = {}

    @functools.wraps(method)
    def once(self: Any, about: Any, *others: Any) -> Any:
        name = (key(about), *others)
        if name not in results:
            results[name] = method(self, about, *others)
        return results[name]

    return once
