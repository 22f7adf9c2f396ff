"""Which topics things publish to and subscribe to."""

from __future__ import annotations

from types import ModuleType

import pytest
from support.failures import Explained
from support.mqtt import Client
from support.shell import InProcess, Pair

from iot_elf.messages import topic_problem

ONCE = ("--duration", "0.01")


@pytest.mark.parametrize(
    ("options", "topics"),
    [
        ((), ["elf/thing_0", "elf/thing_1"]),
        (("--append-thing-name",), ["elf/thing_0", "elf/thing_1"]),
        (("--topic", "some/where"), ["some/where", "some/where"]),
        (("--topic", "some/where", "--append-thing-name"), ["some/where/thing_0", "some/where/thing_1"]),
        (("--topic", "a/{thing_name}/b"), ["a/thing_0/b", "a/thing_1/b"]),
        (("--topic", "{thing_name}", "--append-thing-name"), ["thing_0/thing_0", "thing_1/thing_1"]),
        (("--topic", "{other} {}"), ["{other} {}", "{other} {}"]),
    ],
)
def test_send_publishes_to(
    main_of_pair: InProcess, pair: Pair, ear: Client, options: tuple[str, ...], topics: list[str]
) -> None:
    main_of_pair("send", *pair.to_broker, *ONCE, *options)
    assert sorted(heard.topic for heard in ear.hear_all()) == topics


@pytest.mark.parametrize(
    ("options", "filters"),
    [
        ((), ["elf/#", "elf/#"]),
        (("--append-thing-name",), ["elf/thing_0", "elf/thing_1"]),
        (("--topic", "some/+/where"), ["some/+/where", "some/+/where"]),
        (("--topic", "some/#"), ["some/#", "some/#"]),
        (("--topic", "some", "--append-thing-name"), ["some/thing_0", "some/thing_1"]),
        (("--topic", "$aws/things/{thing_name}/#"), ["$aws/things/thing_0/#", "$aws/things/thing_1/#"]),
    ],
)
def test_subscribe_listens_on(
    main_of_pair: InProcess, pair: Pair, options: tuple[str, ...], filters: list[str]
) -> None:
    lines = main_of_pair("subscribe", *pair.to_broker, *ONCE, *options).lines
    assert sorted(line for line in lines if " subscribed to " in line) == [
        f"ELF thing_{number} subscribed to topic: {topic_filter}" for number, topic_filter in enumerate(filters)
    ]


def test_subscribe_hears_only_its_topic(pair: Pair, ear: Client) -> None:
    window = pair.subscribe("--topic", "some/+/{thing_name}", "--count", 2)
    for topic in ("some/thing_0", "some/x/y", "elf/thing_0", "some/x/thing_0", "some/x/thing_1"):
        ear.publish(topic, "x")
    assert sorted(window.end().received) == [("some/x/thing_0", "x"), ("some/x/thing_1", "x")]


SEVEN_SLASHES = "1/2/3/4/5/6/7/8"


@pytest.mark.parametrize("topic", [SEVEN_SLASHES, "x" * 256, "ü" * 128, "/", "with space/ü"])
def test_an_unusual_topic_that_aws_takes_is_used(main_of_pair: InProcess, pair: Pair, ear: Client, topic: str) -> None:
    main_of_pair("send", *pair.to_broker, *ONCE, "--topic", topic)
    assert [heard.topic for heard in ear.hear_all()] == [topic, topic]


@pytest.mark.parametrize(
    ("command", "topic", "problem"),
    [
        ("send", "a/+/b", "not for a topic to publish to"),
        ("send", "a/#", "not for a topic to publish to"),
        ("send", SEVEN_SLASHES + "/9", "more than AWS IoT's 7 slashes"),
        ("send", "x" * 257, "longer than AWS IoT's 256 bytes"),
        ("send", "ü" * 129, "longer than AWS IoT's 256 bytes"),
        ("send", "{thing_name}" * 40, "longer than AWS IoT's 256 bytes"),
        ("send", "a\0b", "null character"),
        ("send", "$SYS/broker/uptime", "lets no client publish"),
        ("send", "$aws/events/presence/connected/x", "lets no client publish"),
        ("send", "$aws/things/{thing_name}/shadow/update/accepted", "lets no client publish"),
        ("subscribe", "a/#/b", "# the last level"),
        ("subscribe", "a#", "# the last level"),
        ("subscribe", "a+/b", "a whole level"),
        ("subscribe", SEVEN_SLASHES + "/#", "more than AWS IoT's 7 slashes"),
        ("subscribe", "x" * 257, "longer than AWS IoT's 256 bytes"),
        ("subscribe", "$aws/rules/r/#", "not to subscribers"),
        ("send", "", "the topic is empty"),
        ("subscribe", "", "the topic is empty"),
    ],
)
def test_a_topic_that_aws_does_not_take_is_refused(
    main_of_pair: InProcess, pair: Pair, command: str, topic: str, problem: str, explained: Explained
) -> None:
    result = main_of_pair(command, *pair.to_broker, *ONCE, "--topic", topic, status=2)
    shown = repr(topic.replace("{thing_name}", "thing_0")[:300])
    explained(result, "BadTopic", problem, shown, f"--topic (see `python elf.py {command} --help`)")
    assert len(result.lines) == 2  # nothing was done before


def test_more_subscriptions_than_a_connection_may_have_are_refused(
    main_of_pair: InProcess, pair: Pair, explained: Explained
) -> None:
    filters = [word for number in range(51) for word in ("--topic", str(number))]
    result = main_of_pair("subscribe", *pair.to_broker, *ONCE, *filters, status=2)
    explained(result, "TooManySubscriptions", "50", "51", "--topic", "(see `python elf.py subscribe --help`)")
    assert len(result.lines) == 2
    assert main_of_pair("subscribe", *pair.to_broker, *ONCE, *filters[2:])


