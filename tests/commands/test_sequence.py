"""Proof that messages arrived: `send --sequence` numbers them, and `subscribe` counts what is missing."""

from __future__ import annotations

import contextlib
import json
import random
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.aws import AwsService
from support.failures import Explained
from support.mqtt import SUBSCRIBE, Broker, Client, Peer, answer_to, publish
from support.mqtt_proxy import DROP, REPEAT, REPEAT_LATER, SWAP, MqttProxy
from support.networks import Relay
from support.program import Limits
from support.shell import InProcess, Pair

from iot_elf.sequences import SequenceChecker

RUN = 30  # messages of a thing
SOUND = '{"thing": "%s", "seq": %d, "run": "%s"}'


@pytest.fixture
def broker_with(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    """Make a broker that has these messages for thing_0 once it has subscribed, some of them retained."""

    def make(messages: list[str], retained: list[str] | None = None) -> Broker:
        def deliver(peer: Peer) -> None:
            peer.send(answer_to(peer.packets[0]))
            for asked in peer:
                peer.send(answer_to(asked))
                if asked.kind == SUBSCRIBE:
                    for is_retained, texts in ((True, retained or []), (False, messages)):
                        for text in texts:
                            peer.send(publish(b"elf/x", text.encode(), retain=is_retained))

        return stack.enter_context(contextlib.closing(Broker(tmp_path, {"thing_0": [deliver]})))

    with contextlib.ExitStack() as stack:
        yield make


@pytest.mark.parametrize(
    ("options", "begins"),
    [
        (("Hello",), r'\{"msg": "Hello", "ts": "\d+\.\d{3}"'),
        (("--json-message", "{}"), r'\{"ts": "\d+\.\d{3}"'),
        (("--json-message", '{"ts": 1, "n": 1e0 } '), r'\{"ts": 1, "n": 1e0 '),
        (("--topic", "$aws/rules/some/{thing_name}"), r'\{"msg": "IoT ELF Hello", "ts": "\d+\.\d{3}"'),
    ],
)
def test_sequence_adds_the_thing_its_number_and_the_run(
    main_of_pair: InProcess, pair: Pair, tmp_path: Path, options: tuple[str, ...], begins: str
) -> None:
    if options[0] == "--json-message":
        (tmp_path / "message.json").write_text(options[1])
        options = "--json-message", str(tmp_path / "message.json")
    always = ("--sequence", "--count", 3, "--interval", "0.01", "--output", "json")
    runs = []
    for _ in range(2):
        out = main_of_pair("send", *pair.to_broker, *always, *options).out
        sent = [event for event in map(json.loads, out.splitlines()) if event["event"] == "sent"]
        for thing in pair.recorded():
            found = [
                re.fullmatch(
                    rf'{begins}, "thing": "{thing}", "seq": (\d), "run": "([0-9a-f]{{8}})"\}}\s?', each["payload"]
                )
                for each in sent
                if each["thingName"] == thing
            ]
            assert [match and match[1] for match in found] == ["1", "2", "3"]
            runs += [match[2] for match in found if match]
    assert len(set(runs)) == 2
    assert len(set(runs[:6])) == 1


@pytest.mark.parametrize(
    ("options", "failure", "fact"),
    [
        *((("--json-message", f'{{"{name}": 1}}'), "SequenceTaken", f"'{name}'") for name in ("thing", "seq", "run")),
        (("--raw",), "SequenceUseless", "--raw"),
        (("--topic", "$aws/things/{thing_name}/shadow/get"), "SequenceUseless", "AWS IoT's own topics"),
    ],
)
def test_a_sequence_that_can_not_be_is_wrong_usage(
    main_of_pair: InProcess,
    pair: Pair,
    tmp_path: Path,
    options: tuple[str, ...],
    failure: str,
    fact: str,
    explained: Explained,
) -> None:
    if options[0] == "--json-message":
        (tmp_path / "message.json").write_text(options[1])
        options = "--json-message", str(tmp_path / "message.json")
    result = main_of_pair("send", *pair.to_broker, "--sequence", *options, status=2)
    explained(result, failure, fact, "--sequence")
    assert "posting" not in result.err


def test_lines_are_numbered_as_they_leave(pair: Pair, ear: Client) -> None:
    lines = b'{"n": 1}\n{"seq": 7}\ntext\n'
    result = pair("send", *pair.to_broker, "--sequence", "--json-message", "-", feed=lines, status=1)
    assert "line 2 is not sent: the message already has 'seq'" in result.err
    heard = [json.loads(message.payload) for message in ear.hear_all() if message.topic == "elf/thing_0"]
    assert [(each.get("n"), each.get("msg"), each["seq"]) for each in heard] == [(1, None, 1), (None, "text", 2)]


def summary_of(out: str) -> dict[str, Any]:
    return dict(json.loads(out.splitlines()[-1]))


@pytest.mark.parametrize(
    ("seed", "kinds"),
    [
        (1, [DROP, REPEAT, REPEAT_LATER, SWAP]),
        (2, [DROP, REPEAT, REPEAT_LATER, SWAP]),
        (3, [REPEAT, REPEAT_LATER, SWAP]),
    ],
)
def test_the_figures_are_those_of_a_broker_that_drops_repeats_and_swaps(
    main_of_pair: InProcess, pair: Pair, service: AwsService, tmp_path: Path, seed: int, kinds: list[str]
) -> None:
    with contextlib.closing(MqttProxy(tmp_path, pair, service, seed, RUN, kinds)) as proxy:
        count = 2 * proxy.passed_on()
        window = pair.start("subscribe", *proxy.to_broker, "--count", count, "--output", "json")
        window.await_line("ELF listening on")
        for _ in range(2):
            main_of_pair("send", *pair.to_broker, "--sequence", "--count", RUN, "--interval", "0.01")
        result = window.end(1 if DROP in kinds else 0)
    summary = summary_of(result.out)
    done = {
        thing: {
            name: proxy.done[thing, what]
            for name, what in {"missing": DROP, "repeated": REPEAT, "outOfOrder": SWAP}.items()
        }
        for thing in pair.recorded()
    }
    assert summary["received"] == count
    assert summary["senders"] == {thing: {name: n for name, n in its.items() if n} for thing, its in done.items()}
    for name in ("missing", "repeated", "outOfOrder"):
        assert summary[name] == done["thing_0"][name] + done["thing_1"][name]
    assert {kind: proxy.done["thing_0", kind] > 0 for kind in (DROP, REPEAT, SWAP)} == {
        kind: kind in kinds for kind in (DROP, REPEAT, SWAP)
    }


FIGURES: dict[str, tuple[list[int], dict[str, int]]] = {
    "all": ([1, 2, 3], {}),
    "from_the_middle_on": ([7, 8, 9], {}),
    "one_alone": ([4], {}),
    "a_gap": ([1, 4], {"missing": 2}),
    "a_gap_that_is_filled": ([1, 4, 2, 3], {"outOfOrder": 2}),
    "a_gap_that_is_filled_in_part": ([1, 5, 3], {"missing": 2, "outOfOrder": 1}),
    "the_first_later": ([2, 1, 3], {"outOfOrder": 1}),
    "a_gap_before_the_first": ([5, 3, 6], {"missing": 1, "outOfOrder": 1}),
    "twice": ([1, 1, 2, 2, 2], {"repeated": 3}),
    "twice_and_late": ([1, 3, 2, 2], {"repeated": 1, "outOfOrder": 1}),
    "the_first_again": ([1, 2, 3, 1], {"repeated": 1}),
}


def test_missing_messages_are_counted_by_sender_number_and_run(
    main_of_pair: InProcess, broker_with: Callable[..., Broker], explained: Explained
) -> None:
    messages = [SOUND % (thing, n, run) for thing, (its, _) in FIGURES.items() for run in "ab" for n in its]
    messages += [json.dumps({"thing": "without_run", "seq": n, "more": [n]}) for n in (1, 2, 4)]
    between = broker_with(messages, retained=[SOUND % ("all", 99, "a")])
    options = ("--things", 1, "--count", len(messages) + 1, "--output", "json")
    result = main_of_pair("subscribe", *between.to_broker, *options, status=1)
    summary = summary_of(result.out)
    explained(result, "MessagesMissing", f"{summary['missing']} messages")
    expected = {thing: {name: 2 * n for name, n in its.items()} for thing, (_, its) in FIGURES.items() if its}
    assert summary["senders"] == {**expected, "without_run": {"missing": 1}}
    for name in ("missing", "repeated", "outOfOrder"):
        assert summary[name] == sum(its.get(name, 0) for its in summary["senders"].values())
    assert "[subscribe] from a_gap: 4 missing, 0 repeated, 0 out of order" in result.lines


def test_what_can_not_be_remembered_is_said_and_is_no_success(
    main_of_pair: InProcess, broker_with: Callable[..., Broker], limits: Limits, explained: Explained
) -> None:
    limits(MAX_SENDERS=2)
    between = broker_with([SOUND % (thing, number, "") for thing in "abcabc" for number in (1, 2)])
    options = ("--things", 1, "--count", 12, "--output", "json")
    result = main_of_pair("subscribe", *between.to_broker, *options, status=1)
    explained(result, "SequenceInexact", "not exact", "--things")
    assert (summary_of(result.out)["missing"], summary_of(result.out)["exact"]) == (0, False)


LONG = f'"{"x" * 129}"'
ODD = [
    *(f'"seq": {number}' for number in ("0", "-1", "1.5", "2.0", "true", "null", '"3"', "[]", "1e3", "9" * 400)),
    *(f'"seq": 3, "thing": {thing}' for thing in ("7", "null", "{}", LONG)),
    *(f'"seq": 3, "run": {run}' for run in ("7", "null", LONG)),
    f'"seq": {"9" * 9999}',
]


def test_messages_without_a_thing_and_a_number_are_not_counted(
    main_of_pair: InProcess, broker_with: Callable[..., Broker]
) -> None:
    odd = [f'{{"thing": "sensor", {members}}}' for members in ODD]
    odd += ['{"seq": 3}', "[1]", "3", "", "sensor 3", "[" * 100_000]
    messages = [SOUND % ("sensor", 1, ""), *odd, SOUND % ("\\ud800\\u001b[2J", 1, ""), SOUND % ("sensor", 2, "")]
    between = broker_with(messages)
    options = ("--things", 1, "--count", len(messages), "--output", "json")
    result = main_of_pair("subscribe", *between.to_broker, *options)
    summary = summary_of(result.out)
    assert summary["received"] == len(messages)
    assert (summary["missing"], summary["repeated"], summary["outOfOrder"], summary["senders"]) == (0, 0, 0, {})
    assert result.lines[-1].endswith("on 1 thing, 0 missing, 0 repeated, 0 out of order")


def test_messages_under_way_at_the_end_are_not_missing(
    main_of_pair: InProcess, broker_with: Callable[..., Broker]
) -> None:
    between = broker_with([SOUND % ("sensor", number, "") for number in (1, 2, 5, 4, 4, 3, 3, 9)])
    options = ("--things", 1, "--count", 3, "--output", "json")
    summary = summary_of(main_of_pair("subscribe", *between.to_broker, *options).out)
    assert (summary["received"], summary["senders"]) == (3, {"sensor": {"outOfOrder": 2}})


def test_a_shared_subscription_counts_no_missing_messages(
    main_of_pair: InProcess, broker_with: Callable[..., Broker]
) -> None:
    between = broker_with([SOUND % ("sensor", number, "") for number in (1, 5)])
    options = ("--things", 1, "--topic", "$share/some/elf/#", "--count", 2, "--output", "json")
    summary = summary_of(main_of_pair("subscribe", *between.to_broker, *options).out)
    assert summary.keys().isdisjoint({"missing", "repeated", "outOfOrder", "senders"})


def test_missing_messages_show_in_the_live_line_and_in_the_report(
    pair: Pair, broker_with: Callable[..., Broker]
) -> None:
    between = broker_with([SOUND % ("sensor", number, "") for number in (1, 3, 3)])
    terminal = pair.in_terminal("subscribe", *between.to_broker, "--things", 1, "--duration", "0.5", columns=200)
    assert terminal.status == 1
    assert any("received 3, 1 missing, 1 repeated, 0 out of order | " in text for text in terminal.drawn)
    assert any("1 message did not arrive" in line for line in terminal.seen)


def test_what_is_sent_while_nobody_hears_it_is_missing(
    pair: Pair, service: AwsService, ear: Client, relay: Relay
) -> None:
    options = ("--things", 1, "--count", 4, "--output", "json")
    window = pair.start("subscribe", *relay.to_broker(service), *options)
    window.await_line("ELF listening on")
    for number in range(1, 8):
        if number == 3:
            window.await_count("Received message", 2)
            relay.down()
            window.await_line("thing_0 lost its connection")
        if number == 6:
            relay.up()
            window.await_line("thing_0 reconnected to ")
        ear.publish("elf/x", SOUND % ("sensor", number, ""))
    result = window.end(1)
    assert summary_of(result.out)["senders"] == {"sensor": {"missing": 3}}
    assert "3 messages did not arrive" in result.err


def test_a_sender_is_remembered_as_a_range_and_its_gaps(module: ModuleType) -> None:
    """The figures are those of sets of all numbers, and what is remembered does not grow."""
    chance = random.Random(14)
    arrivals = SequenceChecker()
    figures = {"missing": 0, "repeated": 0, "outOfOrder": 0}
    for run in range(200):
        numbers = sorted(chance.choices(range(1, 60), k=60), key=lambda number: number + chance.gauss(0, run % 7))
        seen: set[int] = set()
        for number in numbers:
            figures["repeated"] += number in seen
            figures["outOfOrder"] += number not in seen and number < max(seen, default=0)
            seen.add(number)
            arrivals.add("thing_0", {"thing": f"thing_{run % 9}", "seq": number, "run": str(run)}, is_over=False)
        figures["missing"] += max(seen) - min(seen) + 1 - len(seen)
    assert arrivals.counts == figures
    assert all(figures.values())


def test_neither_a_day_nor_a_crowd_of_senders_takes_more_memory(module: ModuleType, limits: Limits) -> None:
    limits(MAX_SENDERS=100)
    arrivals = SequenceChecker()

    def hear(runs: range, numbers: range) -> int:
        for number in numbers:
            for run in runs:
                arrivals.add("thing_0", {"thing": f"thing_{run}", "seq": number, "run": f"{run}"}, is_over=False)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        filled = hear(range(100), range(100_001, 100_201, 2))  # more gaps than are remembered of each
        assert arrivals.counts["missing"] == 100 * 99
        a_day = hear(range(100), range(100_201, 100_801, 2))
        assert not arrivals.is_exact  # they stay missing
        crowd = hear(range(1000, 6000), range(1, 5, 2))
    finally:
        tracemalloc.stop()
    assert max(a_day, crowd) < filled * 1.1
