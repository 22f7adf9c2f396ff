# SPDX-License-Identifier: Apache-2.0
"""Payloads, files of messages, topics."""

from __future__ import annotations

import codecs
import contextlib
import errno
import functools
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

from iot_elf import defaults
from iot_elf.errors import ElfError, UsageError
from iot_elf.events import EventQueue
from iot_elf.text import log, plural, redacted

ADDED_MEMBERS = frozenset(("ts", "thing", "seq", "run"))  # members that ELF adds; all but the first with --sequence
JSONL_SUFFIX = ".jsonl"  # the suffix of a file with one message per line
LINE_SUFFIXES = (JSONL_SUFFIX, ".ndjson")  # in any case
# https://docs.aws.amazon.com/general/latest/gr/iot-core.html: limits of the message broker
MAX_TOPIC_BYTES = 256
MAX_TOPIC_SLASHES = 7
MAX_SUBSCRIPTIONS = 50  # a connection
MAX_WILL_BYTES = 65_535  # MQTT 3.1.1, 3.1.3.3
# The slashes and bytes of these do not count. AWS's limit of slashes forbids a command's answer with a format, but its
# page of reserved topics has that topic: here its prefix does not count either.
UNCOUNTED_PREFIX = re.compile(r"\A(\$aws/rules/[^/]+/|\$share/[^/]+/|\$aws/(?=commands/))")
# https://docs.aws.amazon.com/iot/latest/developerguide/reserved-topics.html: the $aws/ topics that clients may publish
# to. For any other topic that begins with $, AWS closes the connection.
# It leaves out those of two services: greengrass/v2/developerguide/device-auth.html (its minimal policy) and
# iot-fleetwise/latest/developerguide/reserved-topics.html, whose vehicles answer commands in protobuf.
PUBLISHABLE_TOPICS = (  # not compiled for --help
    r"\$aws/(rules/.+"
    r"|things/[^/]+/shadow/(name/[^/]+/)?(get|update|delete)"
    r"|things/[^/]+/jobs/(get|start-next|[^/]+/(get|update))"
    r"|things/[^/]+/defender/metrics/(json|cbor)"
    r"|things/[^/]+/greengrass(v2)?/health/json"
    r"|things/[^/]+/streams/[^/]+/(describe|get)/(json|cbor)"
    r"|certificates/(create|create-from-csr)/(json|cbor)"
    r"|provisioning-templates/[^/]+/provision/(json|cbor)"
    r"|device_location/[^/]+/get_position_estimate"
    r"|commands/(things|clients)/[^/]+/executions/[^/]+/response(/(json|cbor|protobuf))?"
    r"|iotfleetwise/vehicles/[^/]+/(checkins|signals|command/response|last_known_states/data))"
)


def utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError("NotUtf8", "the message or topic is not UTF-8", "use UTF-8, which MQTT requires") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# In JSON (RFC 8259) numbers can have any size; their values do not matter here.
_JSON_DECODER = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=_refuse_constant)


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError, and UsageError if it nests too deep for Python's decoder."""
    try:
        return _JSON_DECODER.decode(text)
    except RecursionError:
        raise UsageError(
            "JsonTooDeep", "the JSON object nests too deep", "send it as is with --raw, or a flatter one"
        ) from None


def is_reserved_topic(topic: str) -> bool:
    return topic.startswith("$") and not topic.startswith("$aws/rules/")


def too_long(what: str, size: str, allowed: str = "AWS IoT allows 128 KiB") -> UsageError:
    return UsageError("MessageTooLong", f"the {what} is too long: {size}, and {allowed}", "send shorter ones")


def not_made(count: int, error: Exception | None) -> ElfError:
    """Return the failure of messages that could not be made while things were sending; `error` is the first one's."""
    left = f"({plural(count, 'message')} not sent)"
    if isinstance(error, ElfError):
        return ElfError(error.name, f"{error.cause} {left}", error.remedy)
    reason = _reason(error) if isinstance(error, ValueError) else error
    cause = f"the template's result looks like a JSON object but is invalid: {reason} {left}"
    return ElfError("NotAnObject", cause, "correct the template; `| tojson` writes any value as JSON")


