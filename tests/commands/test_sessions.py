"""`subscribe --session`: what is sent while a thing is offline, or no `subscribe` runs, waits at the broker for it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from support.failures import Explained
from support.mqtt import Client
from support.program import Limits
from support.sessions import SessionBroker
from support.shell import InProcess, Pair, Result

RUN = 60  # messages of a thing


def summary_of(result: Result) -> dict[str, Any]:
    return dict(json.loads(result.out.splitlines()[-1]))


def test_nothing_is_missing_after_outages(
    main_of_pair: InProcess, pair: Pair, tmp_path: Path, limits: Limits
) -> None:
    with contextlib.closing(SessionBroker(tmp_path, pair.recorded(), per_s=40)) as broker:
        options = ("--session", "--things", 1, "--duration", 2, "--output", "json")
        window = pair.start("subscribe", *broker.to_broker, *options)
        window.await_line("ELF listening on")
        broker.cut()
        main_of_pair("send", *broker.to_broker, "--sequence", "--count", RUN, "--interval", "0.02")
        result = window.end()
    print(result.err)
    summary = summary_of(result)
    print(summary)
    assert (summary["missing"], summary["exact"], summary["received"]) == (0, True, 2 * RUN)
    assert 0
