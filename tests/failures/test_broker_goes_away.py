"""The network and the broker come and go: nothing that was said to be sent is lost."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable

import psutil  # type: ignore[import-untyped]
import pytest
from support.aws import Account, AwsService
from support.failures import Explained
from support.mqtt import Client
from support.networks import Relay
from support.program import Limits
from support.shell import Elf, InProcess, Pair, Result

POSTED = re.compile(r"posting message:'(.*)' on topic: (\S+)")


def assert_all_heard(result: Result, ear: Client, messages: int) -> None:
    """What ELF said that it sent has been heard by somebody else, at least once."""
    posted = Counter((topic, payload) for payload, topic in POSTED.findall(result.err))
    heard = Counter((message.topic, message.payload.decode()) for message in ear.hear_all())
    assert posted.total() == messages
    assert posted <= heard


@pytest.mark.parametrize("interval", ["0.1", "0.01"])
def test_what_is_published_while_the_broker_is_away_arrives_later(
    pair: Pair, ear: Client, service: AwsService, relay: Relay, interval: str
) -> None:
    window = pair.start("send", *relay.to_broker(service), "--duration", "3", "--interval", interval)
    window.await_line("posting message")
    relay.down()
    for name in pair.recorded():
        window.await_line(f"{name} lost its connection to localhost:{relay.port}")
    window.await_line(r"waiting for \d+ acknowledgements")  # all is published, and the broker is still away
    relay.up()
    result = window.end()
    messages = round(2 * 3 / float(interval))
    assert re.search(r"offline: 2 things, longest thing_\d \([\d.]+ s\); \d+ messages? sent again", result.err)
    assert f"ELF sent {messages} messages from 2 things: {messages} acknowledged, 0 lost" in result.err
    from_sending, from_due = (
        float(re.findall(rf"\[send_messages\] ack {its}: p50 ([\d.]+), ", result.err)[0])
        for its in ("latency", "since due")
    )
    assert from_due > 1000 > from_sending  # most were sent quickly, and late
    assert_all_heard(result, ear, messages)


def test_a_network_that_swallows_everything_loses_nothing(
    pair: Pair, ear: Client, service: AwsService, relay: Relay
) -> None:
    window = pair.start("send", *relay.to_broker(service), "--duration", "2", "--interval", "0.1")
    window.await_line("posting message")
    relay.silence()
    window.await_line(r"waiting for \d+ acknowledgements")
    relay.unsilence()  # which cuts what was silent
    result = window.end()
    assert int(re.findall(r"(\d+) messages? sent again", result.err)[0]) > 0
    assert "ELF sent 40 messages from 2 things: 40 acknowledged, 0 lost" in result.err
    assert_all_heard(result, ear, 40)


def test_an_outage_longer_than_the_grace_is_given_up_and_what_is_lost_is_listed(
    main_of_pair: InProcess, service: AwsService, relay: Relay, limits: Limits, explained: Explained
) -> None:
    limits(ACK_GRACE_S=1.0, ACK_PAUSE_S=1.0)

    def break_it() -> None:
        relay.await_arrivals(2)
        time.sleep(1.0)
        relay.silence()  # what leaves from now on is not acknowledged
        time.sleep(0.5)
        relay.close()

    threading.Thread(target=break_it).start()
    result = main_of_pair("send", *relay.to_broker(service), "--duration", "3", "--interval", "0.1", status=1)
    pattern = r"sent (\d+) .*: (\d+) acknowledged, (\d+) lost(?:, (\d+) not sent)?"
    sent, acknowledged, lost, unsent = (int(number or 0) for number in re.findall(pattern, result.err)[0])
    assert (sent + unsent, acknowledged + lost) == (60, sent)
    assert lost + unsent > 0
    listed = len(re.findall(r"not acknowledged: message \d+ of thing_\d on elf/thing_\d: '", result.err))
    more = re.findall(r"(\d+) more not acknowledged, or lost while offline", result.err)
    assert listed + sum(map(int, more)) == lost
    explained(result, "MessagesLost", f"{lost + unsent} messages lost")


def test_subscribe_comes_back_by_itself_and_says_how_long_it_was_offline(
    pair: Pair, connect: Callable[[Account], Client], service: AwsService, relay: Relay
) -> None:
    client = connect(pair.account)
    window = pair.start("subscribe", *relay.to_broker(service), "--duration", "60", "--count", "2")
    window.await_line("ELF listening on 2 things")
    relay.down()
    for name in pair.recorded():
        window.await_line(f"{name} lost its connection")
    client.publish("elf/x", "nobody hears this")
    relay.up()
    for name in pair.recorded():
        window.await_line(rf"{name} reconnected to localhost:{relay.port} after [\d.]+ s")
    client.publish("elf/x", "everybody hears this")
    result = window.end()
    assert result.received == [("elf/x", "everybody hears this")] * 2
    assert re.search(r"offline: 2 things, longest thing_\d \([\d.]+ s\); they may have missed ", result.err)


def test_subscribe_that_is_offline_in_the_end_fails(pair: Pair, service: AwsService, relay: Relay) -> None:
    window = pair.start("subscribe", *relay.to_broker(service), "--duration", "3")
    window.await_line("ELF listening on 2 things")
    relay.down()
    assert "ended without a connection" in window.end(1).err


@pytest.mark.long
def test_a_larger_fleet_rides_out_an_outage(
    elf: Elf, account: Account, connect: Callable[[Account], Client], service: AwsService, relay: Relay
) -> None:
    elf("create", 25, "--rate", 200)
    elf("send", *elf.to_broker, "--duration", "0.01", "--rate", 200)
    ear = connect(account)
    ear.subscribe("elf/#")
    window = elf.start("send", *relay.to_broker(service), "--duration", "5", "--interval", "0.5", "--verbose")
    window.await_line("posting message")
    relay.down()
    window.await_line(r"thing_24 lost its connection")
    window.await_line(r"waiting for \d+ acknowledgements")
    relay.up()
    result = window.end()
    assert "ELF sent 250 messages from 25 things: 250 acknowledged, 0 lost" in result.err
    assert_all_heard(result, ear, 250)


@pytest.mark.long
def test_many_reconnections_leak_no_thread_and_no_open_file(pair: Pair, service: AwsService, relay: Relay) -> None:
    window = pair.start("subscribe", *relay.to_broker(service), "--duration", "120")
    window.await_line("ELF listening on 2 things")

    def cut(times: int) -> None:
        for _ in range(times):
            seen = window.count(" reconnected to ")
            relay.cut()
            window.await_count(" reconnected to ", seen + 2)

    process = psutil.Process(window.process.pid)
    cut(3)
    threads, files = process.num_threads(), process.num_fds()
    cut(8)
    assert process.num_threads() <= threads + 4  # those of a connection just lost go on for a second
    assert process.num_fds() <= files + 8


def test_a_connection_that_is_cut_is_said_to_be_and_comes_back(
    pair: Pair, ear: Client, service: AwsService, relay: Relay
) -> None:
    window = pair.start("send", *relay.to_broker(service), "--duration", "5", "--interval", "0.1")
    window.await_line("posting message")
    relay.cut()
    for name in pair.recorded():
        window.await_line(f"{name} lost its connection to localhost:{relay.port}")
        window.await_line(f"{name} reconnected to localhost:{relay.port}")
    result = window.end()
    assert re.search("ELF sent 100 messages from 2 things: 100 acknowledged, 0 lost", result.err)
    heard = [message.payload.decode() for message in ear.hear_all()]
    assert set(re.findall(r"posting message:'(.*)' on topic", result.err)) == set(heard)