class Message(Protocol):
    """What the things send."""

    @property
    def topic(self) -> str:
        """Where it is sent to; "": to the topic of its thing."""

    def payload(self, topic: str, thing: str, number: int) -> bytes:
        """Return what a thing publishes as its message `number`. Raises UsageError, ValueError."""


class PayloadBuilder(NamedTuple):
    """What the things send: `text` as given, and the JSON object that it is, or that has it as its msg."""

    text: bytes
    before: bytes = b""  # the object's text up to where members are added; empty: `text` goes to all topics
    after: bytes = b""
    has: frozenset[str] = frozenset()  # of ADDED
    run: str = ""  # that its messages name, beside the thing and their number; none: neither
    is_object: bool = False  # `text` is the object itself
    topic: str = ""  # as Message has it

    @classmethod
    def of_object(cls, text: bytes) -> PayloadBuilder:
        """Make one of a JSON object's text. Raises ValueError if it is not one, UsageError if it nests too deep."""
        text = text.removeprefix(codecs.BOM_UTF8)
        members = parse_json(text.decode("utf-8"))
        if not isinstance(members, dict):
            raise ValueError("it is not a JSON object")
        brace = text.rindex(b"}")
        before, has = text[:brace] + (b", " if members else b""), ADDED_MEMBERS & members.keys()
        return cls(text, before, text[brace:], has, is_object=True)

    @classmethod
    def of_any(cls, text: bytes, lenient: bool = True) -> PayloadBuilder:
        """Make one of a JSON object's text, or of any other text.

        What only begins like an object is a text if `lenient`, else ValueError. Raises UsageError if it is not UTF-8.
        """
        with contextlib.suppress(ValueError) if lenient or not begins_object(text) else contextlib.nullcontext():
            return cls.of_object(text)
        return cls.of_text(text)

    @classmethod
    def of_text(cls, text: bytes) -> PayloadBuilder:
        """Make one of any text. Raises UsageError if it is not UTF-8."""
        msg = text.decode("utf-8", errors="surrogateescape")
        return cls.of_object(utf8(json.dumps({"msg": msg}, ensure_ascii=False)))._replace(text=text, is_object=False)

    def payload(self, topic: str, thing: str, number: int) -> bytes:
        """Return what a thing publishes as its message `number`. Raises UsageError if it is too long for AWS IoT.

        AWS's own topics get only what the user gave; Basic Ingest topics lead to the user's rules.
        """
        payload, members = self.text, []
        if self.before and not is_reserved_topic(topic):
            if "ts" not in self.has:
                now_ms = time.time_ns() // 1_000_000  # and not later than now
                members.append(f'"ts": "{now_ms // 1000}.{now_ms % 1000:03}"')
            if self.run:
                members.append(f'"thing": "{thing}", "seq": {number}, "run": "{self.run}"')
        if members:
            payload = self.before + ", ".join(members).encode() + self.after
        if len(payload) > defaults.MAX_PAYLOAD_BYTES:
            raise too_long("message", f"{len(payload):,} bytes")
        return payload


def begins_object(text: bytes) -> bool:
    return text.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")


def hint_about(text: str, message: Message, is_template: bool) -> str:
    """Return what looks unintended in a MESSAGE that is sent as it is, and what was probably meant; "" if nothing."""
    if not is_template and (found := re.search(r"\{\{[^{}]*\}\}|\{thing\W?\w*\}", text)):
        return f"the message is sent with {found[0]} as it is; --template replaces {{{{ thing_name }}}} and more"
    is_expression = is_template and text.startswith(("{{", "{%", "{#"))
    if getattr(message, "is_object", True) or not begins_object(utf8(text)) or is_expression:
        return ""
    reason = "once rendered"
    if not is_template:
        try:
            parse_json(text.removeprefix("\ufeff"))
        except ValueError as error:
            reason = _reason(error)
    return f"the message looks like a JSON object but is invalid ({reason}): sent as text"


def _reason(error: ValueError) -> str:
    where = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
    return f"{getattr(error, 'msg', error)}{where}"


class Line(NamedTuple):
    """An event: a line of the input is a message, or an error; with neither, the input has ended."""

    message: Message | None = None
    error: Exception | None = None
    number: int = 0
    at: float = 0.0  # time.monotonic()
    thing: str = ""  # that sends it; "": all do
    recorded_s: float | None = None  # when it was recorded, in seconds since 1970


