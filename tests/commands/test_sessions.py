"""`subscribe --session`: what is sent while a thing is offline, or no `subscribe` runs, waits at the broker for it."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.aws import AwsService
from support.mosquitto import mosquitto
from support.mqtt import Broker, Peer, answer_to, mqtt_client_of
from support.program import Limits
from support.sessions import SessionBroker
from support.shell import InProcess, Pair, Result

SESSION = ("--session", "--things", 1, "--output", "json")
SEND = ("send", "--sequence", "--interval", "0.01")


def summary_of(result: Result) -> dict[str, Any]:
    return dict(json.loads(result.out.splitlines()[-1]))


def numbers_of(result: Result, thing: str = "thing_0") -> list[int]:
    """The numbers of the messages of a sender that were shown, in their order."""
    events = [event for event in map(json.loads, result.out.splitlines()) if event["event"] == "received"]
    return [
        content["seq"] for content in (json.loads(event["payload"]) for event in events) if content["thing"] == thing
    ]


@pytest.fixture(params=["MiniStack", "Mosquitto"])
def broker(request: pytest.FixtureRequest, service: AwsService, tmp_path: Path) -> Iterator[AwsService]:
    with contextlib.nullcontext(service) if request.param == "MiniStack" else mosquitto(tmp_path) as running:
        yield running


def test_what_is_sent_while_no_subscribe_runs_waits_at_the_broker_as_another_client_sees(
    main_of_pair: InProcess, pair: Pair, broker: AwsService
) -> None:
    to_broker = "--mqtt-endpoint", f"localhost:{broker.mqtt_port}", "--root-cert", broker.root_cert
    client_id = f"thing_0-{pair.elf_json()['elf_id'][9:17]}"
    first = pair.start("subscribe", *to_broker, "--duration", 0, *SESSION)
    first.await_line("ELF listening on 1 thing")
    first.signal(signal.SIGKILL)
    first.end(-signal.SIGKILL)
    main_of_pair(*SEND, *to_broker, "--count", 3)
    other = mqtt_client_of(pair, broker, "thing_0", client_id, clean_session=False)
    assert (other.connect(), other.session_present) == ("Success", True)
    assert sorted(json.loads(other.hear().payload)["seq"] for _ in range(6)) == [1, 1, 2, 2, 3, 3]
    other.close()
    main_of_pair(*SEND, *to_broker, "--count", 2)
    second = main_of_pair("subscribe", *to_broker, "--count", 4, *SESSION)
    summary = summary_of(second)
    assert {"sessionPresent": 1, "sessionLost": 0, "waited": 4, "received": 4, "missing": 0}.items() <= summary.items()
    assert "session present: 1 of 1 thing; 4 messages older than the connection" in second.err
    clean = mqtt_client_of(pair, broker, "thing_0", client_id)
    assert clean.connect() == "Success"
    clean.close()  # which ended the session
    third = summary_of(main_of_pair("subscribe", *to_broker, "--duration", "0.01", *SESSION))
    assert (third["sessionPresent"], third["received"]) == (0, 0)


def test_what_comes_after_the_count_waits_for_the_next_run(main_of_pair: InProcess, pair: Pair, tmp_path: Path) -> None:
    """Messages come with the CONNACK, before anything is subscribed to; none is lost or shown twice."""
    with contextlib.closing(SessionBroker(tmp_path, pair.recorded(), per_s=1000)) as broker:
        options = *broker.to_broker, "--client-id", "{thing_name}-mine", *SESSION
        main_of_pair("subscribe", *options, "--duration", "0.01")
        main_of_pair(*SEND, *broker.to_broker, "--things", 1, "--count", 6)
        shown = []
        for count in (1, 2, 3):
            result = main_of_pair("subscribe", *options, "--count", count)
            shown.append((numbers_of(result), summary_of(result)["waited"]))
    assert shown == [([1], 1), ([2, 3], 2), ([4, 5, 6], 3)]
    assert broker.connacks == [("thing_0-mine", number > 0) for number in range(4)]


def test_nothing_is_missing_after_outages_though_what_waited_comes_slowly(
    main_of_pair: InProcess, pair: Pair, tmp_path: Path, limits: Limits
) -> None:
    limits(LATE_ARRIVALS_S=0.1, MAX_RECONNECT_PAUSE_S=0.1)
    with contextlib.closing(SessionBroker(tmp_path, pair.recorded(), per_s=20)) as broker:
        sender = pair.start(*SEND, *broker.to_broker, "--things", 1, "--interval", "0.02", "--duration", 0)
        sender.await_line("posting message")
        result = main_of_pair("subscribe", *broker.to_broker, "--outage", "0.8/2", "--duration", 2, *SESSION)
        sender.signal(signal.SIGINT)
        sender.end(130)
    summary, numbers = summary_of(result), numbers_of(result)
    assert (summary["missing"], summary["repeated"], summary["exact"], summary["connects"]) == (0, 3, True, 2)
    assert "missing messages, while they arrive" in result.err
    assert sorted({*numbers}) == list(range(min(numbers), max(numbers) + 1))
    assert summary["waited"] > 20


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_thing_that_is_offline_at_the_end_has_missed_nothing_unless_its_session_is_gone(
    main_of_pair: InProcess, pair: Pair, tmp_path: Path, limits: Limits, comes_back: bool
) -> None:
    limits(MAX_RECONNECT_PAUSE_S=0.1, SAME_ID_PAUSE_S=0.1)

    def hang_up(peer: Peer) -> None:
        peer.send(answer_to(peer.packets[0]))
        for asked in peer:
            if not comes_back:
                broker.close()
            peer.end(answer_to(asked))
            return

    with contextlib.closing(Broker(tmp_path, {"thing_0": [hang_up]})) as broker:
        result = main_of_pair("subscribe", *broker.to_broker, "--duration", "0.5", *SESSION)
    assert summary_of(result)["sessionLost"] == comes_back
    assert ("thing_0: its session is gone, and what waited in it" in result.err) == comes_back
    effect = "they may have missed messages" if comes_back else "what came meanwhile waited"
    assert re.search(f"offline: 1 thing, .*; {effect}", result.err)
