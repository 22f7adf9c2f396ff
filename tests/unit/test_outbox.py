"""What a thing has to send: in which order, and how much AWS lets it have under way."""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import NamedTuple

import pytest
from support.program import Limits, constant

from iot_elf.errors import UsageError
from iot_elf.outbox import Outbox, OutgoingMessage


class Text(NamedTuple):
    """A message that says where it went."""

    text: str
    topic: str = ""

    def payload(self, topic: str, thing: str, number: int) -> bytes:
        if self.text == "bad":
            raise UsageError("Name", "it can't be sent", "send another")
        return f"{topic} {thing} {number} {self.text}".encode()


def outbox(*texts: str, qos: int = 1, sent: bool = False) -> Outbox:
    """One with messages that were due at 100, 101 and so on, and if they were `sent`, at 200, 201 and so on."""
    its = Outbox("thing_0", "elf/thing_0", qos)
    for number, text in enumerate(texts):
        assert its.add(Text(text), 100.0 + number) is False
        if sent:
            write(its, 200.0 + number)
    return its


def write(its: Outbox, at: float) -> OutgoingMessage:
    """Take the next message, and give all of it to a connection."""
    message = its.take(at)
    message.written_at = at
    message.sendings += 1
    return message


def facts(message: OutgoingMessage) -> tuple[int, bytes, float, int]:
    return message.number, message.payload, message.late_s, message.sendings


def numbers(its: Outbox) -> list[int]:
    """Those of all that it has to send."""
    taken = []
    while its.has_due:
        taken.append(its.take(300.0).number)
    return taken


def test_a_message_goes_to_its_own_topic_if_it_has_one() -> None:
    its = outbox("a")
    its.add(Text("b", "own/topic"), 101.0)
    taken = [its.take(102.0), its.take(103.0)]
    assert [each.topic for each in taken] == ["elf/thing_0", "own/topic"]
    assert [each.payload for each in taken] == [b"elf/thing_0 thing_0 1 a", b"own/topic thing_0 2 b"]


def test_messages_are_sent_in_the_order_in_which_they_were_due() -> None:
    its = outbox("a", "b")
    assert its.has_due
    assert facts(its.take(107.5)) == (1, b"elf/thing_0 thing_0 1 a", 7.5, 0)
    assert facts(its.take(108.0)) == (2, b"elf/thing_0 thing_0 2 b", 7.0, 0)
    assert not its.has_due


@pytest.mark.parametrize("text", ["a", "bad"])
def test_a_message_is_counted_while_it_is_rendered(text: str) -> None:
    """Or `send` would end, and call it lost, because nothing is due any more."""

    class Rendered(NamedTuple):
        topic: str = ""

        def payload(self, topic: str, thing: str, number: int) -> bytes:
            seen.append(its.backlog)
            return Text(text).payload(topic, thing, number)

    seen: list[int] = []
    its = Outbox("thing_0", "elf/thing_0", 1)
    its.add(Rendered(), 100.0)
    with contextlib.suppress(UsageError):
        its.take(101.0)
    assert seen == [1]
    assert (its.backlog, its.has_due) == (int(text == "a"), False)


def test_messages_are_sent_again_in_the_order_in_which_they_were_sent() -> None:
    its = outbox(*"abcde", sent=True)
    its.finish(2, 300.0)
    assert its.lose_connection() == []
    its.add(Text("new"), 300.0)
    assert [facts(write(its, 310.0)) for _ in range(5)] == [
        (1, b"elf/thing_0 thing_0 1 a", 100.0, 2),
        (3, b"elf/thing_0 thing_0 3 c", 100.0, 2),
        (4, b"elf/thing_0 thing_0 4 d", 100.0, 2),
        (5, b"elf/thing_0 thing_0 5 e", 100.0, 2),
        (6, b"elf/thing_0 thing_0 6 new", 10.0, 1),
    ]


def test_a_second_loss_sends_all_again_from_the_first_that_is_not_acknowledged() -> None:
    its = outbox(*"abcd", sent=True)
    its.lose_connection()
    its.take(300.0)
    its.take(300.0)
    its.finish(1, 300.0)
    its.lose_connection()
    assert numbers(its) == [2, 3, 4]
    assert numbers(its) == []  # nothing more than once a loss


def test_at_qos_0_nothing_is_sent_again() -> None:
    its = outbox("a", "b", qos=0, sent=True)
    its.finish(1, 300.0)  # it is written
    assert its.backlog == 1
    assert [lost.number for lost in its.lose_connection()] == [2]
    assert (its.backlog, its.has_due, its.in_flight) == (0, False, {})


def test_what_no_connection_took_as_a_whole_was_not_sent() -> None:
    its = outbox("a", "b", sent=True)
    its.add(Text("c"), 300.0)
    its.add(Text("d"), 300.0)
    its.take(300.0)
    assert its.drop_unsent() == 2
    assert ([*its.in_flight], its.drop_unsent()) == ([1, 2], 0)


def test_the_oldest_message_is_awaited_from_when_it_could_have_been_acknowledged() -> None:
    its = outbox("a", "b", "c")
    assert its.waits_since == math.inf
    its.take(200.0).written_at = 207.0
    assert its.waits_since == 207.0  # when the last part of it left
    write(its, 210.0)
    write(its, 220.0)
    its.finish(2, 230.0)
    assert its.waits_since == 207.0  # the broker has skipped it
    its.finish(1, 240.0)
    assert its.waits_since == 240.0  # in a slow network, one after the other
    its.lose_connection()
    assert its.waits_since == math.inf  # until it is sent again
    write(its, 300.0)
    assert its.waits_since == 300.0