def is_line_file(path: Path | None) -> bool:
    return path is not None and (str(path) == "-" or path.suffix.lower() in LINE_SUFFIXES)


def read_message_file(path: Path, compose: Callable[[bytes], Message]) -> Iterator[Line]:
    """Yield the message that a whole file is, or why it is none. Raises UsageError."""
    log.debug("reading %s", path)
    try:
        with path.open("rb") as file:
            text = file.read(defaults.MAX_FILE_BYTES + 1)
        if len(text) > defaults.MAX_FILE_BYTES:
            raise OSError(errno.EFBIG, f"it is larger than {defaults.MAX_FILE_BYTES >> 20} MiB")
        yield Line(compose(text))
    except (OSError, ValueError) as error:
        yield Line(error=error)


def read_lines(path: Path, most: int = 0) -> Iterator[bytes | UsageError]:
    """Yield the lines of a file, or of - (standard input); instead of one that is too long, an error.

    A line may have `most` bytes, or as many as a payload.
    """
    allowed = [f"ELF reads {most:,}"] if most else []
    most = most or defaults.MAX_PAYLOAD_BYTES
    with open(0, "rb", closefd=False) if str(path) == "-" else path.open("rb") as file:
        while text := file.readline(most + 2):
            size, end = len(text), text[-2:]
            while not end.endswith(b"\n") and (more := file.readline(most)):
                size, end = size + len(more), (end + more)[-2:]
            size -= len(end) - len(_without_line_end(end))
            yield _without_line_end(text) if size <= most else too_long("line", f"{size:,} bytes", *allowed)


def _without_line_end(text: bytes) -> bytes:
    return text.removesuffix(b"\n").removesuffix(b"\r")


def parse_lines(lines: Iterable[bytes | UsageError], compose: Callable[[bytes], Message], raw: bool) -> Iterator[Line]:
    """Yield the messages of lines, one each, then an empty Line. Empty lines count only if they are `raw`.

    A line that begins a JSON object and is not one is refused, and with it those that follow, up to the next object;
    all of them have the same error.
    """
    broken: UsageError | None = None
    try:
        for number, line in enumerate(lines, 1):
            if isinstance(line, UsageError):
                yield Line(None, line, number)
                continue
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 and not raw else line
            if not (raw or text.strip()):
                continue
            try:
                message = None if broken and not begins_object(text) else compose(text)
            except UsageError as error:
                yield Line(None, error, number)
                continue
            except ValueError as error:
                message = None
                cause = f"it looks like a JSON object but is invalid ({_reason(error)})"
                remedy = "write each message on one line (`jq -c`): the lines up to the next object are not sent either"
                broken = broken or UsageError("NotAnObject", cause, remedy)
            broken = None if message else broken
            yield Line(message, broken, number, time.monotonic())
    except OSError as error:
        yield Line(error=error)
    else:
        yield Line()


def first_message(path: Path, lines: Iterator[Line]) -> Line:
    """Return the first message of a file. Raises UsageError."""
    first = next(lines)
    if first.message:
        return first
    reason: object = first.error or "it contains no message"
    kinds = f"with a JSON object (see example.json), or a {JSONL_SUFFIX} file with one message per line"
    name, remedy = "MessageFileInvalid", f"use a UTF-8 file {kinds}"
    if isinstance(reason, ElfError):
        name, remedy, reason = reason.name, reason.remedy, f"line {first.number} is not a message: {reason.cause}"
    raise UsageError(name, f"could not read the message file {path}: {getattr(reason, 'strerror', reason)}", remedy)


def read_in_thread(events: EventQueue, read: Callable[[], Line]) -> Line:
    """Return the line that `read` does, in a thread that Ctrl-C leaves behind. Raises what it raises, and Interrupted.

    A pipe may have no writer, or one that writes nothing.
    """
    line = (read() for _ in range(1))
    threading.Thread(target=read_ahead, args=(line, events, threading.Semaphore()), daemon=True).start()
    first: Line = events.get(math.inf)
    if first.error and not first.number:  # not of a line
        raise first.error
    return first


def for_thing(given: str, thing: str) -> str:
    """Return what an option gives for all things as it is for one: {thing_name} stands for its name."""
    return given.replace("{thing_name}", thing)