# What AWS's page of reserved topics lets a client do with each of them.
# https://docs.aws.amazon.com/iot/latest/developerguide/reserved-topics.html
THING = "$aws/things/t"
ANSWERS = ("accepted", "rejected")
PUBLISH = [
    "$aws/rules/my_rule",
    "$aws/rules/my_rule/any/thing",
    *(f"{THING}/shadow/{verb}" for verb in ("get", "update", "delete")),
    *(f"{THING}/shadow/name/n/{verb}" for verb in ("get", "update", "delete")),
    *(f"{THING}/jobs/{verb}" for verb in ("get", "start-next", "j/get", "j/update", "$next/get")),
    *(f"{THING}/defender/metrics/{kind}" for kind in ("json", "cbor")),
    *(f"{THING}/streams/s/{verb}/{kind}" for verb in ("describe", "get") for kind in ("json", "cbor")),
    *(f"$aws/certificates/{verb}/{kind}" for verb in ("create", "create-from-csr") for kind in ("json", "cbor")),
    *(f"$aws/provisioning-templates/p/provision/{kind}" for kind in ("json", "cbor")),
    "$aws/device_location/t/get_position_estimate",
    *(
        f"$aws/commands/{whose}/t/executions/e/response{kind}"
        for whose in ("things", "clients")
        for kind in ("", "/json", "/cbor", "/protobuf")
    ),
]
# Those that the pages of other services let a client publish to, and this one leaves out.
PUBLISH_ELSEWHERE = [
    f"{THING}/greengrass/health/json",
    f"{THING}/greengrassv2/health/json",
    *(
        f"$aws/iotfleetwise/vehicles/v/{end}"
        for end in ("checkins", "signals", "command/response", "last_known_states/data")
    ),
]
SUBSCRIBE = [
    "$aws/sitewise/asset-models/m/assets/a/properties/p",
    "$aws/events/presence/connected/c",
    "$aws/events/#",
    "$aws/events/thingGroupHierarchy/thingGroup/p/childThingGroup/c/added",
    *(
        f"{topic}/{answer}"
        for topic in PUBLISH
        for answer in ANSWERS
        if "/streams/" not in topic and "/rules/" not in topic
    ),
    *(f"{THING}/shadow/update/{news}" for news in ("delta", "documents")),
    *(f"{THING}/shadow/name/n/update/{news}" for news in ("delta", "documents")),
    *(f"{THING}/jobs/{news}" for news in ("notify", "notify-next")),
    *(f"{THING}/streams/s/{news}/json" for news in ("data", "description", "rejected")),
    f"{THING}/tunnels/notify",
    *(f"$aws/commands/things/t/executions/e/request{kind}" for kind in ("", "/json")),
    "$aws/commands/things/t/executions/e/response/accepted/json",  # eight slashes
    "$aws/things/+/shadow/#",
]


@pytest.mark.parametrize(
    ("topic", "verbs"),
    [
        *((topic, "publish") for topic in PUBLISH + PUBLISH_ELSEWHERE),
        *((topic, "subscribe") for topic in SUBSCRIBE),
        ("$aws/no/such/topic", ""),
        ("$aws/iotfleetwise/vehicles/v/decoder_manifests", ""),
        ("$aws/commands/things/t/executions/e/response/xml", ""),
        ("$aws/things/t/shadow/name/n", ""),
        ("$aws/rules", ""),
        ("$aws/rules/", ""),
        ("$SYS/broker/uptime", ""),
    ],
)
def test_a_reserved_topic_is_used_as_aws_lets_one(module: ModuleType, topic: str, verbs: str) -> None:
    """What to listen to is left to AWS, but for what it is known never to deliver."""
    wild = "+" in topic or "#" in topic
    assert (topic_problem(topic, wildcards=False) is None) == (verbs == "publish"), topic
    if verbs == "subscribe" or wild:
        assert topic_problem(topic, wildcards=True) is None, topic
    assert (topic_problem(topic, wildcards=True) is None) != topic.startswith("$aws/rules/")


@pytest.mark.parametrize(
    ("topic", "wildcards", "problem"),
    [
        ("$aws/rules/my_rule/" + "x" * 256, False, None),
        ("$aws/rules/my_rule/" + "x" * 257, False, "256 bytes"),
        (f"$aws/rules/my_rule/{SEVEN_SLASHES}", False, None),
        (f"$aws/rules/my_rule/{SEVEN_SLASHES}/9", False, "7 slashes"),
        (f"$share/group/{SEVEN_SLASHES}", True, None),
        (f"$share/group/{SEVEN_SLASHES}/9", True, "7 slashes"),
        ("$share/group/" + "x" * 256, True, None),
        ("$share/group/" + "x" * 257, True, "256 bytes"),
        ("$share/group/a", False, "lets no client publish"),
        ("$share/group", True, "$share/GROUP/FILTER"),
        ("$share/group/", True, "$share/GROUP/FILTER"),
        ("$share//elf/#", True, "$share/GROUP/FILTER"),
        (f"a/$aws/rules/r/{SEVEN_SLASHES}", False, "7 slashes"),
    ],
)
def test_what_aws_does_not_count_of_a_topic_is_not_counted(
    module: ModuleType, topic: str, wildcards: bool, problem: str | None
) -> None:
    found = topic_problem(topic, wildcards)
    assert problem in found if problem else found is None
