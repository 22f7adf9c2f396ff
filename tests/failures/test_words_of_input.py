"""What is wrong with what a user gives is explained: files, lines, messages, topics."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.shell import InProcess, Pair

from .words import Explained, Words

# A thread's traceback on the terminal is no explanation either.
pytestmark = [
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.usefixtures("impatient"),
]

ONCE = ("--duration", "0.01")

ROOT_INVALID = (
    "{} is not a root certificate: {}",
    "use a PEM file, or leave --root-cert out: ELF then uses Amazon's",
)

MESSAGE_INVALID = (
    "could not read the message file {}: {}",
    "use a UTF-8 file with a JSON object (see example.json), or a .jsonl file with one message per line",
)


@pytest.mark.parametrize(
    ("option", "content", "failure", "reason"),
    [
        pytest.param("--root-cert", None, ROOT_INVALID, "No such file", id="no root certificate"),
        pytest.param("--root-cert", b"root", ROOT_INVALID, "", id="a root certificate that is none"),
        pytest.param("--root-cert", b"", ROOT_INVALID, "", id="an empty root certificate"),
        pytest.param("--json-message", None, MESSAGE_INVALID, "No such file", id="no message"),
        pytest.param("--json-message", b"\xff", MESSAGE_INVALID, "'utf-8' codec", id="a message that is not UTF-8"),
        pytest.param("--json-message", b"{'a': 1}", MESSAGE_INVALID, "line 1", id="a message that is not JSON"),
        pytest.param("--json-message", b'{"a": NaN}', MESSAGE_INVALID, "not JSON", id="a message with NaN"),
        pytest.param("--json-message", b"[1]", MESSAGE_INVALID, "not a JSON object", id="a message that is no object"),
    ],
)
def test_a_file_that_the_user_names_is_explained(
    main_of_pair: InProcess,
    pair: Pair,
    tmp_path: Path,
    explained: Explained,
    option: str,
    content: bytes | None,
    failure: Words,
    reason: str,
) -> None:
    file = tmp_path / "given"
    if content is not None:
        file.write_bytes(content)
    result = main_of_pair("send", *pair.to_broker, *ONCE, option, file, status=1 if content is None else 2)
    explained(result, failure, file, reason)
    assert "posting" not in result.err


def test_a_file_of_messages_that_has_none_is_explained(
    main_of_pair: InProcess, pair: Pair, tmp_path: Path, explained: Explained
) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text("\n \n")
    result = main_of_pair("send", *pair.to_broker, "--json-message", file, status=2)
    explained(result, MESSAGE_INVALID, file, "it contains no message")
    assert len(result.lines) == 2


def test_lines_of_the_input_that_can_not_be_sent_are_explained(pair: Pair, explained: Explained) -> None:
    result = pair("send", *pair.to_broker, "--json-message", "-", feed=b"one\n\xff\n", status=1)
    explained(result, "LinesRefused", "1 line of the input")


NOT_UTF8 = ("the message or topic is not UTF-8", "use UTF-8, which MQTT requires")


@pytest.mark.parametrize(
    ("arguments", "cause", "remedy"),
    [
        pytest.param(("send", "\udcff"), *NOT_UTF8, id="a message of other bytes"),
        pytest.param(("send", "--topic", "\udcff"), *NOT_UTF8, id="a topic of other bytes"),
        pytest.param(
            ("send", "x" * 2**17),
            *("the message is too long: {} bytes, and AWS IoT allows 128 KiB", "send a shorter one"),
            id="a long message",
        ),
    ],
)
def test_a_message_or_topic_that_aws_does_not_take_is_explained(
    main_of_pair: InProcess, explained: Explained, arguments: tuple[str, ...], cause: str, remedy: str
) -> None:
    result = main_of_pair(*arguments, status=2)
    explained(result, (cause, remedy))
    assert len(result.lines) == 2  # bad input is found before anything is done