def test_a_message_that_can_not_be_made_takes_a_number_and_is_gone() -> None:
    its = outbox("a", "bad", "c")
    its.take(200.0)
    with pytest.raises(UsageError):
        its.take(200.0)
    assert (its.backlog, [*its.in_flight]) == (2, [1])
    assert its.take(200.0).payload == b"elf/thing_0 thing_0 3 c"


def test_an_acknowledgement_counts_once_and_from_when_the_message_was_first_sent() -> None:
    its = outbox("a", "b", sent=True)
    its.lose_connection()
    its.take(300.0)
    found = [its.finish(number, 300.0) for number in (1, 1, 7)]
    assert [each and (each.taken_at, each.due) for each in found] == [(200.0, 100.0), None, None]
    assert its.backlog == 1


def test_the_backlog_is_what_waits_to_be_sent_or_acknowledged() -> None:
    its = outbox("a", "b", "c")
    assert its.backlog == 3
    write(its, 200.0)
    assert its.backlog == 3
    its.lose_connection()
    assert its.backlog == 3  # not four
    assert its.drop_unsent() == 2
    assert (its.backlog, [*its.in_flight], its.drop_unsent()) == (1, [1], 0)


def test_in_an_outage_the_oldest_messages_are_given_up_for_new_ones(limits: Limits) -> None:
    limits(MAX_QUEUED=3)
    its = outbox("a", "b", "c")
    assert its.add(Text("d"), 103.0)
    assert its.add(Text("e"), 104.0)
    assert [its.take(200.0).payload.split()[-1] for _ in range(3)] == [b"c", b"d", b"e"]
    assert not its.has_due


def test_an_outage_of_ten_thousand_messages_loses_none() -> None:
    its = outbox(*["a"] * 10_000)
    assert its.add(Text("one more"), 0.0) is True


@pytest.mark.parametrize(
    ("sent", "acknowledged", "sent_again", "is_full"),
    [
        (2, 0, None, False),
        (3, 0, None, True),
        (3, 1, None, False),
        (3, 0, 0, False),  # all of them wait to be sent again
        (3, 0, 2, False),
        (3, 0, 3, True),
    ],
)
def test_the_window_is_what_was_sent_on_this_connection_and_not_acknowledged(
    limits: Limits, sent: int, acknowledged: int, sent_again: int | None, is_full: bool
) -> None:
    limits(MAX_IN_FLIGHT=3)
    its = outbox(*["a"] * sent, sent=True)
    for number in range(1, 1 + acknowledged):
        its.finish(number, 300.0)
    if sent_again is not None:
        its.lose_connection()
        for _ in range(sent_again):
            its.take(300.0)
    assert its.is_window_full == is_full


def test_a_full_window_goes_out_again_after_a_loss_and_then_what_is_new() -> None:
    its = outbox(*["a"] * 100, sent=True)
    assert its.is_window_full  # AWS's 100
    its.lose_connection()
    its.add(Text("new"), 300.0)
    again: list[int] = []
    while not its.is_window_full:
        again.append(its.take(300.0).number)
    assert again == [*range(1, 101)]
    its.finish(1, 300.0)
    assert not its.is_window_full
    assert its.take(300.0).number == 101


@pytest.mark.parametrize(
    ("size", "per_s"),
    [(0, 100), (5_242, 100), (8_192, 64), (16 * 1024, 32), (128 * 1024, 4)],  # 100 messages, or 512 KiB
)
def test_a_connection_sends_as_fast_as_aws_allows_and_not_faster(size: int, per_s: float) -> None:
    its = outbox()
    now, sent = 1000.0, list[float]()
    while now < 1010.0:
        its.count_sent(bytes(size), now)
        sent.append(now)
        now = max(now, its.free_at)
    burst = constant("BURST_S") * per_s + 1
    assert 10 * per_s - 1 <= len(sent) <= 10 * per_s + burst + 1
    assert sent.count(1000.0) == int(burst)
    pauses = [later - earlier for earlier, later in itertools.pairwise(sent[20:])]
    assert pauses == pytest.approx([1 / per_s] * len(pauses), rel=1e-6)


def test_a_connection_that_was_quiet_may_not_make_up_for_it() -> None:
    its = outbox()
    its.count_sent(b"", 1000.0)
    its.count_sent(b"", 2000.0)
    assert its.free_at == pytest.approx(2000.01 - 0.1)


@pytest.mark.parametrize(("size", "after_s"), [(0, 1.0), (128 * 1024, 1.0)])
def test_what_is_retained_goes_out_once_a_second_also_after_an_outage(size: int, after_s: float) -> None:
    its = Outbox("thing_0", "elf/thing_0", 1, retain=True)
    its.count_sent(bytes(size), 1000.0)
    its.count_sent(bytes(size), its.free_at)
    assert its.free_at == pytest.approx(1000.0 + 2 * after_s - constant("BURST_S"))


def test_a_new_connection_may_send_at_once() -> None:
    assert outbox().free_at < 0.0


def test_why_a_message_is_late_is_said_in_the_numbers_that_aws_publishes() -> None:
    assert constant("RATE_LIMIT") == "AWS allows 100 messages/s and 512 KiB/s per connection"
    assert outbox().rate_limit == constant("RATE_LIMIT")
    assert Outbox("thing_0", "elf/thing_0", 1, retain=True).rate_limit == "AWS allows 1 retained message/s per topic"
    assert constant("IN_FLIGHT_LIMIT").startswith("AWS allows 100 unacknowledged messages per connection")
