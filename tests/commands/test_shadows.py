"""What AWS answers to what things send to their shadows: accepted or rejected, and why."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.aws import Account
from support.failures import Explained
from support.mqtt import Client
from support.program import Limits
from support.shell import Elf, InProcess

UPDATE = "$aws/things/{thing_name}/shadow/update"
NAMED = "$aws/things/{thing_name}/shadow/name/door/"
ANSWER = "$aws/things/thing_0/shadow/update/"
REPORTED: dict[str, object] = {"state": {"reported": {"n": 1}}}


@pytest.fixture
def send(
    main: InProcess, elf: Elf, tmp_path: Path, explained: Explained
) -> Callable[..., tuple[dict[str, int], list[str]]]:
    """Send some objects, one after the other, from a fleet of two; return the answers' counts, and the log."""
    main("create", 2)

    def send(
        topic: str, *objects: object, status: int = 0, options: tuple[object, ...] = ()
    ) -> tuple[dict[str, int], list[str]]:
        file = tmp_path / "messages.jsonl"
        file.write_text("".join(json.dumps(message) + "\n" for message in objects))
        how = ("--json-message", file, "--interval", "0.1", "--topic", topic, "--output", "json")
        result = main("send", *elf.to_broker, *how, *options, status=status)
        summary = json.loads(result.out.splitlines()[-1])
        if status:
            counts = f"{summary['rejected']} rejected, {summary['notAnswered']} not answered"
            explained(result, "ShadowsRejected", counts, "iot:Receive")
        return {key: summary[key] for key in ("sent", "accepted", "rejected", "notAnswered")}, result.lines

    return send


def test_a_column_of_a_recording_may_name_the_shadow(main: InProcess, elf: Elf, tmp_path: Path) -> None:
    main("create")
    (tmp_path / "day.csv").write_text("kind,n\ndoor,1\nlamp,2\n")
    topic = "$aws/things/{thing_name}/shadow/name/{kind}/update"
    how = ("--replay", tmp_path / "day.csv", "--topic", topic, "--interval", "0.01")
    result = main("send", *elf.to_broker, *how, status=1)
    for kind in ("door", "lamp"):
        assert f" on {topic.format(thing_name='thing_0', kind=kind)}: 400 " in result.err
    assert "messages to shadows: 2 rejected, 0 not answered" in result.err


def test_answers_are_counted_and_rejections_give_awss_reason_and_status_1(
    send: Callable[..., tuple[dict[str, int], list[str]]], account: Account
) -> None:
    counts, lines = send(UPDATE, REPORTED, REPORTED | {"clientToken": "mine"})
    assert counts == {"sent": 4, "accepted": 4, "rejected": 0, "notAnswered": 0}
    assert lines[-1].endswith("4 acknowledged, 0 lost, 4 accepted, 0 rejected")
    assert account.shadow("thing_1")["version"] == 2

    old, tokens = REPORTED | {"version": 1}, [{"clientToken": "a"}, {"clientToken": "b"}]
    counts, lines = send(UPDATE, old, old | tokens[0], REPORTED | tokens[1], {"no": "state"}, status=1)
    assert counts == {"sent": 8, "accepted": 2, "rejected": 6, "notAnswered": 0}
    for thing in ("thing_0", "thing_1"):
        where = f"AWS rejected a message of {thing} on {UPDATE.replace('{thing_name}', thing)}"
        assert lines.count(f"{where}: 409 Version conflict") == 2
        assert lines.count(f"{where}: 400 Missing required node: state") == 1
    assert "8 acknowledged, 0 lost, 2 accepted, 6 rejected" in lines[-3]


def test_named_shadows_and_all_that_can_be_asked_of_one_are_answered(
    send: Callable[..., tuple[dict[str, int], list[str]]],
) -> None:
    for verb, accepted in (("get", 0), ("update", 2), ("get", 2), ("delete", 2), ("delete", 0)):
        counts, lines = send(NAMED + verb, REPORTED, status=0 if accepted else 1)
        assert counts == {"sent": 2, "accepted": accepted, "rejected": 2 - accepted, "notAnswered": 0}
        assert accepted or any(": 404 No shadow exists with name: " in line for line in lines)
    for topic in ("$aws/things/{thing_name}/jobs/get", "elf/things/thing_0/shadow/update"):
        assert send(topic, {})[0] == {"sent": 2, "accepted": 0, "rejected": 0, "notAnswered": 0}


def test_answers_to_other_clients_and_rubbish_count_for_nothing(
    send: Callable[..., tuple[dict[str, int], list[str]]], account: Account, connect: Callable[[Account], Client]
) -> None:
    others = connect(account)
    others.subscribe(UPDATE.replace("{thing_name}", "+"))
    answers = [
        *((f"{ANSWER}accepted", rubbish) for rubbish in (b"", b"[]", b"\xff", b'{"clientToken": "theirs"}')),
        *((f"{ANSWER}rejected", rubbish) for rubbish in (b'{"clientToken": ["theirs"]}', b'{"clientToken": "b"}')),
    ]

    def disturb() -> None:
        others.hear()
        for topic, payload in answers:
            others.publish(topic, payload)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    messages = [REPORTED | {"clientToken": token} for token in ("a", "a", "c")]
    counts, _ = send(UPDATE, *messages, options=("--things", 1))
    disturber.join()
    assert counts == {"sent": 3, "accepted": 3, "rejected": 0, "notAnswered": 0}


def test_shadow_requests_without_an_answer_are_reported_after_a_while(
    send: Callable[..., tuple[dict[str, int], list[str]]],
    main: InProcess,
    account: Account,
    limits: Limits,
) -> None:
    limits(ANSWER_GRACE_S=0.5)
    send(UPDATE, REPORTED)
    deny = {"Effect": "Deny", "Action": "iot:Receive", "Resource": "*"}
    account.edit_policy("policy-thing_1", lambda statements: statements.append(deny))
    counts, lines = send(UPDATE, REPORTED, REPORTED, status=1)
    assert counts == {"sent": 4, "accepted": 2, "rejected": 0, "notAnswered": 2}
    assert "4 acknowledged, 0 lost, 2 accepted, 0 rejected, 2 not answered" in lines[-3]
