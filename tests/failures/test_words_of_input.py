"""What is wrong with what a user gives is explained: files, lines, messages, topics."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.failures import Explained
from support.shell import InProcess, Pair

# A thread's traceback on the terminal is no explanation either.
pytestmark = [
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.usefixtures("impatient"),
]

ONCE = ("--duration", "0.01")
JSON = ("--output", "json")


INVALID = "MessageFileInvalid"


@pytest.mark.parametrize(
    ("option", "content", "failure", "reason"),
    [
        pytest.param("--root-cert", None, "NotARootCertificate", "No such file", id="no root certificate"),
        pytest.param("--root-cert", b"root", "NotARootCertificate", "", id="a root certificate that is none"),
        pytest.param("--root-cert", b"", "NotARootCertificate", "", id="an empty root certificate"),
        pytest.param("--json-message", None, INVALID, "No such file", id="no message"),
        pytest.param("--json-message", b"\xff", INVALID, "'utf-8' codec", id="a message that is not UTF-8"),
        pytest.param("--json-message", b"{'a': 1}", INVALID, "line 1", id="a message that is not JSON"),
        pytest.param("--json-message", b'{"a": NaN}', INVALID, "not JSON", id="a message with NaN"),
        pytest.param("--json-message", b"[1]", INVALID, "not a JSON object", id="a message that is no object"),
    ],
)
def test_a_file_that_the_user_names_is_explained(
    main_of_pair: InProcess,
    pair: Pair,
    tmp_path: Path,
    explained: Explained,
    option: str,
    content: bytes | None,
    failure: str,
    reason: str,
) -> None:
    file = tmp_path / "given"
    if content is not None:
        file.write_bytes(content)
    result = main_of_pair("send", *pair.to_broker, *ONCE, option, file, status=2)
    explained(result, failure, file, reason)
    assert "posting" not in result.err


def test_a_file_of_messages_that_has_none_is_explained(
    main_of_pair: InProcess, pair: Pair, tmp_path: Path, explained: Explained
) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text("\n \n")
    result = main_of_pair("send", *pair.to_broker, "--json-message", file, status=2)
    explained(result, INVALID, file, "it contains no message")
    assert len(result.lines) == 2


def test_lines_of_the_input_that_can_not_be_sent_are_explained(pair: Pair, explained: Explained) -> None:
    result = pair("send", *pair.to_broker, "--json-message", "-", *JSON, feed=b"one\n\xff\n", status=1)
    explained(result, "LinesRefused", "1 line")


@pytest.mark.parametrize(
    ("arguments", "failure", "fact"),
    [
        pytest.param(("send", "\udcff"), "NotUtf8", "UTF-8", id="a message of other bytes"),
        pytest.param(("send", "--topic", "\udcff"), "NotUtf8", "UTF-8", id="a topic of other bytes"),
        pytest.param(("send", "x" * 2**17), "MessageTooLong", "128 KiB", id="a long message"),
    ],
)
def test_a_message_or_topic_that_aws_does_not_take_is_explained(
    main_of_pair: InProcess, explained: Explained, arguments: tuple[str, ...], failure: str, fact: str
) -> None:
    result = main_of_pair(*arguments, status=2)
    explained(result, failure, fact)
    assert len(result.lines) == 2  # bad input is found before anything is done