def expand_topics(given: Iterable[str | None], append_thing_name: bool, thing_name: str, default: str) -> list[str]:
    """Return a thing's topics or topic filters, from --topic and --append-thing-name."""
    base, more = (defaults.TOPIC_ROOT, "/{thing_name}") if append_thing_name else (default, "")
    topics = [f"{base if topic is None else topic}{more}" for topic in given]
    return [for_thing(topic, thing_name) for topic in dict.fromkeys(topics)]


class Will(NamedTuple):
    """What the broker publishes for a thing whose connection ends without a DISCONNECT."""

    topic: str
    message: str
    qos: int
    retain: bool


def make_wills(things: Iterable[str], topic: str, message: str, qos: int, retain: bool) -> dict[str, Will]:
    """Return the last will of each thing; {thing_name} in its topic and message stands for the thing's name.

    Raises UsageError for one that AWS IoT does not take, or that would have no effect.
    """
    wills = {thing: Will(for_thing(topic, thing), for_thing(message, thing), qos, retain) for thing in things}
    topics = [will.topic for will in wills.values()]
    refuse_bad_topics({thing: [will.topic] for thing, will in wills.items()}, option="--will-topic")
    # https://docs.aws.amazon.com/iot/latest/developerguide/device-shadow-comms-app.html
    if reserved := [each for each in topics if is_reserved_topic(each)]:
        cause = f"AWS IoT's services ignore a last will on their own topics: {redacted(reserved[0])!r}"
        remedy = "choose another --will-topic, and republish what arrives there with a rule (docs/devices.md)"
        raise UsageError("WillIgnored", cause, remedy)
    if retain:
        refuse_unretainable(topics, "--will-topic", "--will-retain")
    if (size := max(len(utf8(will.message)) for will in wills.values())) > MAX_WILL_BYTES:
        cause = f"the last will is too long: {size:,} bytes, and MQTT allows {MAX_WILL_BYTES:,}"
        raise UsageError("WillTooLong", cause, "use a shorter --will-message")
    return wills


def refuse_unretainable(topics: Sequence[str], option: str, retain: str, interval_s: float = math.inf) -> None:
    """Raise UsageError if AWS IoT would not retain what things publish, each to its topic, every `interval_s`.

    `option` is where the topics come from, and `retain` asks for it. An interval of 0 is what ELF makes of it.
    https://docs.aws.amazon.com/iot/latest/developerguide/mqtt.html
    https://docs.aws.amazon.com/general/latest/gr/iot-core.html: 1 publish per second and topic
    """
    if reserved := [topic for topic in topics if topic.startswith("$")]:
        cause = f"AWS IoT retains nothing on topics that begin with $: {redacted(reserved[0])!r}"
        raise UsageError("RetainReserved", cause, f"choose another {option}, or leave {retain} out")
    refuse_shared_topic(topics, option, "AWS IoT keeps one retained message per topic: only one thing's would stay")
    if 0 < interval_s < defaults.RETAIN_INTERVAL_S:
        per_s = 1 / defaults.RETAIN_INTERVAL_S
        cause = f"AWS IoT takes {per_s:g} retained message per second on a topic, not one every {interval_s:g} s"
        remedy = f"use --interval {defaults.RETAIN_INTERVAL_S:g} or longer: only the last message is kept"
        raise UsageError("RetainTooOften", cause, remedy)


def refuse_shared_topic(topics: Sequence[str], option: str, cause: str) -> None:
    """Raise UsageError if things share one of their topics, which come from `option`."""
    if len({*topics}) < len(topics):
        appended = ", or add --append-thing-name or --things 1" if option == "--topic" else ", or add --things 1"
        raise UsageError("TopicShared", cause, f"put {{thing_name}} into {option}{appended}")


def expand_client_ids(given: str | None, things: Sequence[str]) -> dict[str, str]:
    """Return the client ID of each thing, from --client-id; "" without it: a new one for each connection.

    Raises UsageError for one that things would share, or that their policies or AWS IoT do not allow.
    """
    ids = {thing: for_thing(given or "", thing) for thing in things}
    if given is None:
        return ids
    if len({*ids.values()}) < len(ids):
        raise UsageError(
            "ClientIdShared",
            f"all things would have the client ID {given!r}, and AWS IoT lets only one be connected",
            "put {thing_name} into --client-id, or add --things 1",
        )
    for thing, client_id in ids.items():
        if client_id != thing and not client_id.startswith(f"{thing}-"):
            raise UsageError(
                "ClientIdForbidden",
                f"the policy of {thing} does not allow the client ID {client_id[:300]!r}",
                "use {thing_name}, or {thing_name}- and more, as --client-id",
            )
        if len(utf8(client_id)) > defaults.MAX_CLIENT_ID_BYTES or "\0" in client_id:
            most = defaults.MAX_CLIENT_ID_BYTES
            raise UsageError(
                "ClientIdTooLong", f"{client_id[:300]!r} is not a client ID of 1 to {most} bytes", "use a shorter one"
            )
    return ids


