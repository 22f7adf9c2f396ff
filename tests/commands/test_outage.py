"""Outages that a run makes itself: what a broker sees of them, and what is lost (nothing, at QoS 1)."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from support.mqtt import CONNECT, DISCONNECT, Broker
from support.networks import Relay
from support.program import Limits
from support.shell import InProcess, Pair


def test_an_outage_ends_all_connections_with_a_reset_and_attempts_none(
    main_of_pair: InProcess, pair: Pair, tmp_path: Path, limits: Limits
) -> None:
    limits(MAX_RECONNECT_PAUSE_S=0.1)
    with contextlib.closing(Broker(tmp_path)) as broker, contextlib.closing(Relay(broker.port)) as relay:
        to_relay = "--mqtt-endpoint", f"localhost:{relay.port}", "--root-cert", broker.root_cert
        pace = "--outage", "0.5/1.5", "--duration", 3, "--interval", "0.1"
        result = main_of_pair("send", *to_relay, *pace, "--output", "json")
    peers = {thing: [peer for peer in broker.peers if peer.thing == thing] for thing in ("thing_0", "thing_1")}
    assert [len(its) for its in peers.values()] == [3, 3]
    assert len(relay.resets) == 4
    for *cut, last in peers.values():
        assert [len(peer.of(DISCONNECT)) for peer in (*cut, last)] == [0, 0, 1]
        for peer, following in zip(cut, [*cut[1:], last], strict=True):
            assert following.of(CONNECT)[0].at - peer.ended_at > 0.45
    (summary,) = [it for it in map(json.loads, result.out.splitlines()) if it["event"] == "summary"]
    assert (summary["sent"], summary["lost"], summary["notSent"]) == (60, 0, 0)
    assert (summary["plannedOutages"], summary["offlineS"]) == (2, {})
    assert min(summary["plannedOfflineS"].values()) >= 1.0
    assert "2 outages of --outage: 2 things, longest thing_" in result.err
    assert "lost its connection" not in result.err and "what to do" not in result.err


def test_nothing_is_missing_after_outages_of_the_sender(main_of_pair: InProcess, pair: Pair, limits: Limits) -> None:
    limits(MAX_RECONNECT_PAUSE_S=0.1)
    window = pair.subscribe("--things", 1, "--count", 80, "--duration", 60)
    pace = "--outage", "0.4/1", "--interval", "0.05", "--count", 40
    sent = main_of_pair("send", *pair.to_broker, "--verify", *pace).err
    assert "80 acknowledged, 0 lost" in sent and "came back: 80 of 80 messages" in sent
    assert "80 messages on 1 thing, 0 missing" in window.end().err


def test_a_subscriber_that_ends_in_an_outage_of_its_own_has_not_failed(main_of_pair: InProcess, pair: Pair) -> None:
    for outage in ("0.6/0.8", "0.1/0.8"):  # in it, and just after it
        result = main_of_pair("subscribe", *pair.to_broker, "--outage", outage, "--duration", "0.5")
        assert "1 outage of --outage: 2 things" in result.err


def test_no_outage_comes_in_a_run_that_is_too_short(main_of_pair: InProcess, pair: Pair) -> None:
    said = main_of_pair("send", *pair.to_broker, "--outage", "10/60", "--count", 1).err
    assert "outages: 10 s without a connection in each 60 s, the first in 25 s" in said
    assert "0 outages of --outage" in said