def refuse_bad_topics(topics: Mapping[str, Sequence[str]], wildcards: bool = False, option: str = "--topic") -> None:
    """Raise UsageError for a topic, or with `wildcards` a topic filter, at which AWS IoT closes the connection.

    Warn of a name in braces, such as {thing-name}, which was not replaced.
    """
    for each_of_thing in topics.values():
        if len(each_of_thing) > MAX_SUBSCRIPTIONS:
            raise UsageError(
                "TooManySubscriptions",
                f"AWS IoT allows {MAX_SUBSCRIPTIONS} subscriptions per connection, not {len(each_of_thing)}",
                "use fewer --topic options, or a wildcard",
            )
        for topic in each_of_thing:
            if problem := topic_problem(topic, wildcards):
                raise UsageError("BadTopic", f"{problem}: {redacted(topic)[:300]!r}", f"choose another with {option}")
    of_one = "/".join(next(iter(topics.values()), ()))
    if kept := dict.fromkeys(re.findall(r"\{[^{}/]*\}", of_one)):
        _warn_of_names(", ".join(kept))


@functools.cache  # Locust checks topics again and again
def _warn_of_names(kept: str) -> None:
    log.warning("only {thing_name} is replaced in a topic; sent as it is: %s", kept)


def topic_problem(topic: str, wildcards: bool) -> str | None:
    """Return what is wrong with a topic, or with `wildcards` a topic filter; None if nothing is."""
    levels = topic.split("/")
    if not topic or "\0" in topic:
        return "the topic is empty or contains a null character"
    counted = UNCOUNTED_PREFIX.sub("", topic, count=1) if topic.startswith("$") else topic
    if len(utf8(counted)) > MAX_TOPIC_BYTES:
        return f"the topic is longer than AWS IoT's {MAX_TOPIC_BYTES} bytes"
    if counted.count("/") > MAX_TOPIC_SLASHES:
        return f"the topic has more than AWS IoT's {MAX_TOPIC_SLASHES} slashes"
    if not wildcards and ("#" in topic or "+" in topic):
        return "+ and # are for topic filters, not for a topic to publish to"
    if "#" in topic[:-1] or any(level != wild and wild in level for level in levels for wild in "+#"):
        return "in a topic filter, + must be a whole level, and # the last level"
    if topic.startswith("$share/") and not re.fullmatch(r"\$share/[^/]+/.+", topic, re.DOTALL):
        return "a shared topic filter has a group and a topic filter: $share/GROUP/FILTER"
    if wildcards and topic.startswith("$aws/rules/"):
        return "messages on this topic go to a rule, not to subscribers"
    if not wildcards and topic.startswith("$") and not re.fullmatch(PUBLISHABLE_TOPICS, topic):
        return "this topic is reserved: AWS IoT lets no client publish to it"
    return None


def answer_topics(topic: str, thing: str) -> list[str]:
    """Return the topics on which AWS answers what a thing publishes to `topic`: two, if it is its own shadow's.

    They are filters where the shadow's name is in braces, a column of a recording.
    """
    shadow = rf"\$aws/things/{re.escape(thing)}/shadow/(name/[^/]+/)?(get|update|delete)"
    answered = re.sub(r"/[^/]*\{[^/]*/", "/+/", topic)
    return [f"{answered}/accepted", f"{answered}/rejected"] if re.fullmatch(shadow, topic) else []


def read_ahead(lines: Iterable[Line], events: EventQueue, wanted: threading.Semaphore) -> None:
    """Put lines into the event queue, one each time `wanted` is released; at last any error that ends them."""
    try:
        for line in lines:
            wanted.acquire()
            events.put(line)
    except Exception as error:  # else the main thread would wait for ever
        events.put(Line(error=error))
